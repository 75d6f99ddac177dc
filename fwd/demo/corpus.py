"""The training text: the Python standard library's source, and chat pairs made from its docstrings.

Nothing is downloaded. The split is by hash of the file's path, so a file is wholly in training or wholly held out.
"""

import ast
import hashlib
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fwd.demo import chat

SKIP = {"site-packages", "encodings", "pydoc_data", "__pycache__", "lib-dynload", "ensurepip"}
TESTS = {"test", "tests", "idle_test"}
MAX_BYTES = 400_000
MAX_PIECE = 2400
MAX_DIGITS = 0.15
HELD_OUT = 24


class Source(NamedTuple):
    """One module: its path inside the library, its text, and which side of the split it is on."""

    name: str
    text: str
    held_out: bool
    is_test: bool


class Function(NamedTuple):
    """One function or class, dedented: whole, without its docstring, and the docstring."""

    name: str
    kind: str
    text: str
    bare: str
    doc: str


def held_out(name: str) -> bool:
    """One file in HELD_OUT, chosen by the hash of its path inside the library."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % HELD_OUT == 0


def is_prose(text: str) -> bool:
    """False for tables of numbers: they are text, but no Python anybody wants to see continued."""
    digits = sum(map(str.isdigit, text))
    return 0 < len(text) < MAX_BYTES and digits < MAX_DIGITS * len(text)


def sources(root: Path | None = None, *, wanted: bool | None = None) -> Iterator[Source]:
    """Every usable module under root (the running Python's library) in a fixed order, or those of one side alone."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIP.intersection(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        name = "/".join(parts)
        if wanted is not None and held_out(name) is not wanted:
            continue
        text = read(path)
        if text is not None and is_prose(text):
            yield Source(name, text, held_out(name), bool(TESTS.intersection(parts)))


def read(path: Path) -> str | None:
    """The file's text with Unix newlines, or None where it is not UTF-8 or not Python 3."""
    try:
        text = path.read_text(encoding="utf-8")
        compile(text, str(path), "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
    except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
        return None
    return text


def functions(text: str) -> Iterator[Function]:
    """Functions, methods and classes of a module that are short enough to be one answer."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            whole = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).rstrip() + "\n"
            if whole.count("\n") > 2 and len(whole) < MAX_PIECE:
                doc = ast.get_docstring(node) or ""
                yield Function(node.name, kind(node, whole), whole, without_doc(node, lines), doc)


def kind(node: ast.AST, text: str) -> str:
    """What a person would call it."""
    if isinstance(node, ast.ClassDef):
        return "class"
    return "method" if re.match(r"(async )?def \w+\((self|cls)\b", text) else "function"


def without_doc(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, lines: list[str]) -> str:
    """The node's source with the docstring's lines cut out."""
    cut = range(0)
    first = node.body[0]
    if ast.get_docstring(node) is not None and len(node.body) > 1:
        cut = range(first.lineno - 1, first.end_lineno or first.lineno)
    kept = [lines[i] for i in range(node.lineno - 1, node.end_lineno or node.lineno) if i not in cut]
    return textwrap.dedent("".join(kept)).strip() + "\n"


class Documents(NamedTuple):
    """The kinds of training documents; each list is one pool that batches draw rows from."""

    code: list[str]
    tests: list[str]
    pieces: list[str]
    chat: list[str]


def documents(wanted: bool, root: Path | None = None) -> Documents:
    """The documents of the held-out files (wanted) or of all the others."""
    docs = Documents([], [], [], [])
    for source in sources(root, wanted=wanted):
        (docs.tests if source.is_test else docs.code).append(source.text)
        if not source.is_test:
            add_functions(docs, source.text)
    if not wanted:
        docs.chat.extend(chat.greetings())
    return docs


def add_functions(docs: Documents, text: str) -> None:
    """The module's functions as pieces, and as chats where they have a docstring."""
    for function in functions(text):
        docs.pieces.append(function.text)
        if function.doc:
            docs.chat.extend(chat.pairs(*function))

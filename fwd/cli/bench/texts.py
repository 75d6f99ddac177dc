"""What is continued to see what drafts are worth: texts of several kinds that the embedded model was not trained on."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from fwd.errors import BadRequestError
from fwd.text.template import ChatTemplate
from fwd.text.tokenizer import Tokenizer

HEAD = 1600  # characters of a module or file that are continued
PIECE = range(500, 1400)  # characters of a piece that is edited
RECORDS = 12
RANDOM = "random"
T = TypeVar("T")


class Task(NamedTuple):
    """A prompt, and what its answer will likely hold, in ids."""

    prompt: list[int]
    prediction: list[int]


class Library:
    """Modules of Python's library, and functions with a docstring in them, from which the texts are made."""

    def __init__(self) -> None:
        from fwd.demo import chat, corpus  # noqa: PLC0415  # where the embedded model's text comes from

        modules = [source.text for source in corpus.sources(wanted=True) if not source.is_test]
        self.modules = [text for text in modules if len(text) > 2 * HEAD]
        functions = [function for text in modules for function in corpus.functions(text)]
        self.pieces = [(each.name, each.text) for each in functions if len(each.text) in PIECE]
        self.questions = [
            f"Write a Python {each.kind} `{each.name}`: {chat.sentence(each.doc)}." for each in functions if each.doc
        ]


def tasks(folder: Path, files: Sequence[Path], count: int, vocab: int) -> dict[str, list[Task]]:
    """`count` tasks of each kind: code, chat, edit (without and with a prediction), records, random; and of each file.

    Random ids are less than `vocab`. A model without a chat template has no chats. Raises `OSError` and
    `UnicodeDecodeError` for a file.
    """
    tokenizer, library = Tokenizer.load(folder), Library()
    edits = [_edit(tokenizer, *piece) for piece in _some(library.pieces, count)]
    found = {
        "code": [_plain(tokenizer, text[:HEAD]) for text in _some(library.modules, count)],
        "chat": list(_chats(folder, tokenizer, _some(library.questions, count))),
        "edit": [edit._replace(prediction=[]) for edit in edits],
        "edit, predicted": edits,
        "records": [_plain(tokenizer, _records(seed)) for seed in range(count)],
        RANDOM: [Task(_random(seed, vocab), []) for seed in range(count)],
        **{path.name: list(_parts(tokenizer, path.read_text(encoding="utf-8"), count)) for path in files},
    }
    return {name: some for name, some in found.items() if some}


def _some(texts: Sequence[T], count: int) -> Sequence[T]:
    """So many of them, from all over."""
    return texts[:: max(1, len(texts) // count)][:count]


def _parts(tokenizer: Tokenizer, text: str, count: int) -> Iterator[Task]:
    for place in range(count):
        start = len(text) * place // count
        yield _plain(tokenizer, text[start : start + HEAD])


def _plain(tokenizer: Tokenizer, text: str) -> Task:
    return Task(tokenizer.encode(text), [])


def _chats(folder: Path, tokenizer: Tokenizer, questions: Sequence[str]) -> Iterator[Task]:
    template = ChatTemplate.load(folder)
    with contextlib.suppress(BadRequestError):  # there is none
        for question in questions:
            yield Task(template.encode(tokenizer, [{"role": "user", "content": question}]), [])


def _edit(tokenizer: Tokenizer, name: str, text: str) -> Task:
    """A piece, and the beginning of the same with another name in it, which is predicted but for the name."""
    edited = text.replace(name, f"new_{name}")
    start = edited.index("\n") + 1
    prompt = f"{text}\n\n# the same with {name} renamed to new_{name}\n\n{edited[:start]}"
    return Task(tokenizer.encode(prompt), tokenizer.encode(text[text.index("\n") + 1 :], add_special_tokens=False))


def _records(seed: int) -> str:
    source = random.Random(seed)  # noqa: S311  # no secret
    lines = (
        f'{{"id": {number}, "name": "{source.choice(("ada", "alan", "grace"))}", "size": {source.randrange(1000)}}},\n'
        for number in range(1, RECORDS)
    )
    return "[\n" + "".join(lines)


def _random(seed: int, vocab: int) -> list[int]:
    """Ids that follow no text."""
    return random.Random(seed).choices(range(vocab), k=200)  # noqa: S311  # no secret

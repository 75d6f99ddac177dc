"""Keeps added tokens that stand in user text from being interpreted when a chat is rendered and encoded.

Before rendering, each occurrence is replaced by a mark that nobody can guess; after rendering, the text is cut at the
marks, and what they stood for is encoded as plain text.
"""

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from fwd.text.messages import Chat


class Piece(NamedTuple):
    """A stretch of a rendered chat; `special` says whether the added tokens in it are meant as such."""

    text: str
    special: bool


class ControlTokens:
    """The added tokens of a tokenizer (content → whether special), as patterns to look for in user text."""

    def __init__(self, added: Mapping[str, bool]) -> None:
        self.all = _any_of(added)
        self.special = _any_of(content for content, special in added.items() if special)
        self._heads = frozenset(content[:i] for content in added for i in range(1, len(content)))
        self._tails = frozenset(content[i:] for content in added for i in range(1, len(content)))
        self._sizes = range(1, max(map(len, added), default=0))

    def joins(self, text: str) -> tuple[bool, bool]:
        """Whether a token may begin before `text` and end in it, and whether one may begin in it and end after it."""
        before = any(text[:size] in self._tails for size in self._sizes)
        return before, any(text[-size:] in self._heads for size in self._sizes)


def guarded_pieces(control: ControlTokens, chat: Chat, draw: Callable[[Chat], str]) -> list[Piece]:
    """Render `chat` with `draw`; the pieces to encode, in which only the template's own tokens are special.

    In assistant messages only special tokens are guarded: templates look for `</think>` there. A token that
    neighbouring strings form together is guarded too: then the text is also cut at their edges.
    """
    marks = Marks(control)
    pieces = marks.split(draw(marks.apply(chat)))
    if marks.joinable:
        edged = Marks(control, edges=True)
        cut = edged.split(draw(edged.apply(chat)))
        if _tokens(control, cut) != _tokens(control, pieces):
            return cut
    return pieces


class Marks:
    """The marks of one rendering: a random name in private-use characters (126 bits) around a number.

    With `edges`, strings that may form a token with their neighbours also get an empty mark at that edge.
    `joinable` tells, after `apply`, whether there was such a string.
    """

    def __init__(self, control: ControlTokens, *, edges: bool = False) -> None:
        self.joinable = False
        self._control = control
        self._edges = edges
        self._name = private_name()
        self._originals: dict[str, int] = {}

    def apply(self, chat: Chat) -> Chat:
        """Replace every guarded occurrence in a chat, in values and in the keys of JSON schemas."""
        control = self._control
        patterns = [control.special if message["role"] == "assistant" else control.all for message in chat.messages]
        messages = [self._walk(*pair) for pair in zip(chat.messages, patterns, strict=True)]
        return Chat(messages, self._walk(chat.tools, control.all), self._walk(chat.options, control.all))

    def split(self, rendered: str) -> list[Piece]:
        """Cut the rendered text at the marks."""
        originals = list(self._originals)
        parts = re.split(f"{self._name}([0-9]+){self._name}", rendered)
        pieces = [Piece(originals[int(part)], False) if i % 2 else Piece(part, True) for i, part in enumerate(parts)]
        return [piece for piece in pieces if piece.text]

    def _walk(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return self._text(value, pattern)
        if isinstance(value, list | tuple):
            return [self._walk(item, pattern) for item in value]
        if isinstance(value, dict):
            return {self._text(key, pattern): self._walk(item, pattern) for key, item in value.items()}
        assert value is None or isinstance(value, int | float), type(value)
        return value

    def _text(self, text: str, pattern: re.Pattern[str]) -> str:
        marked = pattern.sub(lambda match: self._mark(match[0]), text)
        before, after = self._control.joins(text)
        self.joinable |= before or after
        if not self._edges:
            return marked
        return f"{self._mark('') if before else ''}{marked}{self._mark('') if after else ''}"

    def _mark(self, original: str) -> str:
        return f"{self._name}{self._originals.setdefault(original, len(self._originals))}{self._name}"


def private_name() -> str:
    """Ten random private-use characters: nothing a request contains."""
    return "".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(10))


def _tokens(control: ControlTokens, pieces: list[Piece]) -> list[str]:
    return [token for piece in pieces if piece.special for token in control.all.findall(piece.text)]


def _any_of(contents: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

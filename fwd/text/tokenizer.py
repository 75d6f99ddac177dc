"""Text to token ids and back. Special tokens in text are never interpreted unless the caller asks for it."""

import asyncio
import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from fwd.errors import ModelError
from fwd.text.backend import build_full, build_plain, is_control
from fwd.text.files import read_json, read_optional_json, token_content
from fwd.text.guard import ControlTokens, Piece
from fwd.text.vocab import Spelling

# The library's `encode` holds the GIL, about 1 s per MB; its `encode_batch` releases it.
INLINE_CHARS = 2048
_ANCHOR = "\0"  # merges with nothing


class Tokenizer:
    """The tokenizer of one model folder; its methods may be called from any thread.

    `vocab_size` is the highest token id + 1, `eos_ids` every id that ends an answer, `hash` names the content of
    tokenizer.json, `control` holds the added tokens that user text must never produce, `no_text` their ids.
    """

    def __init__(self, document: dict[str, Any], settings: dict[str, Any], content_hash: str) -> None:
        self.hash = content_hash
        self._spelling = Spelling(document.get("decoder"))
        self._full, self._plain = build_full(document), build_plain(document)
        added = self._full.get_added_tokens_decoder()
        specials = {token.content: token.special for token in added.values()}
        self.control = ControlTokens({text: special for text, special in specials.items() if is_control(text, special)})
        self._added = {token.content: i for i, token in added.items()}
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self.no_text = frozenset(i for i, token in added.items() if is_control(token.content, token.special))
        self.vocab_size = max(self._full.get_vocab().values(), default=-1) + 1
        ends = settings.get("eos_token_id")
        named = [self._named(settings, "eos_token"), *(ends if isinstance(ends, list) else [ends])]
        self._lossless = self._spelling.byte_level and document.get("normalizer") is None
        self.eos_ids: tuple[int, ...] = tuple(sorted({end for end in named if end is not None}))
        bos = self._named(settings, "bos_token")
        self.bos_id: int | None = settings.get("bos_token_id") if bos is None else bos

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read tokenizer.json, tokenizer_config.json and the eos ids; `ModelError` names the file at fault.

        The eos ids are those of generation_config.json, or else of config.json, and the tokenizer's own `eos_token`.
        """
        path = folder / "tokenizer.json"
        document = read_json(path)
        document["added_tokens"] = document.get("added_tokens") or []
        ids = [read_optional_json(folder / name) for name in ("config.json", "generation_config.json")]
        settings = {key: value for found in ids for key, value in found.items() if value is not None}
        settings |= read_json(folder / "tokenizer_config.json")
        try:
            return cls(document, settings, hashlib.sha256(path.read_bytes()).hexdigest()[:16])
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{path}: {error!r} (a tokenizer.json of the tokenizers library is needed)") from error

    def encode(self, text: str, *, special: bool = False, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `special` the added tokens in it are recognised, otherwise they are plain text.

        `add_special_tokens` adds what the tokenizer's post-processor adds: the BOS of Llama 3.
        """
        instance = self._full if special else self._plain
        if len(text) <= INLINE_CHARS:
            return instance.encode(text, add_special_tokens=add_special_tokens).ids
        return instance.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids

    async def encode_async(self, text: str, *, special: bool = False, add_special_tokens: bool = True) -> list[int]:
        """As `encode`, in a thread for texts over `INLINE_CHARS`."""
        if len(text) <= INLINE_CHARS:
            return self.encode(text, special=special, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode, text, special=special, add_special_tokens=add_special_tokens)

    def encode_pieces(self, pieces: Sequence[Piece]) -> list[int]:
        """Token ids of the pieces one after the other, each encoded by itself; nothing is added around them."""
        if not pieces:
            return []
        ids = self.encode(pieces[0].text, special=pieces[0].special, add_special_tokens=False)
        inner = {
            special: _encode_inner(instance, list({piece.text for piece in pieces[1:] if piece.special == special}))
            for special, instance in ((True, self._full), (False, self._plain))
        }
        for piece in pieces[1:]:
            ids += inner[piece.special][piece.text]
        return ids

    @cached_property
    def table(self) -> dict[int, bytes]:
        """Bytes by token id, built at the first use (about 0.2 s per 100,000 tokens)."""
        return self._spelling.table(self._full.get_vocab(), self._added)

    @cached_property
    def text_table(self) -> dict[int, bytes]:
        """`table` with nothing for the special tokens."""
        return self.table | dict.fromkeys(self._special_ids, b"")

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.table.values()), default=1)

    def fewest_tokens(self, text: str) -> int:
        """How many tokens `text` has at the least, told at once from its length.

        It is 0 where that tells nothing: normalisers shorten a text, and unknown characters may be one token together.
        """
        return -(-len(text) // self._longest) if self._lossless else 0

    def start(self, text: str, tokens: int) -> str:
        """A start of `text` that has so many tokens if the text has; all of it where its length tells nothing."""
        return text[: tokens * self._longest] if self._lossless else text

    @property
    def strips_space(self) -> bool:
        """Whether decoding drops one leading space, as SentencePiece does."""
        return self._spelling.strips_space

    def token_bytes(self, token_id: int) -> bytes:
        """Return a token's true bytes; none for an id that the vocabulary does not use (padding of the embedding)."""
        return self.table.get(token_id, b"")

    def token_text(self, token_id: int) -> str:
        """Return the text of a token by itself, U+FFFD for bytes that are no complete character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_name(self, token_id: int) -> str:
        r"""Return the text of a token; one that is no complete character is spelled `bytes:\x…`, as OpenAI does.

        So no two tokens look the same.
        """
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Return the text of a whole sequence."""
        table = self.text_table if skip_special else self.table
        text = b"".join([table.get(i, b"") for i in ids]).decode(errors="replace")
        return text.removeprefix(" ") if self.strips_space else text

    def _named(self, settings: dict[str, Any], key: str) -> int | None:
        name = token_content(settings.get(key))
        return None if name is None else self._full.token_to_id(name)


def _encode_inner(instance: tokenizers.Tokenizer, texts: list[str]) -> dict[str, list[int]]:
    """Ids of each text as it stands after other text: without the space SentencePiece puts before a beginning."""
    anchor = instance.encode(_ANCHOR, add_special_tokens=False).ids
    found = {}
    encodings = instance.encode_batch([_ANCHOR + text for text in texts], add_special_tokens=False)
    for text, encoding in zip(texts, encodings, strict=True):
        if encoding.ids[: len(anchor)] == anchor:
            found[text] = encoding.ids[len(anchor) :]
        else:
            found[text] = instance.encode_batch([text], add_special_tokens=False)[0].ids
    return found

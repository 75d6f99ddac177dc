"""The true bytes of every token, read from how the tokenizer's decoder spells them."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from fwd.errors import ModelError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class Spelling:
    """How a vocabulary spells bytes: the byte-level alphabet of GPT-2, or SentencePiece (`▁`, `<0x0A>`).

    `strips_space`: decoding drops one space at the beginning, which encoding had put there.
    """

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        steps = (decoder or {}).get("decoders") or [decoder or {}]
        kinds = {step.get("type") for step in steps}
        self.byte_level = "ByteLevel" in kinds
        self.byte_fallback = "ByteFallback" in kinds
        self.strips_space = any(map(_strips, steps))
        if not self.byte_level and not {"Replace", "Metaspace"} & kinds <= kinds <= _SENTENCEPIECE:
            raise ModelError(
                f"tokenizer.json: decoder {sorted(map(str, kinds))} is neither ByteLevel nor SentencePiece"
            )

    def table(self, vocab: Mapping[str, int], added: Mapping[str, int]) -> dict[int, bytes]:
        """Bytes by token id, for all ids of `vocab`; the names in `added` are text already."""
        spell: Callable[[str], bytes] = _byte_level if self.byte_level else self._sentencepiece
        table = {i: spell(name) for name, i in vocab.items() if name not in added}
        text = str.encode if self.byte_level else _spaced
        return table | {i: text(name) for name, i in added.items()}

    def _sentencepiece(self, name: str) -> bytes:
        byte = _BYTE.fullmatch(name) if self.byte_fallback else None
        return bytes.fromhex(byte[1]) if byte else _spaced(name)


def _strips(step: dict[str, Any]) -> bool:
    if step.get("type") == "Metaspace":
        return bool(step.get("prepend_scheme") != "never")
    return bool(step.get("type") == "Strip" and step["start"] > 0)


def _spaced(name: str) -> bytes:
    return name.replace("▁", " ").encode()


def _byte_alphabet() -> dict[int, int]:
    """Map stand-in code points to bytes (GPT-2: printable Latin-1 stands for itself, the rest from U+0100)."""
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = [byte for byte in range(256) if byte not in kept]
    return {byte: byte for byte in kept} | {256 + n: byte for n, byte in enumerate(rest)}


_ALPHABET = _byte_alphabet()


def _byte_level(name: str) -> bytes:
    try:
        return name.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        return name.encode()

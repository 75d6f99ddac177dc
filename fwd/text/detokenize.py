"""Incremental detokenizer: token ids to text, complete characters only."""

import codecs

from fwd.text.tokenizer import Tokenizer

_Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one stream. Over any split, the pushes and the flush together are the decoding of the whole.

    Bytes are held until their character is complete; invalid ones become U+FFFD as in `bytes.decode(errors="replace")`.
    `continues` says that the stream goes on after a prompt in the same text: SentencePiece's first space is kept then.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, continues: bool = False) -> None:
        self._bytes_of = (tokenizer.text_table if skip_special else tokenizer.table).get
        self._decode = _Decoder("replace").decode
        self._strip = tokenizer.strips_space and not continues

    def push(self, ids: list[int]) -> str:
        """Return the characters that these tokens complete; ids that the vocabulary does not use have no text."""
        bytes_of = self._bytes_of
        text = self._decode(b"".join([bytes_of(i, b"") for i in ids]))
        return self._without_first_space(text) if self._strip and text else text

    def flush(self) -> str:
        """End the stream: U+FFFD if it stops inside a character."""
        return self._decode(b"", final=True)

    def _without_first_space(self, text: str) -> str:
        self._strip = False
        return text.removeprefix(" ")

"""The field `prediction`: text that the answer will likely hold (OpenAI's predicted outputs). It changes no token."""

from typing import Literal

from msgspec import Struct


class TextPart(Struct):
    """A piece of the text."""

    type: Literal["text"]
    text: str


class Prediction(Struct):
    """The text, whole or in parts."""

    type: Literal["content"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The whole text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

"""From what a client says to token ids: text, chats, and the ids that end an answer."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from fwd.errors import BadRequestError
from fwd.text.template import ChatTemplate
from fwd.text.tokenizer import Tokenizer

RENDER_SECONDS = 10.0


class Chat(msgspec.Struct, forbid_unknown_fields=True):
    """A chat in OpenAI's shape; `kwargs` go to the template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final: bool = False
    kwargs: dict[str, bool | int | str] = {}


class Prompts:
    """Tokenizer and chat template of the served model, used off the event loop."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self.template = template

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read tokenizer and template of a model folder; raises `ModelError` naming the file at fault."""
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.text_table  # made on first use, which would be on the event loop
        return cls(tokenizer, ChatTemplate.load(folder))

    async def text(self, text: str) -> list[int]:
        """Ids of plain text; special tokens in it are text."""
        return await self.tokenizer.encode_async(text)

    async def chat(self, chat: Chat) -> list[int]:
        """Ids of a rendered chat; raises `BadRequestError` if the template refuses it or takes too long."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(self._render, chat), RENDER_SECONDS)
        except TimeoutError as error:
            raise BadRequestError(
                f"the chat template took longer than {RENDER_SECONDS:.0f} s: send fewer messages", param="messages"
            ) from error

    async def body(self, kind: str, body: memoryview) -> list[int]:
        """Ids of the body of a `Prompt` message."""
        try:
            if kind == "text":
                return await self.text(str(body, "utf-8"))
            return await self.chat(msgspec.json.decode(body, type=Chat))
        except (UnicodeDecodeError, msgspec.MsgspecError) as error:
            raise BadRequestError(f"the body of the prompt is not {kind}: {error}", param="body") from error

    def stop_ids(self, extra: Sequence[int] = (), *, ignore_eos: bool = False) -> tuple[int, ...]:
        """The ids that end an answer: the model's own unless ignored, and those of the request."""
        own = () if ignore_eos else self.tokenizer.eos_ids
        return tuple(dict.fromkeys((*own, *extra)))

    def _render(self, chat: Chat) -> list[int]:
        return self.template.encode(
            self.tokenizer,
            chat.messages,
            tools=chat.tools,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final=chat.continue_final,
            options=chat.kwargs,
        )

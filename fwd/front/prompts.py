"""From what a client says to token ids: text, chats, and the ids that end an answer."""

import asyncio
import contextlib
import threading
from array import array
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import msgspec

from fwd.errors import BadRequestError, OverloadedError
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Vocabulary
from fwd.protocol.values import EMPTY
from fwd.text.template import ChatTemplate
from fwd.text.tokenizer import Tokenizer

RENDER_SECONDS = 10.0
PIECE = 1 << 15
RENDERERS = 2  # threads of their own: a template that does not end holds up other chats only


class Chat(msgspec.Struct, forbid_unknown_fields=True):
    """A chat in OpenAI's shape; `kwargs` go to the template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final: bool = False
    kwargs: dict[str, bool | int | str] = {}


class Prompts:
    """Tokenizer and chat template of the served model, used off the event loop. Ids come as packed int32s."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._renderers = asyncio.Semaphore(RENDERERS)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read tokenizer and template of a model folder; raises `ModelError` naming the file at fault."""
        import numpy as np  # noqa: F401, PLC0415  # `fwd.front.bounds` uses it, on the event loop

        tokenizer = Tokenizer.load(folder)
        assert tokenizer.text_table  # made on first use, which would be on the event loop
        return cls(tokenizer, ChatTemplate.load(folder))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What the text of each token is, for engines that are to follow a grammar; some 50 ms at the first use."""
        tokenizer = self.tokenizer
        texts = [tokenizer.table.get(token, b"") for token in range(tokenizer.vocab_size)]
        return Vocabulary(
            text=memoryview(b"".join(texts)),
            ends=pack_ids(accumulate(map(len, texts))),
            special=pack_ids(sorted(tokenizer.no_text)),
            eos=tokenizer.eos_ids,
        )

    async def text(self, text: str) -> memoryview:
        """Ids of plain text; special tokens in it are text."""
        ids = await self.tokenizer.encode_async(text)
        return pack_ids(ids) if len(ids) <= PIECE else await asyncio.to_thread(_packed, ids)

    async def prediction(self, text: str, most: int) -> memoryview:
        """Ids of text that an answer will likely hold; if there are more than `most`, one more than that."""
        if not text:
            return EMPTY
        start = self.tokenizer.start(text, most + 1)
        ids = await self.tokenizer.encode_async(start, add_special_tokens=False)
        return await asyncio.to_thread(_packed, ids[: most + 1]) if len(ids) > PIECE else pack_ids(ids[: most + 1])

    async def likely(self, prediction: memoryview, most: int) -> memoryview:
        """The same for the field of a `Prompt` message; raises `BadRequestError` if it is not UTF-8."""
        try:
            return await self.prediction(str(prediction, "utf-8"), most)
        except UnicodeDecodeError as error:
            raise BadRequestError(f"the prediction is not text: {error}", param="prediction") from error

    async def chat(self, chat: Chat) -> memoryview:
        """Ids of a rendered chat.

        Raises `BadRequestError` if the template refuses it or takes too long, `OverloadedError` if others do.
        """
        return await self._rendered(lambda: _packed(self._render(chat)))

    async def body(self, kind: str, body: memoryview) -> memoryview:
        """Ids of the body of a `Prompt` message; raises `BadRequestError` as `chat` does."""
        try:
            if kind == "text":
                return await self.text(str(body, "utf-8"))
            return await self._rendered(lambda: _packed(self._render(msgspec.json.decode(body, type=Chat))))
        except (UnicodeDecodeError, msgspec.MsgspecError) as error:
            raise BadRequestError(f"the body of the prompt is not {kind}: {error}", param="body") from error

    def stop_ids(self, extra: Sequence[int] = (), *, ignore_eos: bool = False) -> tuple[int, ...]:
        """The ids that end an answer: the model's own unless ignored, and those of the request."""
        own = () if ignore_eos else self.tokenizer.eos_ids
        return tuple(dict.fromkeys((*own, *extra)))

    async def _rendered(self, work: Callable[[], memoryview]) -> memoryview:
        """The result of `work`, done in one of the threads for rendering."""
        try:
            await asyncio.wait_for(self._renderers.acquire(), RENDER_SECONDS)
        except TimeoutError as error:
            raise OverloadedError("all threads that render chats are busy: try again", retry_after=1) from error
        try:
            return await asyncio.wait_for(_in_thread(work, self._renderers.release), RENDER_SECONDS)
        except TimeoutError as error:
            raise BadRequestError(
                f"the chat template took longer than {RENDER_SECONDS:.0f} s: send fewer messages", param="messages"
            ) from error

    def _render(self, chat: Chat) -> list[int]:
        return self.template.encode(
            self.tokenizer,
            chat.messages,
            tools=chat.tools,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final=chat.continue_final,
            options=chat.kwargs,
        )


def _packed(ids: list[int]) -> memoryview:
    """As `pack_ids`, in pieces: in a thread, so that the event loop gets its turn between two of them."""
    packed = array("i")
    for begin in range(0, len(ids), PIECE):
        packed.extend(ids[begin : begin + PIECE])
    return memoryview(packed).cast("B")


def _in_thread(work: Callable[[], memoryview], done: Callable[[], None]) -> asyncio.Future[memoryview]:
    """Do `work` in a thread that the process does not wait for at its end; `done` is called when it is over."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[memoryview] = loop.create_future()

    def settle(result: memoryview, error: Exception | None) -> None:
        done()
        if error and not future.done():
            future.set_exception(error)
        elif not future.done():
            future.set_result(result)

    def run() -> None:
        result = EMPTY
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  # it is raised where it is waited for
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, result, failure)

    try:
        threading.Thread(target=run, name="render", daemon=True).start()
    except RuntimeError:
        done()
        raise
    return future

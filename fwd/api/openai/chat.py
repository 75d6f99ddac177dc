"""`/v1/chat/completions`."""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta

from fwd.api.context import entering, serving
from fwd.api.openai.answer import Answer, Wanted, answering, read_prediction
from fwd.api.openai.logprobs import chat_items, output_scores
from fwd.api.openai.parameters import REFUSED, Parameters, Top, deadline, refuse
from fwd.api.openai.respond import respond
from fwd.api.openai.structured import read_grammar
from fwd.errors import BadRequestError
from fwd.front.generation import Piece
from fwd.front.prompts import Chat
from fwd.protocol.values import MAX_CONTEXT

encode = msgspec.json.encode


class ChatBody(Parameters, kw_only=True):
    """A chat request."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_CONTEXT)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=MAX_CONTEXT)] | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, bool | int | str] | None = None
    reasoning_effort: str | None = None
    modalities: list[str] | None = None
    audio: Any = None
    chat_template: Any = None
    documents: Any = None
    echo: Any = None
    function_call: Any = None
    functions: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    @property
    def scored(self) -> int:
        """How many likely tokens to tell beside each token; −1 for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else -1

    @property
    def chat(self) -> Chat:
        """What the template is given; tools that may not be called are not shown to the model."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return Chat(
            messages=self.messages,
            tools=None if self.tool_choice == "none" else self.tools or None,
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final=bool(self.continue_final_message),
            kwargs={**effort, **(self.chat_template_kwargs or {})},
        )

    def check(self) -> None:
        """Raise `BadRequestError` for what cannot be honoured."""
        refuse(self, _REFUSED)
        if self.tool_choice not in (None, "none", "auto"):
            raise BadRequestError("tool_choice: only none and auto are supported", param="tool_choice")
        if self.top_logprobs and not self.logprobs:
            raise BadRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")


_REFUSED: Mapping[str, tuple[Any, ...]] = {
    **REFUSED,
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "function_call": ("none", "auto"),
    **dict.fromkeys(("audio", "chat_template", "documents", "echo", "functions", "web_search_options"), ()),
}
_decoder = msgspec.json.Decoder(ChatBody)


async def post(request: web.Request) -> web.StreamResponse:
    """Answer a chat."""
    ends = deadline(request)
    async with entering(request, _decoder) as body:
        body.check()
        service = serving(request, body.model)
        prompt = await service.prompts.chat(body.chat)
        likely = await read_prediction(service, body)
        grammar = await read_grammar(service, body)
    most = body.max_completion_tokens or body.max_tokens
    wanted = Wanted(
        body, [prompt], max_tokens=most, logprobs=body.scored, deadline=ends, prediction=likely, grammar=grammar
    )
    with answering(request, wanted, "chatcmpl") as answer:
        return await respond(request, answer, ChatDialect(answer))


class ChatDialect:
    """Choices as messages and deltas."""

    name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._tokenizer = answer.service.prompts.tokenizer
        self._scored = answer.wanted.logprobs >= 0
        self._with_ids = bool(answer.wanted.parameters.return_token_ids)
        self._plain = not (self._scored or self._with_ids)
        self._before = [b'{"index":%d,"delta":{"content":' % index for index in range(len(answer.generations))]

    def whole(self, index: int, text: str) -> dict[str, Any]:
        """A finished choice."""
        generation = self._answer.generations[index]
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            **self._details(index, 0, generation.tokens),
            "finish_reason": generation.finish_reason,
        }

    def extra(self) -> dict[str, Any]:
        """The prompt in ids, if asked for."""
        return {"prompt_token_ids": list(self._answer.prompt(0))} if self._with_ids else {}

    async def opening(self, index: int) -> bytes:
        """The role."""
        delta = {"role": "assistant", "content": ""}
        return encode({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def piece(self, index: int, piece: Piece) -> bytes:
        """New text, and what was asked to be told about its tokens."""
        if self._plain:
            return self._before[index] + encode(piece.text) + _AFTER if piece.text else b""
        details = self._details(index, piece.start, piece.end)
        return encode({"index": index, "delta": {"content": piece.text}, **details, "finish_reason": None})

    def closing(self, index: int) -> bytes:
        """The finish reason."""
        reason = self._answer.generations[index].finish_reason
        return encode({"index": index, "delta": {}, "logprobs": None, "finish_reason": reason})

    def _details(self, index: int, start: int, end: int) -> dict[str, Any]:
        stream = self._answer.generations[index].stream
        scores = output_scores(stream, start, end)
        items = {"content": chat_items(self._tokenizer, scores), "refusal": None} if self._scored else None
        ids = {"token_ids": stream.emitted[start:end].tolist()} if self._with_ids else {}
        return {"logprobs": items, **ids}


_AFTER = b'},"logprobs":null,"finish_reason":null}'

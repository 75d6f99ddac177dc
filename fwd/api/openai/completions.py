"""`/v1/completions`: text or ids in, text out; with `echo` and `logprobs` it scores a given text."""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta

from fwd.api.context import entering, serving
from fwd.api.openai.answer import Answer, Wanted, answering, check_fit, read_prediction
from fwd.api.openai.logprobs import Columns, output_scores, prompt_scores
from fwd.api.openai.parameters import REFUSED, Parameters, Top, deadline, refuse
from fwd.api.openai.prompts import check_count, read_prompts
from fwd.api.openai.respond import respond
from fwd.api.openai.structured import read_grammar
from fwd.errors import BadRequestError
from fwd.front.bounds import over_context
from fwd.front.generation import Piece
from fwd.front.service import Service
from fwd.text.detokenize import Detokenizer

encode = msgspec.json.encode


class CompletionBody(Parameters, kw_only=True):
    """A completion request; `prompt` is what `read_prompts` takes."""

    prompt: msgspec.Raw
    logprobs: Top | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    suffix: Any = None
    prompt_embeds: Any = None

    def check(self) -> None:
        """Raise `BadRequestError` for what cannot be honoured."""
        refuse(self, _REFUSED)
        if self.max_tokens == 0 and not self.echo:
            raise BadRequestError("max_tokens: expected int >= 1, or 0 together with echo", param="max_tokens")
        if self.best_of is not None and self.best_of != self.choices:
            raise BadRequestError(f"best_of must be n ({self.choices}): ranking is not supported", param="best_of")


_REFUSED: Mapping[str, tuple[Any, ...]] = {**REFUSED, "suffix": (), "prompt_embeds": ()}
_decoder = msgspec.json.Decoder(CompletionBody)


async def post(request: web.Request) -> web.StreamResponse:
    """Complete one or many prompts."""
    body, wanted = await _read(request)
    with answering(request, wanted, "cmpl") as answer:
        return await respond(request, answer, CompletionDialect(answer, echo=bool(body.echo)))


async def _read(request: web.Request) -> tuple[CompletionBody, Wanted]:
    ends = deadline(request)
    async with entering(request, _decoder) as body:
        body.check()
        service = serving(request, body.model)
        prompts = await _prompts(service, body)
        likely = await read_prediction(service, body)
        grammar = await read_grammar(service, body)
    body.prompt = msgspec.Raw()  # it has been read, and may be large
    scored = -1 if body.logprobs is None else body.logprobs
    return body, Wanted(
        body,
        prompts,
        max_tokens=body.max_tokens,
        logprobs=scored,
        prompt_logprobs=scored if body.echo else -1,
        continues=True,
        deadline=ends,
        prediction=likely,
        grammar=grammar,
    )


async def _prompts(service: Service, body: CompletionBody) -> list[memoryview]:
    """Packed ids of every prompt; what can never be admitted is refused before any text is encoded."""
    prompts = await read_prompts(bytes(body.prompt))
    check_count(body.choices * len(prompts))
    for prompt in prompts:
        if isinstance(prompt, str):
            _check_text(service, prompt)
        else:
            check_fit(service, prompt.nbytes // 4, body.max_tokens)
    return [await service.prompts.text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def _check_text(service: Service, text: str) -> None:
    fewest, info = service.prompts.tokenizer.fewest_tokens(text), service.info()
    if fewest > info.context:
        raise over_context(info, f"you requested at least {fewest} tokens in the prompt", "prompt")


class CompletionDialect:
    """Choices as text."""

    name = "text_completion"
    chunk_name = "text_completion"

    def __init__(self, answer: Answer, *, echo: bool) -> None:
        self._answer = answer
        self._echo = echo
        self._with_ids = bool(answer.wanted.parameters.return_token_ids)
        self._scored = answer.wanted.logprobs >= 0
        self._plain = not (self._scored or self._with_ids)
        tokenizer = answer.service.prompts.tokenizer
        self._columns = [Columns(tokenizer, continues=not echo) for _ in answer.generations]
        self._before = [b'{"index":%d,"text":' % index for index in range(len(answer.generations))]

    def whole(self, index: int, text: str) -> dict[str, Any]:
        """A finished choice, after its prompt with `echo`."""
        generation = self._answer.generations[index]
        given = self._prompt(index) if self._echo else {"text": ""}
        made = self._details(index, 0, generation.tokens)
        if self._scored and self._echo:
            made["logprobs"] = {name: given["logprobs"][name] + column for name, column in made["logprobs"].items()}
        ids = {"prompt_token_ids": list(self._answer.prompt(index))} if self._with_ids else {}
        reason = {"finish_reason": generation.finish_reason}
        return {"index": index, "text": given["text"] + text, **made, **ids, **reason}

    def extra(self) -> dict[str, Any]:
        """Nothing: prompts belong to choices here."""
        return {}

    async def opening(self, index: int) -> bytes:
        """The prompt, if asked for."""
        if not (self._echo or self._with_ids):
            return b""
        return await asyncio.to_thread(self._opening, index)

    def piece(self, index: int, piece: Piece) -> bytes:
        """New text, and what was asked to be told about its tokens."""
        if self._plain:
            return self._before[index] + encode(piece.text) + _AFTER if piece.text else b""
        details = self._details(index, piece.start, piece.end)
        return encode({"index": index, "text": piece.text, **details, "finish_reason": None})

    def closing(self, index: int) -> bytes:
        """The finish reason."""
        reason = self._answer.generations[index].finish_reason
        return encode({"index": index, "text": "", "logprobs": None, "finish_reason": reason})

    def _opening(self, index: int) -> bytes:
        given = self._prompt(index) if self._echo else {"text": "", "logprobs": None}
        ids = {"prompt_token_ids": list(self._answer.prompt(index))} if self._with_ids else {}
        return encode({"index": index, **given, **ids, "finish_reason": None})

    def _prompt(self, index: int) -> dict[str, Any]:
        """Text of the prompt and its columns; long work for a long prompt."""
        stream = self._answer.generations[index].stream
        detokenizer = Detokenizer(self._answer.service.prompts.tokenizer)
        text = detokenizer.push(list(stream.prompt)) + detokenizer.flush()
        return {"text": text, "logprobs": self._columns[index].take(prompt_scores(stream)) if self._scored else None}

    def _details(self, index: int, start: int, end: int) -> dict[str, Any]:
        stream = self._answer.generations[index].stream
        columns = self._columns[index].take(output_scores(stream, start, end)) if self._scored else None
        ids = {"token_ids": stream.emitted[start:end].tolist()} if self._with_ids else {}
        return {"logprobs": columns, **ids}


_AFTER = b',"logprobs":null,"finish_reason":null}'

"""The request fields that chat and completions share, each number bounded by its type."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from aiohttp import web
from msgspec import Meta, Struct

from fwd.api.openai.prediction import Prediction
from fwd.errors import BadRequestError
from fwd.front.prompts import Prompts
from fwd.protocol.values import (
    MAX_CONTEXT,
    MAX_STOPS,
    MAX_TOP_LOGPROBS,
    Draft,
    Drafter,
    Limits,
    MaxDraft,
    Priority,
    Sampling,
    Seed,
    StopString,
    TokenId,
)

T = TypeVar("T")
MAX_DEADLINE_MS = 24 * 60 * 60 * 1000
Top = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
ModelName = Annotated[str, Meta(max_length=256)]


class Extension(Struct, forbid_unknown_fields=True):
    """The request extension `fwd`."""

    drafter: Drafter = "auto"
    max_draft: MaxDraft = -1
    priority: Priority = "interactive"


class StreamOptions(Struct):
    """What a stream tells besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Parameters(Struct, kw_only=True):
    """How to generate. `null` is the same as leaving out; unknown fields are ignored."""

    model: ModelName | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_CONTEXT)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_CONTEXT)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=1024)] | None = None
    seed: Seed | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOPS // 2)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    prompt_cache_key: Annotated[str, Meta(max_length=256)] | None = None
    cache_prompt: bool | None = None
    prediction: Prediction | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    fwd: Extension | None = None
    response_format: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    grammar: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    json_schema: Any = None
    prompt_logprobs: Any = None
    structured_outputs: Any = None
    thinking_token_budget: Any = None
    truncate_prompt_tokens: Any = None
    typical_p: Any = None
    use_beam_search: Any = None

    @property
    def choices(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def options(self) -> StreamOptions:
        """`stream_options`, empty when there are none."""
        return self.stream_options or StreamOptions()

    @property
    def extension(self) -> Extension:
        """The `fwd` object, all defaults when there is none."""
        return self.fwd or Extension()

    @property
    def draft(self) -> Draft:
        """The speculation wishes."""
        return Draft(drafter=self.extension.drafter, max_draft=self.extension.max_draft)

    def sampling(self, logprobs: int) -> Sampling:
        """How tokens are drawn; `logprobs` −1 is none."""
        return Sampling(
            temperature=_or(self.temperature, 1.0),
            top_k=max(0, _or(self.top_k, 0)),
            top_p=_or(self.top_p, 1.0),
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            logit_bias=self.logit_bias or {},
            logprobs=logprobs,
        )

    def limits(self, prompts: Prompts, max_tokens: int | None) -> Limits:
        """When the answer ends; raises `BadRequestError` if it would have to end before it may."""
        least = self.min_tokens or 0
        if max_tokens is not None and least > max_tokens:
            raise BadRequestError(
                f"min_tokens is {least}, more than the {max_tokens} of max_tokens", param="min_tokens"
            )
        ends = prompts.stop_ids(self.stop_token_ids or (), ignore_eos=bool(self.ignore_eos))
        return Limits(max_tokens=_or(max_tokens, -1), min_tokens=least, stop_ids=ends)


REFUSED: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            "allowed_token_ids",
            "bad_words",
            "prompt_logprobs",
            "thinking_token_budget",
            "truncate_prompt_tokens",
            "use_beam_search",
        ),
        (),
    ),
    "typical_p": (1,),
}


def refuse(body: Struct, refused: Mapping[str, Sequence[Any]]) -> None:
    """Raise `BadRequestError` for a field that would change the answer and is not supported.

    Empty values and those in the table are as good as leaving the field out; the number 0 is a value.
    """
    for name, neutral in refused.items():
        value = getattr(body, name)
        number = isinstance(value, int | float) and value is not False
        if (value or number) and value not in neutral:
            raise BadRequestError(f"{name} is not supported here: leave it out", param=name)


def deadline(request: web.Request) -> float | None:
    """When the request must be done by its header `X-Fwd-Deadline-Ms`, on the event loop's clock."""
    text = request.headers.get("X-Fwd-Deadline-Ms")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= MAX_DEADLINE_MS):
        raise BadRequestError(
            f"X-Fwd-Deadline-Ms must be a whole number of milliseconds from 1 to {MAX_DEADLINE_MS}",
            param="X-Fwd-Deadline-Ms",
        )
    return asyncio.get_running_loop().time() + int(text) / 1000


def _or(value: T | None, default: T) -> T:
    return default if value is None else value

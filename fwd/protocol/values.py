"""What messages are made of: bounds, the structs that travel inside frames, and the base of all."""

import math
from typing import Annotated, Literal

from msgspec import Meta, Struct

MAX_FRAME = 1 << 20
SPILL = 64 << 10
MAX_CONTEXT = 1 << 24
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 64
EMPTY = memoryview(b"")
Id = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Milliseconds = Annotated[float, Meta(ge=0, le=2**53)]
MaxDraft = Annotated[int, Meta(ge=-1, le=2**31)]  # what is more than a step has room for is taken as less
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
Priority = Literal["interactive", "background"]
Drafter = Literal["auto", "off", "suffix", "model", "mtp", "eagle", "dflash"]
Reason = Literal["stop", "length", "cancelled"]
CacheMiss = Literal["", "never_seen", "differs", "evicted", "window", "adapter"]


class Part(Struct, array_like=True, frozen=True):
    """Base of what travels inside frames."""


class Sampling(Part, frozen=True):
    """How a token is drawn (DESIGN §4). `top_k` 0 and `logprobs` −1 mean off; `logit_bias` is added before temperature.

    Raises `ValueError` for NaN when it is made in Python; in a frame the bounds refuse it.
    """

    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] = {}
    logprobs: Annotated[int, Meta(ge=-1, le=MAX_TOP_LOGPROBS)] = -1

    def __post_init__(self) -> None:
        values = (
            self.temperature,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
            *self.logit_bias.values(),
        )
        if any(math.isnan(value) for value in values):
            raise ValueError("a sampling value is NaN: give a number")


class Limits(Part, frozen=True):
    """When a request ends: `max_tokens` new ones, one of `stop_ids`, or `deadline_ms` after it was admitted.

    Ids in `stop_ids` are not drawn before `min_tokens`; `max_tokens` −1 means up to the end of the context.
    """

    max_tokens: Annotated[int, Meta(ge=-1, le=MAX_CONTEXT)] = -1
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_CONTEXT)] = 0
    stop_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_STOPS)] = ()
    deadline_ms: Milliseconds = 0.0


class Draft(Part, frozen=True):
    """Speculation wishes: they change the speed and never the tokens. `max_draft` −1 leaves the length to fwd."""

    drafter: Drafter = "auto"
    max_draft: MaxDraft = -1


class EngineInfo(Part, frozen=True):
    """What is loaded and how it is executed; the constant part of each receipt. `memory` is the plan: bytes by kind.

    `launches` says how the kernels of a step are launched; `kept` are bytes of tensors that were left in the files for
    drafters, by prefix of their names; `fallbacks` are lines on quantised matrices that no kernel takes as they are.
    `drafters` are those at hand, `draft_notes` what there is to say of them, `draft_hash` that of the draft weights.
    """

    architecture: str = ""
    parameters: Count = 0
    weight_bytes: Count = 0
    weights_hash: str = ""
    vocab_size: Count = 0
    context: Count = 0
    device: str = ""
    dtype: str = ""
    kernel_set: str = ""
    build: str = ""
    chunk: Count = 0
    page_size: Count = 0
    pages: Count = 0
    kv_bytes: Count = 0
    max_seqs: Count = 0
    threads: Count = 0
    load_ms: Milliseconds = 0.0
    pid: Count = 0
    kv_dtype: str = ""
    memory: dict[str, Count] = {}
    launches: str = ""
    kept: dict[str, Count] = {}
    fallbacks: tuple[str, ...] = ()
    requant: tuple[str, ...] = ()
    drafters: tuple[str, ...] = ()
    draft_notes: tuple[str, ...] = ()
    draft_hash: str = ""


class TopLogprobs(Part, frozen=True):
    """The most likely tokens of one position, best first."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


class Timing(Part, frozen=True):
    """Where the time of a request went, and what speculation and the prefix cache did for it.

    `cached_tokens` of the prompt were not computed; `cache_miss` says why it was not more (empty: it could not be), and
    `differs_at` is the index of the first token at which the prompt leaves what is cached (−1: it does not). `window`:
    what a window or a state needs there was given up. `holds[i]` counts the steps with drafts of which `i` held.
    """

    queue_ms: Milliseconds = 0.0
    prefill_ms: Milliseconds = 0.0
    decode_ms: Milliseconds = 0.0
    steps: Count = 0
    cached_tokens: Count = 0
    cache_miss: CacheMiss = ""
    drafted: dict[str, int] = {}
    accepted: dict[str, int] = {}
    joules: float | None = None
    differs_at: int = -1
    holds: list[Count] = []


class DrafterCounts(Part, frozen=True):
    """What one drafter has done since the engine's start.

    `drafts` counts proposals, `drafted` the ids in them, `accepted` those that held, `places` these by their place in
    the proposal: each has saved its request a step. `ms` is the time that drafting took.
    """

    name: str
    drafts: Count = 0
    drafted: Count = 0
    accepted: Count = 0
    places: list[Count] = []
    ms: Milliseconds = 0.0


class Prefilling(Part, frozen=True):
    """How far the prompt of a request is prefilled, in tokens."""

    id: Id
    done: Count
    total: Count


class RequestInfo(Part, frozen=True):
    """One open request as `fwd ps` shows it; `state` is waiting, prefill (of `prefilled` prompt tokens) or running.

    `commits` counts the steps that brought its output tokens: fewer than tokens where drafts held.
    """

    id: Id
    state: str
    prompt_tokens: Count
    output_tokens: Count
    age_s: float
    priority: Priority
    resumes: Count
    prefilled: Count = 0
    commits: Count = 0

"""The messages of the fwd protocol: tagged, positional, append-only, each number bounded.

Two links speak it: front ↔ engine over a socketpair, and local client ↔ front over `fwd.sock`, whose own messages are
in `fwd.protocol.local`.
Token ids travel as little-endian int32 in `memoryview` fields; the fields of a `Bulk` message that are longer than
`SPILL` bytes travel as sealed memfds beside the frame, named in order by `attached`.
"""

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from fwd.protocol.values import (
    EMPTY,
    MAX_TOP_LOGPROBS,
    SPILL,
    Count,
    Draft,
    DrafterCounts,
    EngineInfo,
    Id,
    Limits,
    Prefilling,
    Priority,
    Reason,
    Sampling,
    Seed,
    Timing,
    TokenId,
    TopLogprobs,
)

VERSION = 1


class Message(Struct, array_like=True, frozen=True):
    """Base of all frames."""


class Bulk(Message, frozen=True):
    """A message whose `memoryview` fields may travel as memfds; `attached` names those fields in descriptor order."""

    attached: Annotated[tuple[str, ...], Meta(max_length=4)] = ()


class Hello(Message, tag=1, frozen=True):
    """First frame in both directions; a foreign `version` ends the connection."""

    version: int = VERSION
    build: str = ""


class Load(Message, tag=2, frozen=True):
    """What the engine loads; sent once, after `Hello`. The fields mean what they mean in `Config`.

    `text_hash` is a hash of tokenizer and template: with the weights' it is the key of the corpus of drafts.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    context: Count = 0
    max_seqs: Annotated[int, Meta(ge=1, le=16)] = 16
    kv_dtype: str = "auto"
    kv_bytes: Count = 0
    threads: Count = 0
    state_dir: str = ""
    log_level: str = "info"
    strict: bool = False
    requant: tuple[str, ...] = ()
    draft_model: str = ""
    text_hash: str = ""
    corpus_bytes: Count = 0


class Submit(Bulk, tag=3, frozen=True):
    """One choice of one request, in token ids; from a local client `id` is its own tag, answered by `Accepted`.

    `emitted` holds tokens already given to the reader: the engine replays them and sends only what follows. What is
    prefilled stays in the prefix cache unless `cache` is false; that of the last request of a `cache_key` stays longer.
    `prediction` is what the answer will likely hold, for drafters; the answer itself joins their corpus unless `cache`
    is false. `grammar` is what it must be: `json_schema:{…}`, `regex:…` or `lark:…` (`fwd.engine.grammar`).
    """

    id: Id = 0
    prompt: memoryview = EMPTY
    emitted: memoryview = EMPTY
    sampling: Sampling = Sampling()
    limits: Limits = Limits()
    seed: Seed | None = None
    choice: Annotated[int, Meta(ge=0, le=127)] = 0
    priority: Priority = "interactive"
    adapter: Annotated[str, Meta(max_length=256)] = ""
    cache_key: Annotated[str, Meta(max_length=256)] = ""
    grammar: Annotated[str, Meta(max_length=SPILL)] = ""
    prompt_logprobs: Annotated[int, Meta(ge=-1, le=MAX_TOP_LOGPROBS)] = -1
    draft: Draft = Draft()
    cache: bool = True
    prediction: memoryview = EMPTY


class Vocabulary(Bulk, tag=6, frozen=True):
    """What the text of each token is, for grammars: sent once, before the first request that has one.

    `ends` int32 [vocab] are where the bytes of each token end in `text`; ids in `special` are not text.
    """

    text: memoryview = EMPTY
    ends: memoryview = EMPTY
    special: memoryview = EMPTY
    eos: tuple[TokenId, ...] = ()


class DropDrafts(Message, tag=7, frozen=True):
    """Forget the corpus of drafts, in memory and on disk; answered by `Dropped`."""


class Cancel(Message, tag=4, frozen=True):
    """End a request; it answers `Finished(reason="cancelled")`. Unknown and finished ids are ignored."""

    id: Id


class Ping(Message, tag=5, frozen=True):
    """Asks for `Pong`; the engine answers between two steps."""

    seq: Count


class Loading(Message, tag=16, frozen=True):
    """Progress of the load: bytes of weights read and to read, and how many a second on the average so far."""

    done: Count
    total: Count
    rate: Annotated[float, Meta(ge=0)] = 0.0


class Ready(Message, tag=17, frozen=True):
    """The model is loaded: requests are taken."""

    info: EngineInfo


class Tokens(Message, tag=18, frozen=True):
    """Committed tokens of one request. `start` is the index of the first in the output, so a gap or a double shows.

    `logprobs` (natural log, of the raw distribution) and `top` have one entry a token when they were asked for.
    """

    id: Id
    start: Count
    ids: list[TokenId]
    logprobs: list[float] = []
    top: list[TopLogprobs] = []


class PromptLogprobs(Message, tag=19, frozen=True):
    """Log-probabilities of prompt tokens `start`, `start + 1`, …; the token at index 0 has none and is never sent."""

    id: Id
    start: Count
    logprobs: list[float]
    top: list[TopLogprobs] = []


class Finished(Message, tag=20, frozen=True):
    """The request ended well. `stop_id` is the token that stopped it, −1 when none did; it is among the tokens sent."""

    id: Id
    reason: Reason
    stop_id: int = -1
    timing: Timing = Timing()


class Failed(Message, tag=21, frozen=True):
    """A request (or, with id 0, the whole link or engine) ended by an error; `code` is a wire code of `fwd.errors`.

    `tag` is set for a local client's request that was refused before it was given an id.
    """

    code: str
    message: str
    id: Id = 0
    param: str | None = None
    tag: Id | None = None


class Pong(Message, tag=22, frozen=True):
    """The engine's heartbeat: `steps` counts decode steps and prefill chunks since its start, so health is progress.

    `pages_free` are those that nobody holds, `pages_cached` those that only the prefix cache holds. `computed` counts
    the tokens prefilled and decoded since its start; `prefilling` are the requests whose prompt is being read.
    `host_us` is the mean time from reading a step to having launched the next; 0 where launches compute at once.
    """

    seq: Count
    steps: Count = 0
    running: Count = 0
    waiting: Count = 0
    pages_free: Count = 0
    pages_total: Count = 0
    pages_cached: Count = 0
    computed: Count = 0
    prefilling: list[Prefilling] = []
    host_us: Annotated[float, Meta(ge=0)] = 0.0
    drafters: list[DrafterCounts] = []
    corpus_tokens: Count = 0


class Dropped(Message, tag=23, frozen=True):
    """The corpus of drafts is forgotten: it held so many tokens. `error`: what is on disk is not, and why."""

    tokens: Count = 0
    error: str = ""


ToEngine = Hello | Load | Submit | Cancel | Ping | Vocabulary | DropDrafts
FromEngine = Hello | Loading | Ready | Tokens | PromptLogprobs | Finished | Failed | Pong | Dropped
encoder = msgspec.msgpack.Encoder()
to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)

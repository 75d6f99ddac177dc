"""The messages of `fwd.sock` alone: requests in text and what comes back, and what the admin verbs ask for."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fwd.protocol.messages import (
    Bulk,
    Cancel,
    DropDrafts,
    Dropped,
    Failed,
    Finished,
    Hello,
    Message,
    PromptLogprobs,
    Submit,
    Tokens,
)
from fwd.protocol.values import (
    EMPTY,
    Count,
    Draft,
    DrafterCounts,
    EngineInfo,
    Id,
    Limits,
    Priority,
    RequestInfo,
    Sampling,
    Seed,
    StopString,
)


class Prompt(Bulk, tag=32, frozen=True):
    """A request in text from a local client: `body` is UTF-8 text, or for `chat` JSON `{"messages": […], …}`.

    Answered by `Accepted`, `Text`… and `Finished` or `Failed`; `id` is the client's own tag. `stops` end the text;
    `prediction` is UTF-8 text that the answer will likely hold.
    """

    id: Id = 0
    kind: Literal["text", "chat"] = "text"
    body: memoryview = EMPTY
    sampling: Sampling = Sampling()
    limits: Limits = Limits()
    seed: Seed | None = None
    stops: Annotated[tuple[StopString, ...], Meta(max_length=16)] = ()
    ignore_eos: bool = False
    priority: Priority = "interactive"
    draft: Draft = Draft()
    cache_key: Annotated[str, Meta(max_length=256)] = ""
    cache: bool = True
    prediction: memoryview = EMPTY


class StatusQuery(Message, tag=33, frozen=True):
    """Asks for `Status`."""


class RequestsQuery(Message, tag=34, frozen=True):
    """Asks for `Requests`."""


class Stop(Message, tag=35, frozen=True):
    """Asks the daemon to stop; answered by `Done` before it does."""


class Accepted(Message, tag=48, frozen=True):
    """The request with the client's `tag` runs under `id`; `seed` is the one in use.

    `notes` say what was taken as less than was asked, where that changes no token.
    """

    tag: Id
    id: Id
    seed: Seed
    prompt_tokens: Count
    notes: tuple[str, ...] = ()


class Text(Message, tag=49, frozen=True):
    """The next piece of an answer in text; `tokens` counts the new tokens it accounts for."""

    id: Id
    text: str
    tokens: Count = 0


class Status(Message, tag=50, frozen=True):
    """The daemon in one look. `state` is one of starting, loading, ready, restarting, failed, stopping."""

    state: str
    reason: str
    name: str
    version: str
    pid: Count
    uptime_s: float
    listening: tuple[str, ...]
    model: str
    engine: EngineInfo | None
    load_done: Count
    load_total: Count
    running: Count
    waiting: Count
    pages_free: Count
    pages_total: Count
    restarts: Count
    requests: Count
    tokens_out: Count
    pages_cached: Count = 0
    queue_tokens: Count = 0
    queue_limit: Count = 0
    host_us: Annotated[float, Meta(ge=0)] = 0.0
    load_rate: Annotated[float, Meta(ge=0)] = 0.0  # bytes a second
    drafters: list[DrafterCounts] = []  # noqa: RUF012  # msgspec copies it
    corpus_tokens: Count = 0


class Requests(Message, tag=51, frozen=True):
    """The open requests, oldest first."""

    requests: list[RequestInfo]


class Done(Message, tag=52, frozen=True):
    """The admin request was carried out."""


ToDaemon = Hello | Submit | Prompt | Cancel | StatusQuery | RequestsQuery | Stop | DropDrafts
FromDaemon = Hello | Accepted | Tokens | PromptLogprobs | Text | Finished | Failed | Status | Requests | Done | Dropped
to_daemon: msgspec.msgpack.Decoder[ToDaemon] = msgspec.msgpack.Decoder(ToDaemon)
from_daemon: msgspec.msgpack.Decoder[FromDaemon] = msgspec.msgpack.Decoder(FromDaemon)

"""The one structure that scheduler, pages, step and sampler share."""

from itertools import count
from typing import Literal, NamedTuple

from fwd.protocol.ids import unpack_ids
from fwd.protocol.messages import Submit, TopLogprobs

Phase = Literal["prefill", "decode"]


_versions = count(1)


class Drawn(NamedTuple):
    """One drawn token or scored prompt token; `logprob` is of the raw distribution, `top` is best first.

    `finite` is False if the row's logits held NaN or infinity.
    """

    id: int
    logprob: float
    top: TopLogprobs
    finite: bool


class Request:
    """A sequence on its way through the model.

    Four lengths, in tokens: `computed` (KV committed) ≤ `length` (known ids) ≤ `limit`, and `prompt` ≤ `length`, the
    border between what is prefilled and what goes through the decode path. Known ids beyond `computed` are replayed
    after a resume or a preemption; in steady decode there is exactly one. `pages` is the block table, and
    `pages_version` names its content.
    """

    def __init__(self, submit: Submit) -> None:
        self.id = submit.id
        self.submit = submit
        self.ids = [*unpack_ids(submit.prompt), *unpack_ids(submit.emitted)]
        self.prompt = len(self.ids) - len(submit.emitted) // 4
        self.limit = max(self.prompt + submit.limits.max_tokens, self.length)
        self.computed = 0
        self.pages: list[int] = []
        self.pages_version = next(_versions)
        self.stop_ids = frozenset(submit.limits.stop_ids)
        self.clock = Clock()
        self.check()

    @property
    def length(self) -> int:
        """Known ids: prompt and output."""
        return len(self.ids)

    @property
    def phase(self) -> Phase:
        """Prompt tokens are prefilled on the chunk grid, output tokens go through the decode path."""
        return "prefill" if self.computed < self.prompt else "decode"

    @property
    def background(self) -> bool:
        """Yields to interactive requests."""
        return self.submit.priority == "background"

    @property
    def pending(self) -> int:
        """Decode rows until the next token can be drawn."""
        return self.length - self.computed

    @property
    def output(self) -> int:
        """Tokens drawn so far, replayed ones included."""
        return self.length - self.prompt

    def new_pages(self) -> None:
        """The block table changed: a number that no table had before says so."""
        self.pages_version = next(_versions)

    def advance(self, computed: int) -> None:
        """KV is committed up to position `computed`."""
        self.computed = computed
        self.check()

    def append(self, ids: list[int]) -> None:
        """Commit drawn tokens."""
        self.ids += ids
        self.check()

    def restart(self) -> None:
        """Forget the KV: everything is prefilled and replayed again."""
        self.computed = 0
        self.check()

    def check(self) -> None:
        """Assert the order of the lengths."""
        assert 0 <= self.computed <= self.length <= self.limit, (self.id, self.computed, self.length, self.limit)
        assert 0 < self.prompt <= self.length, (self.id, self.prompt, self.length)


class Clock:
    """Monotonic seconds at which a request arrived, was first run and finished its prompt; and its steps."""

    def __init__(self) -> None:
        self.arrived = 0.0
        self.started: float | None = None
        self.prefilled: float | None = None
        self.steps = 0

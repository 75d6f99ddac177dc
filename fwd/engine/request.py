"""The one structure that scheduler, pages, step and sampler share."""

from array import array
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal, NamedTuple

from fwd.errors import BadFrameError
from fwd.protocol.messages import Submit
from fwd.protocol.values import CacheMiss, TopLogprobs

if TYPE_CHECKING:
    from fwd.engine.grammar import Matcher
    from fwd.engine.pages import BlockTable
    from fwd.engine.prefix import Node

Phase = Literal["prefill", "decode"]


class Drawn(NamedTuple):
    """One drawn token or scored prompt token; `logprob` is of the raw distribution, `top` is best first.

    `finite` is False if the row's logits held NaN or infinity.
    """

    id: int
    logprob: float
    top: TopLogprobs
    finite: bool


class Prefilled(NamedTuple):
    """What a prefill chunk gave: tokens drawn from its last row, scores of the prompt tokens that follow its rows.

    `finite` is False if a row held NaN or infinity, which must then not reach the prefix tree.
    """

    drawn: Sequence[Drawn]
    scores: Sequence[Drawn]
    finite: bool


class Request:
    """A sequence on its way through the model; `ids` are those of `submit` unless they are there already.

    Four lengths, in tokens: `computed` (KV committed) ≤ `length` (known ids) ≤ `limit`, and `prompt` ≤ `length`, the
    border between what is prefilled and what goes through the decode path. Known ids beyond `computed` are replayed
    after a resume or a preemption; in steady decode there is exactly one.

    While it is `placed` it holds `tables`, a block table per paged group, and `record`, its recurrent state (−1:
    empty); `staged` are records that the rows of the next launch write. `node` is where its first `published` pages end
    in the prefix tree; `fresh_at` is the version of the tree that was looked at, −1 once it computes. `cached` tokens
    were found there before it had `begun` (−1: never placed), and `miss` and `differs_at` say why not more. One that
    was refused `needs` so many pages to be available.
    `displaced` counts how often it gave all that back; what is kept of its cells elsewhere holds for one such count.
    What its `grammar` lets it draw next is known only when its ids are: it is never run ahead.
    A request with a `leader` waits for that one to prefill the prompt they share. `drafted` and `accepted` count ids
    by the drafter that proposed them, `holds` the steps with drafts by how many of these held.
    """

    def __init__(self, submit: Submit, ids: "array[int] | None" = None) -> None:
        self.id = submit.id
        self.submit = submit
        self.ids = _ids(submit.prompt, submit.emitted) if ids is None else ids
        self.prompt = len(self.ids) - len(submit.emitted) // 4
        self.limit = max(self.prompt + submit.limits.max_tokens, self.length)
        self.stop_ids = frozenset(submit.limits.stop_ids)
        self.clock = Clock()
        self.drafted: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.holds: Counter[int] = Counter()
        self.history = History()
        self.leader: Request | None = None
        self.grammar: Matcher | None = None
        self.begun = False
        self.cached = -1
        self.miss: CacheMiss = ""
        self.differs_at = -1
        self.displaced = 0
        self.displace()

    def count(self, drafter: str, drafts: int, held: int) -> None:
        """A step had so many drafts of a drafter, of which so many held."""
        self.drafted[drafter] += drafts
        self.accepted[drafter] += held
        self.holds[held] += 1

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

    @property
    def room(self) -> int:
        """How many ids may be drafted after the known ones.

        What follows the last of them must be within the limit, and stop ids are banned for all rows of a step or none.
        """
        left = self.limit - self.length - 1
        banned = self.submit.limits.min_tokens - self.output
        return min(left, banned - 1) if banned > 0 else left

    @cached_property
    def prefill_key(self) -> tuple[bytes, str, int, bool]:
        """Requests with the same key need the same prefill."""
        submit = self.submit
        return blake2b(submit.prompt, digest_size=16).digest(), submit.adapter, submit.prompt_logprobs, submit.cache

    def found(self, tokens: int, miss: CacheMiss, differs_at: int) -> None:
        """Note what the prefix cache held; what is found again after a preemption does not count."""
        if not self.begun:
            self.cached, self.miss, self.differs_at = tokens, miss, differs_at

    def advance(self, computed: int) -> None:
        """KV is committed up to position `computed`."""
        self.computed = computed
        self.check()

    def append(self, ids: Sequence[int]) -> None:
        """Commit drawn tokens."""
        self.ids.extend(ids)
        self.check()

    def displace(self) -> None:
        """Forget the KV and where it was: everything is prefilled and replayed again."""
        self.displaced += 1
        self.placed = False
        self.tables: tuple[BlockTable, ...] = ()
        self.record = -1
        self.staged: list[int] = []
        self.node: Node | None = None
        self.published = 0
        self.fresh_at = -1
        self.needs = 0
        self.computed = 0
        self.check()

    def check(self) -> None:
        """Assert the order of the lengths."""
        assert 0 <= self.computed <= self.length <= self.limit, (self.id, self.computed, self.length, self.limit)
        assert 0 < self.prompt <= self.length, (self.id, self.prompt, self.length)


class History:
    """The ids a request has seen and how often it made them, counted as they come: what penalties are about."""

    def __init__(self) -> None:
        self._read = 0
        self._seen: set[int] = set()
        self._counts: Counter[int] = Counter()

    def read(self, ids: Sequence[int], prompt: int) -> tuple[set[int], Counter[int]]:
        """Return the ids in prompt or output, and the count of each id in the output; `ids` only grow."""
        self._seen.update(ids[self._read :])
        self._counts.update(ids[max(self._read, prompt) :])
        self._read = len(ids)
        return self._seen, self._counts


class Clock:
    """Monotonic seconds at which a request arrived, was first run and finished its prompt; and its steps."""

    def __init__(self) -> None:
        self.arrived = 0.0
        self.started: float | None = None
        self.prefilled: float | None = None
        self.steps = 0


def _ids(*views: memoryview) -> "array[int]":
    """The ids of packed views, joined; raises `BadFrameError` if one is not whole int32s."""
    ids = array("i")
    for view in views:
        if view.nbytes % 4:
            raise BadFrameError(f"{view.nbytes} bytes are no whole number of int32 token ids")
        ids.frombytes(view)
    return ids

"""What runs next: one prefill chunk, or one decode step of up to `MAX_ROWS` rows."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from fwd.engine.request import Request
from fwd.engine.space import Space
from fwd.engine.speculate.drafter import NOTHING, Off, Proposal, Speculator, Wish
from fwd.kernels.sizes import MAX_ROWS
from fwd.protocol.values import EMPTY, Limits

BUCKETS = (1, 2, 4, 8, MAX_ROWS)  # rows that a step is run with: it is padded to the next
REFILL_TOKENS = 1 << 20  # of ended answers that wait to be prefilled once more


class Chunk(NamedTuple):
    """Prefill positions [start, end) of the prompt, which lie in chunk `number` of the grid.

    `followers` wait for the same prompt and are given what the request computes.
    """

    request: Request
    number: int
    start: int
    end: int
    followers: tuple[Request, ...] = ()

    @property
    def drawing(self) -> list[Request]:
        """Those whose first output token is drawn from the last row."""
        if self.end < self.request.prompt:
            return []
        return [each for each in (self.request, *self.followers) if each.prompt == each.length < each.limit]


class Span(NamedTuple):
    """Decode rows for the ids [start, end) of a request; a token is drawn if that is all of them.

    A span that runs ahead is one row, for the id that the step before it draws. Rows for drafts follow; each draws.
    """

    request: Request
    start: int
    end: int
    proposal: Proposal = NOTHING

    @property
    def draws(self) -> bool:
        """The row of the last known id draws the next token."""
        return self.end >= self.request.length

    @property
    def drafts(self) -> tuple[int, ...]:
        """Ids that may stand at `end` and after it."""
        return self.proposal.ids

    @property
    def reach(self) -> int:
        """The position after that of the last row."""
        return self.end + len(self.drafts)


class Scheduler:
    """First come, first served, interactive before background; prefill chunks between decode steps.

    A running stream waits for at most one chunk. Requests with the same prompt share one prefill. When pages run out
    the youngest request of the lowest class is preempted, and a background request makes room for an interactive one:
    it gives its pages back and is prefilled and replayed later, so its reader sees a pause only. While nothing else is
    to be done, finished answers are prefilled on the chunk grid, for the next turn to find them in the prefix tree.
    """

    def __init__(self, space: Space, max_seqs: int, chunk: int, speculator: Speculator | None = None) -> None:
        assert max_seqs <= MAX_ROWS
        self._speculator = speculator or Off()
        self._space = space
        self._max_seqs = max_seqs
        self._chunk = chunk
        self._waiting: tuple[deque[Request], deque[Request]] = (deque(), deque())
        self._running: list[Request] = []
        self._refills: deque[Request] = deque()
        self._chunk_last = False
        self._changed = False  # since `next` saw who waits: those it refused may be placed now

    @property
    def running(self) -> int:
        """Requests that hold pages, or wait for one that prefills their prompt."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that hold none."""
        return sum(map(len, self._waiting))

    @property
    def prefilling(self) -> Iterable[Request]:
        """Running requests whose prompt is not computed yet."""
        return (request for request in self._running if request.phase == "prefill")

    def __bool__(self) -> bool:
        return bool(self._running or any(self._waiting) or self._refills)

    def add(self, request: Request) -> None:
        """Queue a request; what it continues it reads itself."""
        self._changed = True
        self._stop_refill()
        if session := request.submit.cache_key:
            self._keep_refills(lambda refill: refill.submit.cache_key != session)
        self._waiting[request.background].append(request)

    def remove(self, request: Request) -> None:
        """Take a request out, whatever its state, and free what it holds."""
        self._changed = True
        if request in self._running:
            self._displace(request)
        elif request in self._refills:
            self._stop_refill()
            self._keep_refills(lambda refill: refill is not request)
        else:
            self._waiting[request.background].remove(request)

    def retain(self, request: Request) -> None:
        """Remember an ended answer that a next turn can use: it is prefilled when nothing else is to be done."""
        grain = self._space.grain
        if request.submit.cache and request.length // grain > request.prompt // grain:
            submit = replace(request.submit, id=0, prompt=EMPTY, emitted=EMPTY, prompt_logprobs=-1)
            self._refills.append(Request(replace(submit, limits=Limits(max_tokens=0)), request.ids))
            while len(self._refills) > 1 and sum(refill.prompt for refill in self._refills) > REFILL_TOKENS:
                self._refills.popleft()

    def next(self) -> Chunk | list[Span]:
        """The next work; an empty list when there is none."""
        self._changed = False
        self._admit()
        if not self._running:
            return self._refill() or []
        chunk = None if self._chunk_last else self._prefill()
        if chunk is None:
            self._chunk_last = False
            if spans := self._spans():
                return spans
            chunk = self._prefill()
        self._chunk_last = chunk is not None
        return chunk or []

    def follow(self, spans: Sequence[Span]) -> list[Span]:
        """The step after `spans`, to be launched before their tokens are known; empty if it must wait for them.

        It waits for whoever may be placed now, for chunks, replays, drafts and grammars, and where it would preempt. A
        request that reaches its limit in `spans` is left out; one that ends there for another reason has a row in vain.
        """
        if (self._changed and any(self._waiting)) or any(self.prefilling) or not all(span.draws for span in spans):
            return []
        going_on = [span.request for span in spans if span.request in self._running]
        if any(each.grammar for each in going_on) or any(span.drafts for span in spans):
            return []
        if any(map(self._speculator.drafts, going_on)):
            return []
        ahead = [Span(each, each.length, each.length + 1) for each in going_on if each.length + 1 < each.limit]
        return ahead if all(self._space.prepare(span.request, span.end) for span in ahead) else []

    def _admit(self) -> None:
        for queue in self._waiting:
            while queue:
                request = queue[0]
                if not self._place(request):
                    return
                queue.remove(request)
                self._running.append(request)

    def _place(self, request: Request) -> bool:
        """Give a waiting request what it needs to run, at the cost of background work where it may."""
        while not self._try_place(request):
            victims = [] if request.background else [each for each in self._running if each.background]
            if not victims or not self._space.could_place(request, victims):
                return False
            self._preempt(_youngest(victims))
        return True

    def _try_place(self, request: Request) -> bool:
        if len(self._running) >= self._max_seqs or self._space.main.available < request.needs:
            return False
        request.leader = next((each for each in self._running if _leads(each, request)), None)
        return bool(request.leader) or self._space.admit(request, min(request.length + 1, request.limit))

    def _prefill(self) -> Chunk | None:
        """A chunk of the oldest prompt of the highest class."""
        while leaders := [request for request in self.prefilling if request.leader is None]:
            request = min(leaders, key=lambda request: request.background)
            self._space.refresh(request)
            if self._secure(request, self._end(request)):
                return self._chunk_of(request, tuple(each for each in self._running if each.leader is request))
        return None

    def _refill(self) -> Chunk | None:
        """A chunk of an answer that ended, while there are such and pages for them."""
        while self._refills:
            request = self._refills[0]
            if request.placed or self._space.admit(request, request.prompt):
                done = request.computed // self._space.grain == request.prompt // self._space.grain
                if not done and self._space.prepare(request, self._end(request)):
                    return self._chunk_of(request)
                self._space.pin(request)
                self._space.release(request)
            self._refills.popleft()
        return None

    def _stop_refill(self) -> None:
        """What it has published stays; the rest is done another time."""
        if self._refills and self._refills[0].placed:
            self._space.release(self._refills[0])

    def _keep_refills(self, wanted: Callable[[Request], bool]) -> None:
        self._refills = deque(filter(wanted, self._refills))

    def _end(self, request: Request) -> int:
        """Where the chunk ends that the request computes next."""
        return min((request.computed // self._chunk + 1) * self._chunk, request.prompt)

    def _chunk_of(self, request: Request, followers: tuple[Request, ...] = ()) -> Chunk:
        return Chunk(request, request.computed // self._chunk, request.computed, self._end(request), followers)

    def _spans(self) -> list[Span]:
        """One row for everyone who decodes, the rest for whoever has ids to replay, oldest first, then for drafts."""
        deciding = [request for request in self._running if request.phase == "decode"]
        spare = MAX_ROWS - len(deciding)
        spans: list[Span] = []
        for request in deciding:
            rows = min(request.pending, 1 + spare)
            spare -= rows - 1
            spans.append(Span(request, request.computed, request.computed + rows))
        secured = [span for span in spans if self._secure(span.request, span.end)]
        return self._drafted([span for span in secured if span.request.placed])

    def _drafted(self, spans: list[Span]) -> list[Span]:
        """The spans, those with drafts that have nothing to replay; nobody is preempted for a guess."""
        rows = sum(span.end - span.start for span in spans)
        drafting = [
            span.request for span in spans if span.request.pending == 1 and self._speculator.drafts(span.request)
        ]
        most = [self._space.spare(request, min(MAX_ROWS - rows, request.room)) for request in drafting]
        wishes = [Wish(request, count) for request, count in zip(drafting, most, strict=True) if count]
        proposals = self._speculator.propose(wishes, rows) if wishes else ()
        found = {wish.request.id: proposal for wish, proposal in zip(wishes, proposals, strict=True)}
        return [self._prepared(span._replace(proposal=found.get(span.request.id, NOTHING))) for span in spans]

    def _prepared(self, span: Span) -> Span:
        """The span without the drafts that its grammar forbids, and without any where records lack for them."""
        if span.draws and (grammar := span.request.grammar):
            span = _cut(span, grammar.prepare(span.drafts))
        if span.drafts and not self._space.prepare(span.request, span.reach):
            return span._replace(proposal=NOTHING)
        return span

    def _secure(self, request: Request, end: int) -> bool:
        """Make ready to compute up to `end`, preempting whom it must; False if that was the request itself."""
        while request.placed and not self._space.prepare(request, end):
            if not self._take_back():
                self._preempt(_youngest(self._running))
        return request.placed

    def _take_back(self) -> bool:
        """Give back the pages that a running request has for drafts; False if none has."""
        return any(self._space.rollback(each) for each in self._running if each.placed)

    def _preempt(self, request: Request) -> None:
        self._displace(request)
        self._waiting[request.background].appendleft(request)

    def _displace(self, request: Request) -> None:
        """Take a request out of those that run; who waited for its prefill goes back to the queue."""
        self._running.remove(request)
        if request.placed:
            self._space.release(request)
        for follower in [each for each in reversed(self._running) if each.leader is request]:
            self._running.remove(follower)
            follower.leader = None
            self._waiting[follower.background].appendleft(follower)
        request.leader = None


def _cut(span: Span, count: int) -> Span:
    """The span with so many of its drafts."""
    return span._replace(proposal=span.proposal._replace(ids=span.drafts[:count]) if count else NOTHING)


def _youngest(requests: Iterable[Request]) -> Request:
    """Who gives way first."""
    return max(requests, key=lambda request: (request.background, request.clock.arrived))


def _leads(leader: Request, request: Request) -> bool:
    """`leader` prefills the prompt of `request`, and none of its scores are sent yet if they are wanted."""
    if leader.leader or leader.phase == "decode" or leader.background > request.background:
        return False
    if leader.prefill_key != request.prefill_key:
        return False
    return request.submit.prompt_logprobs < 0 or leader.computed == 0

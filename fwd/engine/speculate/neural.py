"""Drafters that are models: which positions of each request their cells hold, and what they foresee.

A row stands for a position, in the very cell that the target keeps of it; so prefix hits, forks, copies on write and
preemption take it along, and a cell that was rolled back is just written again. Rows of a prompt are absorbed chunk by
chunk, those of an answer once a pass is full of them or when drafts are wanted. One thing is not exact: where features
are read, a row also has the id after its own, so the last cell of a shared page is that of who wrote it last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fwd.engine.device_runner import device_errors
from fwd.engine.pages import Copy
from fwd.engine.plan import Plan
from fwd.engine.request import Request
from fwd.engine.runner import Committed
from fwd.engine.scheduler import Chunk, Span
from fwd.engine.speculate.drafter import NOTHING, Proposal, Wish
from fwd.engine.speculate.items import KEPT
from fwd.engine.speculate.passes import Passes, Row
from fwd.kernels.rows import Rows
from fwd.kernels.sizes import MAX_ROWS
from fwd.models.draft.model import DraftModel
from fwd.models.draft.spec import DraftSpec


@dataclass(slots=True)
class _State:
    """What is known of a request, which holds while it was not `displaced` again."""

    request: Request
    displaced: int
    line: int
    absorbed: int  # rows of the positions before it are in their cells
    kept: int  # features of the positions before it have been there
    guess: Sequence[int] = ()  # drafts whose rows stand at `absorbed` and after it

    @property
    def current(self) -> bool:
        return self.displaced == self.request.displaced


class Neural:
    """The `Costly` drafter of a draft model, and the `Follower` of the runner whose cells it shares."""

    def __init__(self, model: DraftModel, plan: Plan, ready: Callable[[], None] = lambda: None) -> None:
        """Have `ready` make copies of pages that a launch would, before drafts are written to them."""
        self._ready = ready
        self._spec = spec = model.spec
        self.name: str = spec.kind
        self.weights_hash = model.weights_hash
        self._passes = Passes(model, plan)
        self._chunk, self._context = plan.chunk, min(plan.context, spec.context)
        self._states: dict[int, _State] = {}
        self._lines = list(range(plan.max_seqs))
        self._read: list[int] = []

    def propose(self, wishes: Sequence[Wish]) -> list[Proposal]:
        """Return what the model foresees for each request; nothing where it does not know all of what was committed."""
        self._ready()
        asked = {wish.request.id: self._most(wish) for wish in wishes}
        states = [self._states[key] for key, most in asked.items() if most > 0]
        states.sort(key=lambda state: -asked[state.request.id])
        draw = self._blocks if self._spec.kind == "dflash" else self._chains
        with device_errors():
            drawn = draw(states, [asked[state.request.id] for state in states]) if states else []
        found = {state.request.id: Proposal(self.name, tuple(ids)) for state, ids in zip(states, drawn, strict=True)}
        return [found.get(wish.request.id, NOTHING) for wish in wishes]

    def end(self, request: Request) -> None:
        """Forget a request that has ended, or is not to be read along any more."""
        state = self._states.get(request.id)
        if state and state.request is request:
            self._forget(state)

    def read(self) -> list[int]:
        """Take the ids of requests that have had a pass to read along, once for each."""
        read, self._read = self._read, []
        return read

    def rehearse(self, rows: Rows, features: Tensor | None) -> None:
        """Run a chunk before any request comes."""
        self._passes.chunk([0] * self._chunk, rows, features)

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy pages as the target does."""
        self._passes.copy(copies)

    def prefilled(self, chunk: Chunk, rows: Rows, features: Tensor | None) -> None:
        """Absorb a chunk; where it ends a prompt, who goes on from there is known from now on."""
        if chunk.end > self._context:
            return
        request, before = chunk.request, chunk.start - chunk.number * self._chunk
        ids = request.ids[chunk.start + self._spec.shift : chunk.end + self._spec.shift]
        ids.extend(request.ids[-1:] * (chunk.end - chunk.start - len(ids)))  # the next id is not drawn yet
        behind = self._chunk - before - len(ids)
        self._passes.chunk([0] * before + ids.tolist() + [0] * behind, rows, features)
        if chunk.end == request.prompt:
            last = before + len(ids) - 1
            for each in (request, *chunk.followers):
                self._begin(each, None if features is None else features[last : last + 1])

    def launching(self, spans: Sequence[Span]) -> None:
        """Absorb what fills a pass, before it is too much to be kept."""
        for span in spans if self._states else ():
            if (state := self._state(span.request)) and (
                end := self._end(state, span.end)
            ) - state.absorbed >= MAX_ROWS:
                self._passes.absorb(self._rows(state, state.absorbed, end))
                state.absorbed = end
                self._read.append(span.request.id)

    def collected(self, spans: Sequence[Span], committed: Committed, features: Tensor | None) -> None:
        """Keep the features of the rows that stay."""
        if features is None or not self._states:
            return
        drawn, row = iter(committed), 0
        for span in spans:
            tokens = next(drawn) if span.draws else ()
            count = span.end - span.start + max(0, sum(token.finite for token in tokens) - 1)
            if state := self._state(span.request):
                self._keep(state, span.start, features[row : row + count])
            row += span.reach - span.start

    def _begin(self, request: Request, feature: Tensor | None) -> None:
        wish = request.submit.draft
        if request.length == request.limit or wish.drafter not in {"auto", self.name} or not wish.max_draft:
            return  # it ends here, or never asks
        before = self._states.pop(request.id, None)
        line = before.line if before else self._free_line()
        absorbed = request.prompt - waits(self._spec)
        self._states[request.id] = _State(request, request.displaced, line, absorbed, request.prompt)
        if feature is not None:
            self._passes.keep(line, request.prompt - 1, feature)

    def _free_line(self) -> int:
        if not self._lines:
            for state in [each for each in self._states.values() if not each.current]:
                self._forget(state)
        return self._lines.pop()

    def _forget(self, state: _State) -> None:
        del self._states[state.request.id]
        self._lines.append(state.line)

    def _state(self, request: Request) -> _State | None:
        """What is known of a request; rows of drafts that held are absorbed."""
        state = self._states.get(request.id)
        if state is None or state.request is not request or not state.current:
            return None
        if state.guess and request.length > state.absorbed:
            known = request.ids[state.absorbed : request.length - 1]
            state.absorbed += _common(state.guess, known)
            state.guess = ()
        return state

    def _end(self, state: _State, reach: int) -> int:
        """The position after that of the last row that can be absorbed; cells before `reach` are the request's."""
        request = state.request
        return min(state.kept, request.length - 1) if self._spec.taps else min(reach, request.length, self._context)

    def _most(self, wish: Wish) -> int:
        """How many ids can be drafted for a request."""
        request, most = wish
        state = self._state(request)
        if state is None or (self._spec.taps and state.kept < request.length - 1):
            return 0
        block = self._spec.block if self._spec.kind == "dflash" else MAX_ROWS
        return min(most, block - 1, self._context - request.length)

    def _keep(self, state: _State, position: int, features: Tensor) -> None:
        end = position + len(features)
        if position != state.kept or end > self._context:
            self._forget(state)
            return
        assert end - state.absorbed <= KEPT, (state.absorbed, end)
        state.kept = end
        self._passes.keep(state.line, position, features)

    def _chains(self, states: Sequence[_State], counts: Sequence[int]) -> list[list[int]]:
        """Draft id by id; each request has a row at least, the others that do not fit are absorbed before."""
        ends = [state.request.length - self._spec.shift for state in states]
        rows = [self._rows(state, min(state.absorbed, end - 1), end) for state, end in zip(states, ends, strict=True)]
        self._passes.absorb(_beyond(rows))
        drawn = self._passes.chains([row for each in rows for row in each], counts)
        for state, end, ids in zip(states, ends, drawn, strict=True):
            state.absorbed, state.guess = end, () if self._spec.taps else ids[:-1]
        return drawn

    def _blocks(self, states: Sequence[_State], counts: Sequence[int]) -> list[list[int]]:
        """Draft block by block, as many at once as a pass holds."""
        ends = [state.request.length - 1 for state in states]
        known = [self._rows(state, state.absorbed, end) for state, end in zip(states, ends, strict=True)]
        self._passes.absorb([row for rows in known for row in rows])
        packs: list[list[Row]] = [[]]
        for state, end, count in zip(states, ends, counts, strict=True):
            state.absorbed = end
            if len(packs[-1]) + count + 1 > MAX_ROWS:
                packs.append([])
            packs[-1] += self._block(state, count)
        return [ids for pack in packs for ids in self._passes.blocks(pack)]

    def _rows(self, state: _State, start: int, end: int) -> list[Row]:
        """Rows of the known ids of positions from `start` on, before `end`."""
        request, shift = state.request, self._spec.shift
        return [Row(state.line, request, place, request.ids[place + shift]) for place in range(start, end)]

    def _block(self, state: _State, count: int) -> list[Row]:
        """The rows of the last known id and of so many masks."""
        request, anchor = state.request, state.request.length - 1
        ids = [request.ids[anchor], *[self._spec.mask] * count]
        return [Row(state.line, request, place, id_, anchor + count) for place, id_ in enumerate(ids, anchor)]


def waits(spec: DraftSpec) -> bool:
    """Whether a row has the id after its position: the last row of a prompt waits for what is drawn there."""
    return spec.shift == 1 and spec.kind != "dflash"


def _beyond(rows: Sequence[list[Row]]) -> list[Row]:
    """Take out the first rows of those that do not fit in a pass; the last of each stays."""
    excess, taken = sum(map(len, rows)) - MAX_ROWS, list[Row]()
    for each in rows:
        cut = max(0, min(excess - len(taken), len(each) - 1))
        taken += each[:cut]
        del each[:cut]
    return taken


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids two texts have in common at their beginning."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(left), len(right)))

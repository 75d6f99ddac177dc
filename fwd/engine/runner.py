"""Executes scheduled work with a loaded model: fill the step, run the model, draw."""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fwd.engine.pages import Copy
from fwd.engine.plan import Plan
from fwd.engine.request import Drawn, Prefilled
from fwd.engine.sampler import draw, drawn, mask_of
from fwd.engine.scheduler import Chunk, Span
from fwd.engine.speculate.verify import verified
from fwd.engine.step import Step, new_tables
from fwd.kernels.ops import Draw
from fwd.kernels.rows import Rows
from fwd.kernels.sizes import MAX_ROWS
from fwd.models.model import Model
from fwd.models.taps import Taps

Committed = Sequence[Sequence[Drawn]]  # of a step: what each span that draws commits, in their order


class Follower(Protocol):
    """What reads along: it sees each launch in its order, and the target's features of its rows.

    `features` [rows, …] are those of the launch's rows, None where the plan's drafter wants none.
    """

    def rehearse(self, rows: Rows, features: Tensor | None) -> None:
        """Run a chunk of one row, before any request comes, for libraries to choose their products."""

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy the same pages as the target, in order, before what is launched next."""

    def prefilled(self, chunk: Chunk, rows: Rows, features: Tensor | None) -> None:
        """A chunk was launched, all rows of which came out finite."""

    def launching(self, spans: Sequence[Span]) -> None:
        """A decode step comes next: all its requests are placed, and copies are made."""

    def collected(self, spans: Sequence[Span], committed: Committed, features: Tensor | None) -> None:
        """A decode step was read; its features are there until two more are launched."""


class Prefiller:
    """Owns the cache and the step of one prefill chunk, which is waited for; all of the plan's sizes."""

    def __init__(self, model: Model, plan: Plan) -> None:
        device, block = model.ops.device, model.ops.row_block
        assert plan.chunk % MAX_ROWS == 0
        assert MAX_ROWS % block == 0
        self._model = model
        self._chunk = plan.chunk
        self._cache = model.new_cache(plan.units, plan.page_size, plan.kv)
        self._prefill = Step(plan, plan.chunk, block, new_tables(plan, 1, device), device=device)
        self._chunk_taps = new_taps(model, plan, plan.chunk)
        self._follower: Follower | None = None
        self._spans: deque[Sequence[Span]] = deque()  # of steps that are launched and not collected

    def follow(self, follower: Follower) -> None:
        """Have it see all that is launched from now on."""
        self._follower = follower

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy pages, in order, before what is launched next."""
        self._cache.copy(copies)
        if self._follower:
            self._follower.copy(copies)

    @torch.inference_mode()
    def prefill(self, chunk: Chunk) -> Prefilled:
        """Run one chunk: a drawn token for each of `chunk.drawing`, and the scores that are wanted."""
        launch = self._prefill.prefill(chunk)
        hidden = self._model.forward(launch.ids, launch.rows, self._cache, self._chunk_taps)
        finite = bool((hidden.isfinite().all(dim=1) | (launch.rows.sequences < 0)).all())
        scores = self._scores(chunk, hidden) if chunk.request.submit.prompt_logprobs >= 0 else []
        draws = [draw(each, each.length, mask=mask_of(each, each.length)) for each in chunk.drawing]
        found = Prefilled(self._draw(hidden[launch.drawing], draws), scores, finite)
        if self._follower and finite:
            self._follower.prefilled(chunk, launch.rows, features_of(self._chunk_taps))
        return found

    def _tell(self, spans: Sequence[Span]) -> None:
        self._spans.append(spans)
        if self._follower:
            self._follower.launching(spans)

    def _told(self, committed: Committed, taps: Taps | None) -> Committed:
        spans = self._spans.popleft()
        if self._follower:
            self._follower.collected(spans, committed, features_of(taps))
        return committed

    def _draw(self, hidden: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
        """What each of the rows draws."""
        return drawn(self._model.ops.sample(self._model.logits(hidden), draws)) if draws else []

    def _scores(self, chunk: Chunk, hidden: Tensor) -> list[Drawn]:
        """Scores of the prompt tokens that the rows of the chunk predict."""
        request, first = chunk.request, chunk.start - chunk.number * self._chunk
        targets = request.ids[chunk.start + 1 : min(chunk.end + 1, request.prompt)].tolist()
        top = request.submit.prompt_logprobs
        scores: list[Drawn] = []
        for row in range(0, len(targets), MAX_ROWS):
            wanted = targets[row : row + MAX_ROWS]
            logits = self._model.logits(hidden[first + row : first + row + len(wanted)])
            scores += drawn(self._model.ops.score(logits, wanted, [top] * len(wanted)))
        return scores


class ModelRunner(Prefiller):
    """Computes each step before `launch` returns: there is nothing to gain from running ahead."""

    ahead = deferred = False

    def __init__(self, model: Model, plan: Plan) -> None:
        super().__init__(model, plan)
        tables, device = new_tables(plan, plan.max_seqs, model.ops.device), model.ops.device
        self._decode = Step(plan, MAX_ROWS, model.ops.row_block, tables, device=device)
        self._taps = new_taps(model, plan, MAX_ROWS)
        self._drawn: deque[list[Sequence[Drawn]]] = deque()

    @torch.inference_mode()
    def launch(self, spans: Sequence[Span]) -> None:
        """Run one decode step at once."""
        self._tell(spans)
        size, drawing = self._decode.decode(spans, range(len(spans)))
        hidden = self._model.forward(self._decode.ids[:size], self._decode.rows(size), self._cache, self._taps)
        spans = [span for span in spans if span.draws]
        draws = [_draw(span, count) for span in spans for count in _counts(span)]
        tokens = iter(self._draw(hidden[drawing], draws))
        self._drawn.append([verified(span.drafts, [next(tokens) for _ in _counts(span)]) for span in spans])

    def collect(self) -> Committed:
        """What the oldest step commits that is not collected."""
        return self._told(self._drawn.popleft(), self._taps)


def new_taps(model: Model, plan: Plan, rows: int) -> Taps | None:
    """Buffers for the features of so many rows, where the plan's drafter wants any."""
    if plan.draft is None or not plan.draft.taps:
        return None
    return Taps(plan.draft.taps, torch.zeros(rows, plan.draft.features, dtype=model.dtype, device=model.ops.device))


def features_of(taps: Taps | None) -> Tensor | None:
    """What was left there last."""
    return None if taps is None else taps.rows


def _draw(span: Span, count: int) -> Draw:
    """How the row draws before which so many drafts stand."""
    mask = mask_of(span.request, span.end + count)
    return draw(span.request, span.end, span.drafts[:count], mask=mask)


def _counts(span: Span) -> range:
    """How many drafts stand before each row that draws."""
    return range(len(span.drafts) + 1)

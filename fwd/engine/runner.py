"""Executes scheduled work with a loaded model: fill the step, run the model, draw."""

from collections import deque
from collections.abc import Sequence

import torch

from fwd.engine.pages import Copy
from fwd.engine.plan import Plan
from fwd.engine.request import Drawn, Prefilled
from fwd.engine.sampler import draw, drawn
from fwd.engine.scheduler import MAX_ROWS, Chunk, Span
from fwd.engine.speculate.verify import verified
from fwd.engine.step import Step, new_tables
from fwd.kernels.ops import Draw
from fwd.models.model import Model


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

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy pages, in order, before what is launched next."""
        self._cache.copy(copies)

    @torch.inference_mode()
    def prefill(self, chunk: Chunk) -> Prefilled:
        """Run one chunk: a drawn token for each of `chunk.drawing`, and the scores that are wanted."""
        launch = self._prefill.prefill(chunk)
        hidden = self._model.forward(launch.ids, launch.rows, self._cache)
        finite = bool((hidden.isfinite().all(dim=1) | (launch.rows.sequences < 0)).all())
        scores = self._scores(chunk, hidden) if chunk.request.submit.prompt_logprobs >= 0 else []
        draws = [draw(request, request.length) for request in chunk.drawing]
        return Prefilled(self._draw(hidden[launch.drawing], draws), scores, finite)

    def _draw(self, hidden: torch.Tensor, draws: Sequence[Draw]) -> list[Drawn]:
        """What each of the rows draws."""
        return drawn(self._model.ops.sample(self._model.logits(hidden), draws)) if draws else []

    def _scores(self, chunk: Chunk, hidden: torch.Tensor) -> list[Drawn]:
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
        self._drawn: deque[list[Sequence[Drawn]]] = deque()

    @torch.inference_mode()
    def launch(self, spans: Sequence[Span]) -> None:
        """Run one decode step at once."""
        size, drawing = self._decode.decode(spans, range(len(spans)))
        hidden = self._model.forward(self._decode.ids[:size], self._decode.rows(size), self._cache)
        spans = [span for span in spans if span.draws]
        draws = [draw(span.request, span.end, span.drafts[:count]) for span in spans for count in _counts(span)]
        tokens = iter(self._draw(hidden[drawing], draws))
        self._drawn.append([verified(span.drafts, [next(tokens) for _ in _counts(span)]) for span in spans])

    def collect(self) -> Sequence[Sequence[Drawn]]:
        """What the oldest step commits that is not collected."""
        return self._drawn.popleft()


def _counts(span: Span) -> range:
    """How many drafts stand before each row that draws."""
    return range(len(span.drafts) + 1)

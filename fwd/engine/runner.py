"""Executes scheduled work with a loaded model: fill the step, run the model, draw."""

from collections.abc import Sequence

import torch

from fwd.engine.request import Drawn
from fwd.engine.sampler import draw, drawn
from fwd.engine.scheduler import MAX_ROWS, Chunk, Span
from fwd.engine.step import Step
from fwd.models.model import Model


class ModelRunner:
    """Owns the cache and the two steps: decode rows, and one prefill chunk of `chunk` rows."""

    def __init__(self, model: Model, *, pages: int, page_size: int, max_seqs: int, chunk: int) -> None:
        block = model.ops.row_block
        assert chunk % MAX_ROWS == 0
        assert MAX_ROWS % block == 0
        self._model = model
        self._chunk = chunk
        self._cache = model.new_cache(pages, page_size)
        self._decode = Step(MAX_ROWS, max_seqs, pages, page_size, block)
        self._prefill = Step(chunk, 1, pages, page_size, block)

    @torch.inference_mode()
    def prefill(self, chunk: Chunk) -> tuple[Drawn | None, Sequence[Drawn]]:
        """Run one chunk: the first output token if the prompt ends here and no output is known, and prompt scores."""
        request = chunk.request
        ids, rows = self._prefill.prefill(chunk, self._chunk)
        hidden = self._model.forward(ids, rows, self._cache)
        start = chunk.number * self._chunk
        end = min(start + self._chunk, request.prompt)
        scores = self._scores(chunk, hidden, start, end) if request.submit.prompt_logprobs >= 0 else []
        if end < request.prompt or request.output or request.length == request.limit:
            return None, scores
        logits = self._model.logits(hidden[end - start - 1 : end - start])
        return drawn(self._model.ops.sample(logits, [draw(request)]))[0], scores

    @torch.inference_mode()
    def decode(self, spans: Sequence[Span]) -> Sequence[Drawn]:
        """Run one step: a drawn token for each span that draws, in their order."""
        ids, rows = self._decode.decode(spans)
        hidden = self._model.forward(ids, rows, self._cache)
        draws, last = [], -1
        picked: list[int] = []
        for span in spans:
            last += span.end - span.start
            if span.draws:
                picked.append(last)
                draws.append(draw(span.request))
        if not draws:
            return []
        logits = self._model.logits(hidden[picked])
        return drawn(self._model.ops.sample(logits, draws))

    def _scores(self, chunk: Chunk, hidden: torch.Tensor, start: int, end: int) -> list[Drawn]:
        """Scores of the prompt tokens that rows [start, end) predict."""
        targets = chunk.request.ids[start + 1 : min(end + 1, chunk.request.prompt)]
        top = chunk.request.submit.prompt_logprobs
        scores: list[Drawn] = []
        for row in range(0, len(targets), MAX_ROWS):
            wanted = targets[row : row + MAX_ROWS]
            logits = self._model.logits(hidden[row : row + MAX_ROWS])[: len(wanted)]
            scores += drawn(self._model.ops.score(logits, wanted, [top] * len(wanted)))
        return scores

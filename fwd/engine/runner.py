"""Executes scheduled work with a loaded model: fill the step, run the model, draw."""

from collections.abc import Sequence

import torch

from fwd.engine.request import Drawn
from fwd.engine.sampler import drawn
from fwd.engine.scheduler import MAX_ROWS, Chunk, Span
from fwd.engine.step import Launch, Step
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
        launch = self._prefill.prefill(chunk, self._chunk)
        hidden = self._model.forward(launch.ids, launch.rows, self._cache)
        scores = self._scores(chunk, hidden) if chunk.request.submit.prompt_logprobs >= 0 else []
        return next(iter(self._draw(launch, hidden)), None), scores

    @torch.inference_mode()
    def decode(self, spans: Sequence[Span]) -> Sequence[Drawn]:
        """Run one step: a drawn token for each span that draws, in their order."""
        launch = self._decode.decode(spans)
        return self._draw(launch, self._model.forward(launch.ids, launch.rows, self._cache))

    def _draw(self, launch: Launch, hidden: torch.Tensor) -> list[Drawn]:
        if not launch.draws:
            return []
        return drawn(self._model.ops.sample(self._model.logits(hidden[launch.drawing]), launch.draws))

    def _scores(self, chunk: Chunk, hidden: torch.Tensor) -> list[Drawn]:
        """Scores of the prompt tokens that the rows of the chunk predict."""
        request, start = chunk.request, chunk.number * self._chunk
        targets = request.ids[start + 1 : min(start + self._chunk + 1, request.prompt)]
        top = request.submit.prompt_logprobs
        scores: list[Drawn] = []
        for row in range(0, len(targets), MAX_ROWS):
            wanted = targets[row : row + MAX_ROWS]
            logits = self._model.logits(hidden[row : row + MAX_ROWS])[: len(wanted)]
            scores += drawn(self._model.ops.score(logits, wanted, [top] * len(wanted)))
        return scores

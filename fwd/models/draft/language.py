"""An ordinary language model as a drafter: it knows the target's tokens and nothing else of it."""

import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor

from fwd.kernels.kv import KVCache
from fwd.kernels.rows import Rows
from fwd.models.checkpoint import Checkpoint
from fwd.models.draft.config import LanguageSpec
from fwd.models.draft.model import ABSENT
from fwd.models.draft.shared import Base, Target, check, quietly
from fwd.models.load import FAMILIES
from fwd.models.rehearsal import rehearse


class Language(Base[LanguageSpec]):
    """See `fwd.models.draft.model.DraftModel`. Ids beyond its own, which only pad the target's, become its last."""

    def __init__(self, spec: LanguageSpec, target: Target, context: int) -> None:
        super().__init__(spec, target)
        family, self._vocab, self._target_vocab = FAMILIES[spec.body.family], spec.body.vocab, target.spec.vocab
        check(self._ops, spec, spec.body)
        rehearse(spec.folder, lambda rehearsal, unpacked: family(spec.body, unpacked, self.dtype, rehearsal, 1))
        with Checkpoint(spec.folder, quietly) as checkpoint:
            self._model = family(spec.body, self._ops, self.dtype, checkpoint, context)
        self.weights_hash = self._model.weights_hash

    def forward(self, ids: Tensor, hidden: Tensor | None, rows: Rows, cache: KVCache) -> Tensor:  # noqa: ARG002, D102
        if self._vocab < self._target_vocab:
            ids = ids.clamp(max=self._vocab - 1)
        return self._model.forward(ids, rows, cache)

    def logits(self, hidden: Tensor) -> Tensor:  # noqa: D102
        found = self._model.logits(hidden)[:, : self._target_vocab]
        missing = self._target_vocab - found.shape[1]
        return F.pad(found, (0, missing), value=ABSENT) if missing else found.contiguous()

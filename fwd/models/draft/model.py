"""What the engine sees of a draft model, whatever its kind.

Beside this protocol it calls `fwd.models.draft.config.read_draft(wanted, folder, spec) -> DraftSpec | None` (no torch;
`wanted` as `--draft-model`, `folder` and `spec` the target's; raises ModelError) before it plans, and
`fwd.models.draft.load.load_draft(spec, target, context) -> DraftModel` (`target` the loaded Model, `context` the
positions its tables must hold, at most `spec.context`) once the target is loaded.
"""

from typing import Protocol

import torch
from torch import Tensor

from fwd.kernels.kv import KVCache
from fwd.kernels.ops import Ops
from fwd.kernels.rows import Rows
from fwd.models.draft.spec import DraftSpec
from fwd.models.layout import KVFormat

ABSENT = -1e30  # finite, as a row's logits must be to be drawn from


class DraftModel(Protocol):
    """A loaded draft model on its target's device.

    All its layers find their cells through the target's first full group: `Rows.cells` has one entry for each of
    `groups(spec.cache)`, and all of them are the same. Every method is called with inference mode on, with any number
    of rows up to 16 (whole blocks of `ops.row_block`), or, those but `logits` and `draft`, with a prefill chunk; on a
    GPU the former in a captured graph, so nothing there may depend on what tensors hold. A row's bits may not depend on
    the rows beside it. Positions are below the number that the model was loaded for.
    """

    dtype: torch.dtype
    weights_hash: str

    @property
    def spec(self) -> DraftSpec:
        """What it was read as."""
        ...

    @property
    def ops(self) -> Ops:
        """What executes its passes."""
        ...

    def new_cache(self, pages: int, page_size: int, kv: KVFormat) -> KVCache:
        """Return a cache of zeros with `pages` pages in each of `groups(spec.cache)`.

        It takes exactly Σ pages · group.unit_bytes(page_size, kv) bytes.
        """
        ...

    def fuse(self, features: Tensor) -> Tensor:
        """Make hidden [rows, hidden] of features [rows, spec.features], both in `dtype`; what `forward` takes for them.

        Not called where there are no taps.
        """
        ...

    def forward(self, ids: Tensor, hidden: Tensor | None, rows: Rows, cache: KVCache) -> Tensor:
        """Run the layers over ids int64 [rows], write their KV; return hidden [rows, hidden].

        `hidden` is fused features, or what `forward` returned for the row before each (None where there are no taps).
        What it returns is what the next row takes and what `logits` takes. It may overwrite `hidden`. Not called for a
        dflash.
        """
        ...

    def absorb(self, ids: Tensor, hidden: Tensor | None, rows: Rows, cache: KVCache) -> None:
        """Write the KV of rows as `forward` does, whose hidden nobody wants; a dflash reads no ids."""
        ...

    def draft(self, ids: Tensor, ends: Tensor, rows: Rows, cache: KVCache) -> Tensor:
        """Run blocks over ids int64 [rows], write their KV; return hidden [rows, hidden]. Only a dflash has this.

        The rows of a sequence are its anchor, the last known id at its own position, and masks at those after it: up to
        `spec.block`, perhaps fewer. `ends` int64 [rows] is the position of the last row of each one's block, which it
        may see (of padding rows: 0). A mask's hidden says which id stands at its own position.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits float32 [rows, the target's vocabulary]; `ABSENT` where an id is not in its own."""
        ...

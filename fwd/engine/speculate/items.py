"""What a drafter takes of a device, as part of a plan (`fwd.engine.plan`). No torch here."""

from typing import TYPE_CHECKING, Literal

from fwd.engine.scheduler import BUCKETS
from fwd.engine.workspaces import RING
from fwd.kernels import sizes
from fwd.kernels.sizes import MAX_ROWS
from fwd.models.draft.spec import DraftSizes, DraftSpec
from fwd.models.layout import groups
from fwd.models.spec import ITEMSIZE

if TYPE_CHECKING:
    from fwd.engine.plan import Plan

Kind = Literal["absorb", "begin", "go_on", "block"]
KINDS: tuple[Kind, ...] = ("absorb", "begin", "go_on", "block")  # of passes
INPUTS = ("ids", "positions", "sequences", "parents", "slots", "ends", "sources", "lasts")  # of a row, int64
MINUS = {"sequences", "parents", "slots"}  # those that are −1 in a padding row, others are 0
KEPT = 32  # positions of a sequence whose features wait to be absorbed: less than a pass, a step, one row run ahead
GRAPH_BYTES = 20_000_000  # assumed, as those of the target's steps
CORPUS = 16 << 20  # bytes of ids of earlier answers that are kept, if nothing else is said
SLOTS = 1 << 24  # of a table of the grams of a text, at most
ORDERS = (1, 3, 8)  # ids of a gram: a table for each
ID, HELD = 4, 28  # bytes of such an id, in the log and in memory


def passes_of(spec: DraftSpec) -> tuple[Kind, ...]:
    """The kinds of passes of a draft model."""
    return ("absorb", "block") if spec.kind == "dflash" else ("absorb", "begin", "go_on")


def corpus_bytes(limit: int) -> int:
    """Bytes of host memory that a full corpus takes; `limit` 0: `CORPUS`."""
    return (limit or CORPUS) // ID * HELD


def text_items(plan: "Plan") -> dict[str, int]:
    """Bytes of host memory of the texts that drafts come from, once they have grown."""
    return {"corpus": corpus_bytes(plan.corpus), "draft_tables": tables_bytes(plan.context, plan.max_seqs)}


def slots_of(room: int) -> int:
    """Slots of each table of a text of up to `room` ids."""
    return 1 << max(1, (min(room, SLOTS) - 1).bit_length())


def tables_bytes(context: int, max_seqs: int) -> int:
    """Bytes of host memory by which texts of requests are searched, when all are as long as the context.

    A request has two: its own text, and its `prediction`, whose ids count as well.
    """
    return max_seqs * (2 * len(ORDERS) * ID * (context + slots_of(context)) + ID * context)


def sizes_of(plan: "Plan") -> DraftSizes:
    """What its draft model takes on the plan's device; nothing where there is none."""
    if plan.draft is None:
        return DraftSizes(weights=0, packing=0, width=0)
    return plan.draft.kernels if plan.device.kernels else plan.draft.reference


def drafter_items(plan: "Plan", drawing: int) -> dict[str, int]:
    """Bytes by kind: weights, pages as many as the target's first group has, and buffers.

    What a row draws is said in `drawing` bytes.
    """
    if (draft := plan.draft) is None:
        return {}
    own = sizes_of(plan)
    page = sum(group.unit_bytes(plan.page_size, plan.kv) for group in groups(draft.cache))
    return {
        "drafter_weights": own.weights,
        "drafter_rope": 0 if draft.kind == "mtp" else min(plan.context, draft.context) * draft.rotated * 4,
        "drafter_kv": plan.units[0] * page if plan.units else 0,
        "drafter_features": _features(plan, draft),
        "drafter_passes": _passes(plan, draft, drawing),
        "drafter_kernels": own.spaces,
        "drafter_graphs": len(passes_of(draft)) * len(BUCKETS) * GRAPH_BYTES if plan.device.gpu else 0,
    }


def drafter_workspace(plan: "Plan") -> int:
    """What a chunk takes beside its buffers on its way through the draft model, at its widest moment."""
    own, itemsize = sizes_of(plan), ITEMSIZE[plan.spec.dtype]
    fused = plan.draft.hidden * itemsize if plan.draft and plan.draft.taps else 0
    return plan.chunk * (own.width * 4 + fused) + MAX_ROWS * (own.logits + 4 * plan.spec.vocab)


def _features(plan: "Plan", draft: DraftSpec) -> int:
    """Those of a chunk, of each step in flight, and of committed positions that no pass has absorbed."""
    steps = RING if plan.device.kernels else 1
    rows = plan.chunk + steps * MAX_ROWS + plan.max_seqs * KEPT
    return rows * draft.features * ITEMSIZE[plan.spec.dtype]


def _passes(plan: "Plan", draft: DraftSpec, drawing: int) -> int:
    """Inputs, the block table, hidden rows, ids and all ids of a proposal, ids of a chunk; what a device draws with."""
    inputs = MAX_ROWS * (8 * len(INPUTS) + drawing)
    table = plan.max_seqs * 4 * -(-plan.context // plan.page_size)
    results = MAX_ROWS * (draft.hidden * ITEMSIZE[plan.spec.dtype] + 8 + 8 * MAX_ROWS) + 8 * plan.chunk
    drawn = sizes.outcome_bytes(MAX_ROWS, 0) + 8 if plan.device.kernels else 0
    return inputs + table + results + drawn

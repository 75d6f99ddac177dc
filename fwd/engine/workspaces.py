"""What a launch takes beside weights, pages and buffers, as part of a plan (`fwd.engine.plan`). No torch here."""

from typing import TYPE_CHECKING

from fwd.engine.scheduler import MAX_ROWS
from fwd.models.spec import ITEMSIZE, Held, LatentSpec, ModelSpec

if TYPE_CHECKING:
    from fwd.engine.plan import Plan

RING = 2  # decode steps whose buffers are apart where there are kernels
PIECES = 256  # at most, in which attention splits a context (DESIGN §4)
PIECE, PIECE_GRAIN = 4096, 64  # tokens of a piece on the CPU where there are fewer, and by which it grows
GATHERED_BYTES = 48  # per number of a key: it and its value read from pages in any order, widened, copied; measured
EXPANDED_HEADS, EXPANDED_BYTES = 8, 16  # heads whose keys and values are made of latents at once, bytes a number
SLAB_BYTES, WIDENED = 32 << 20, 4  # of what is dequantised at once, and how often it stands (`kernels.products`)
LATENT_PIECES = 128  # the same of latent attention on kernels
VISIT_WORDS, VISIT_ROWS = 8, 8  # of a row's visit of an expert in the table; rows of an item (`kernels.expert_kernels`)
OUTCOME_BYTES = 176  # of a row: what comes of it (`kernels.drawing`)
MAX_TOPS, SCANNED, SELECTED_LEVELS = 20, 2048, 2048  # of the sampler (`kernels.sample`)
UNPACKED_BYTES = 16 << 20  # weights that a GPU has in rows at once while it prefills (`kernels.prefill`)
SAMPLED_BYTES = 112  # per id of the vocabulary, while one row is sampled; measured


def kernel_items(plan: "Plan") -> dict[str, int]:
    """What only kernels take: what they keep of each line, and what their blocks leave for each other.

    On a GPU what is only sent or fetched is in the memory of the host, and a prefill needs weights in rows.
    """
    vocab, kernels = plan.spec.vocab, _attending(plan) + _mixing(plan, MAX_ROWS) + _sampled(plan)
    fetched = RING * (MAX_ROWS * OUTCOME_BYTES + 8 * plan.max_seqs + 8) + 8 * vocab
    if plan.device.gpu:
        chunk = _mixing(plan, plan.chunk) + UNPACKED_BYTES
        return {"lines": plan.max_seqs * 8 * vocab, "kernels": kernels + chunk}
    return {"lines": plan.max_seqs * 8 * vocab + fetched, "kernels": kernels}


def workspace(plan: "Plan") -> int:
    """What a step takes beside its buffers, at its widest moments; only a prefill chunk is wider than a decode step."""
    spec = plan.spec
    activations = plan.chunk * _width(spec) * 4  # of a layer, in float32 at most
    logits = spec.vocab * (MAX_ROWS * 4 + (MAX_ROWS * 8 if plan.device.kernels else SAMPLED_BYTES))
    if plan.device.gpu:
        return activations + logits + (_absorbed(plan, spec.mla) if spec.mla else 0)
    attended = _latents(plan, spec.mla) if spec.mla else _gathered(plan)
    wide = max(_unpacked(plan), _dequantised(spec)) if plan.device.kernels else _dequantised(spec)
    return activations + logits + attended + _spans(plan) + wide


def _attending(plan: "Plan") -> int:
    """What the launches of a layer's attention leave for each other."""
    if plan.spec.mla:
        return _latent_launches(plan, plan.spec.mla)
    return _split(plan) + _projected(plan)


def _latent_launches(plan: "Plan", mla: LatentSpec) -> int:
    """Of latent attention (`kernels.latent_kernels`): vectors in bfloat16, sums of pieces with marks, arrivals."""
    heads = plan.spec.heads
    vectors = mla.q_rank + mla.latent + mla.rope + heads * (mla.nope + mla.latent + 2 * mla.rope)
    return MAX_ROWS * (2 * vectors + heads * LATENT_PIECES * (2 * mla.latent + 8)) + 4 * (1 + heads)


def _mixing(plan: "Plan", rows: int) -> int:
    """Of experts (`kernels.expert_kernels`): the table of visits, logits, products in float32, arrivals."""
    spec, moe = plan.spec, plan.spec.moe
    if moe is None:
        return 0
    products = rows if rows <= MAX_ROWS else rows * (moe.top_k + 1)
    words = 4 + VISIT_WORDS * rows * moe.top_k + rows * moe.experts + products * spec.hidden
    return 4 * (words + -(-rows // VISIT_ROWS) + 1)


def _absorbed(plan: "Plan", mla: LatentSpec) -> int:
    """Queries of a chunk as they are scored on latents, and on their way there."""
    return plan.chunk * plan.spec.heads * (3 * mla.latent + mla.rope) * 2


def _split(plan: "Plan") -> int:
    """What the pieces of a context leave (`kernels.paged_attention`): values, maximum and sum in float32, arrivals."""
    spec = plan.spec
    return MAX_ROWS * (spec.heads * PIECES * (spec.head_dim + 2) + spec.kv_heads) * 4


def _projected(plan: "Plan") -> int:
    """Heads that are normed or quantised once they are whole (`kernels.gemv`), and their counters."""
    spec = plan.spec
    return (spec.heads + 2 * spec.kv_heads) * (MAX_ROWS * spec.head_dim * 2 + 4)


def _sampled(plan: "Plan") -> int:
    """What the parts of a row of logits leave (`kernels.sample`), and the tokens that the next step starts from."""
    vocab = plan.spec.vocab
    a_row = -(-vocab // SCANNED) * 8 * (3 + MAX_TOPS) + vocab * 4 + 24 + MAX_TOPS * 8 + SELECTED_LEVELS * 12 + 4
    return MAX_ROWS * a_row + 4 + 8 * MAX_ROWS


def _width(spec: ModelSpec) -> int:
    """Numbers of a row in a layer: what goes in and out of its attention, and of its MLP or experts."""
    dense = 3 * spec.intermediate if not spec.moe or len(spec.moe.layers) < spec.layers else 0
    if not spec.moe:
        return 4 * spec.hidden + 4 * spec.qkv_width + dense
    mixed = spec.moe.top_k * (3 * spec.moe.intermediate + 2 * spec.hidden) + 3 * spec.moe.shared
    return 4 * spec.hidden + 4 * spec.qkv_width + max(dense, mixed)


def _dequantised(spec: ModelSpec) -> int:
    """The widest matrix that is made float32 for a product: an expert's, or a slab of another."""
    return max(_widened(held) for held in spec.held)


def _widened(held: Held) -> int:
    size = 4 * held.part.numbers
    if held.format in ITEMSIZE:
        return size if held.part.copies > 1 else 0
    return WIDENED * (size if held.part.copies > 1 else min(size, SLAB_BYTES))


def _unpacked(plan: "Plan") -> int:
    """The widest matrix of a layer as the reference wants it, and on its way there."""
    spec = plan.spec
    return 2 * spec.hidden * max(2 * spec.intermediate, spec.qkv_width) * ITEMSIZE[spec.dtype]


def _gathered(plan: "Plan") -> int:
    """One piece of a chunk's context: its keys and values, and for each row scores and two masks."""
    spec = plan.spec
    cells = _cells(plan)
    vectors = cells * spec.kv_heads * spec.head_dim * GATHERED_BYTES
    scores = plan.chunk * cells * (spec.heads * 4 + 12)
    masks = 2 * len(plan.groups) * plan.chunk * cells * spec.heads // spec.kv_heads * ITEMSIZE[spec.dtype]
    return vectors + scores + masks


def _latents(plan: "Plan", mla: LatentSpec) -> int:
    """One piece of a context: its latents, keys and values of some heads made of them, scores; or ways up, widened."""
    spec, cells = plan.spec, _cells(plan)
    read = cells * (mla.latent + mla.rope) * GATHERED_BYTES // 2
    made = cells * EXPANDED_HEADS * (mla.nope + mla.rope + mla.value) * EXPANDED_BYTES
    scores = plan.chunk * cells * (EXPANDED_HEADS * 8 + 12)
    up = spec.heads * (mla.nope + mla.value) * mla.latent * 4
    return read + max(made + scores, up)


def _cells(plan: "Plan") -> int:
    """Keys of a piece."""
    return min(plan.context + plan.chunk, max(PIECE, -(-plan.context // PIECES) + PIECE_GRAIN))


def _spans(plan: "Plan") -> int:
    """int64 [rows, pages] per paged group: where the rows of a decode step find what they attend to."""
    return 8 * MAX_ROWS * plan.paged * -(-plan.context // plan.page_size)

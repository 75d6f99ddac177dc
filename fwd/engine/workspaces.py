"""What a launch takes beside weights, pages and buffers, as part of a plan (`fwd.engine.plan`). No torch here."""

from typing import TYPE_CHECKING

from fwd.kernels import sizes
from fwd.kernels.sizes import EXPANDED_HEADS, GRAIN, MAX_ROWS, PIECE, PIECES, SLAB_BYTES, UNPACKED_BYTES
from fwd.models.spec import ITEMSIZE, Held, LatentSpec, ModelSpec

if TYPE_CHECKING:
    from fwd.engine.plan import Plan

RING = 2  # decode steps whose buffers are apart where there are kernels
GATHERED_BYTES = 48  # per number of a key: it and its value read from pages in any order, widened, copied; measured
EXPANDED_BYTES = 16  # per number of keys and values that are made of latents
WIDENED = 4  # how often a slab stands that is dequantised (`kernels.products`)
SAMPLED_BYTES = 112  # per id of the vocabulary, while one row is sampled; measured


def kernel_items(plan: "Plan") -> dict[str, int]:
    """What only kernels take: what they keep of each line, and what their blocks leave for each other.

    On a GPU what is only sent or fetched is in the memory of the host, and a prefill needs weights in rows.
    """
    vocab = plan.spec.vocab
    next_ids = 8 * MAX_ROWS
    lines = plan.max_seqs * 8 * vocab + MAX_ROWS * 4 * sizes.mask_words(vocab)
    kernels = _attending(plan) + _mixing(plan, MAX_ROWS) + sizes.sampler_bytes(vocab) + next_ids
    fetched = RING * sizes.outcome_bytes(MAX_ROWS, plan.max_seqs) + 8 * vocab
    if plan.device.gpu:
        chunk = _mixing(plan, plan.chunk) + UNPACKED_BYTES
        return {"lines": lines, "kernels": kernels + chunk}
    return {"lines": lines + fetched, "kernels": kernels}


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
    spec, mla = plan.spec, plan.spec.mla
    if mla:
        return sizes.latent_bytes(spec.heads, mla.q_rank, mla.latent, mla.nope, mla.rope)
    projected = sizes.projection_bytes(spec.heads + 2 * spec.kv_heads, spec.head_dim)
    return projected + sizes.split_bytes(spec.heads, spec.kv_heads, spec.head_dim)


def _mixing(plan: "Plan", rows: int) -> int:
    """The same of experts."""
    moe = plan.spec.moe
    return sizes.mixture_bytes(plan.spec.hidden, moe.experts, moe.top_k, rows) if moe else 0


def _absorbed(plan: "Plan", mla: LatentSpec) -> int:
    """Queries of a chunk as they are scored on latents, and on their way there."""
    return plan.chunk * plan.spec.heads * (3 * mla.latent + mla.rope) * 2


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
    return min(plan.context + plan.chunk, max(PIECE, -(-plan.context // PIECES) + GRAIN))


def _spans(plan: "Plan") -> int:
    """int64 [rows, pages] per paged group: where the rows of a decode step find what they attend to."""
    return 8 * MAX_ROWS * plan.paged * -(-plan.context // plan.page_size)

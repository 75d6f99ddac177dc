"""How much work is taken at once, and what launches leave for each other in bytes. No torch here.

`fwd.engine.workspaces` plans with what the ops are made of.
"""

MAX_ROWS = 16  # of a decode step; more are a prefill chunk, whose shapes are fixed
PIECE, GRAIN = 4096, 64  # keys in a piece of a context in the reference; longer ones are multiples of this many
PIECES = 256  # of a context, at most; more keys make longer ones
LATENT_PIECES = 128  # the same of latent attention as kernels
EXPANDED_HEADS = 8  # whose keys and values are made of a chunk's latents at once
SLAB_BYTES = 32 << 20  # of a matrix that becomes float32 for a product
UNPACKED_BYTES = 16 << 20  # of weights that a GPU puts in rows: read again before they leave L2 (50 MB on an H200)
ITEM = 8  # rows of an item: visits of an expert that one read of its weights is for
MAX_TOPS = 20  # most likely ids of a row
SCANNED, LEVELS = 2048, 2048  # logits of a block of the sampler, and of a row's histogram


def projection_bytes(heads: int, head_dim: int, rows: int = MAX_ROWS) -> int:
    """Bytes of a `gemv.Workspace` for so many heads of q, k and v together."""
    return heads * (rows * head_dim * 2 + 4)


def split_bytes(heads: int, kv_heads: int, head_dim: int, rows: int = MAX_ROWS) -> int:
    """Bytes of a `paged_attention.Workspace`."""
    return rows * (heads * PIECES * (head_dim + 2) + kv_heads) * 4


def latent_bytes(heads: int, rank: int, latent: int, nope: int, rope: int) -> int:
    """Bytes of a `latent_kernels.Workspace`; `rank` is that of the query latent, 0 where there is none."""
    vectors = rank + latent + rope + heads * (nope + latent + 2 * rope)
    return MAX_ROWS * (2 * vectors + heads * LATENT_PIECES * (2 * latent + 8)) + 4 * (1 + heads)


def mixture_bytes(hidden: int, experts: int, top_k: int, rows: int = MAX_ROWS) -> int:
    """Bytes of an `expert_kernels.Workspace`."""
    table, arrivals = 4 + 8 * rows * top_k, -(-rows // ITEM) + 1
    return 4 * (table + rows * experts + mixture_products(rows, top_k) * hidden + arrivals)


def mixture_products(rows: int, top_k: int) -> int:
    """Results of experts that stand in float32 until they are summed; of decode rows: the shared expert's."""
    return rows if rows <= MAX_ROWS else rows * (top_k + 1)


def sampler_bytes(vocab: int, rows: int = MAX_ROWS) -> int:
    """Bytes of a `sample.Workspace`."""
    return rows * (-(-vocab // SCANNED) * 8 * (3 + MAX_TOPS) + vocab * 4 + 24 + MAX_TOPS * 8 + LEVELS * 12 + 4) + 4


def outcome_bytes(rows: int, lines: int) -> int:
    """Bytes of a `drawing.Outcome`."""
    return rows * (16 + MAX_TOPS * 8) + lines * 8 + 8


def mask_words(vocab: int) -> int:
    """How many int32 hold a bit for each id of a vocabulary."""
    return -(-vocab // 32)

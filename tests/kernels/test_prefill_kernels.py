"""Prefill as a GPU does it, kernels and products: the reference's numbers, the same bits wherever a prefill began."""

import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from agreement import difference, same_bits
from contexts import Context, Shape, empty_cache, on, queries, reference, sinks_of, trimmed

from fwd.errors import KernelError
from fwd.kernels import prefill
from fwd.kernels.host import HostLauncher
from fwd.kernels.ops import QKV, Norm
from fwd.kernels.qtensor import QTensor
from fwd.kernels.reference import Reference
from fwd.kernels.sizes import UNPACKED_BYTES

BOUND = 1e-5  # weights of keys are rounded to bf16 before they meet values; the most seen is 2.5e-6
C = 64
SHAPES = [
    Shape("bf16", 64, 2, 4, 16),
    Shape("bf16", 64, 1, 16, 4, sinks=True),
    Shape("bf16", 64, 3, 1, 12, window=50),
    Shape("bf16", 128, 1, 5, 16, window=130, sinks=True),
    Shape("bf16", 256, 1, 3, 4, window=1),
    Shape("fp8", 64, 1, 7, 20, sinks=True),
    Shape("fp8", 128, 2, 4, 16, window=77),
    Shape("fp8", 256, 1, 2, 8),
]
FEW = [SHAPES[0], SHAPES[3], SHAPES[6]]
CHUNKS = ((0, 0, 64), (0, 0, 1), (1, 70, 127), (2, 128, 192), (3, 201, 203))  # index, first and last live row's end


def behind(context, first):
    """Forget what the window of a chunk that begins at `first` does not hold; what comes later is not written yet."""
    if context.shape.window:
        context.forget(0, max(0, first + 1 - context.shape.window))
    return context


def attend(launcher, q, rows, kv, sinks=None):
    moved = (on(launcher.device, thing) for thing in (q, rows, kv))
    return prefill.prefill_attention(launcher, *moved, sinks=on(launcher.device, sinks)).cpu()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_live_rows_agree_with_the_reference(execution, shape):
    sinks = sinks_of(shape)
    for index, first, end in CHUNKS:
        context, q = behind(Context(shape, (end,)), first), queries(shape, C)
        rows = context.chunk(index, C, first, end)
        live = rows.sequences >= 0
        found = execution.everywhere(partial(attend, q=q, rows=rows, kv=context.kv, sinks=sinks), 2)
        wanted = reference(q, rows, context.kv, sinks)
        assert found.isfinite().all(), (shape, index, first, end)
        assert difference(found[live], wanted[live]) < BOUND, (shape, index, first, end)


@pytest.mark.parametrize("shape", FEW, ids=str)
def test_a_row_has_the_same_bits_wherever_the_prefill_began_and_ends(execution, shape):
    sinks, q = sinks_of(shape), queries(shape, C)
    whole = Context(shape, (192,))
    bits = attend(execution.launcher, q, whole.chunk(2, C, 128, 192), whole.kv, sinks)
    for places, (first, end) in enumerate(((128, 150), (129, 192), (150, 151), (191, 192), (143, 170)), start=5):
        context = behind(Context(shape, (end,), places=places), first)
        rows = context.chunk(2, C, first, end)
        live = rows.sequences >= 0
        poisoned = torch.where(live[:, None, None], q, math.nan)
        found = attend(execution.launcher, poisoned, rows, context.kv, sinks)
        assert same_bits(found[live], bits[live]), (shape, first, end)


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_a_chunk_of_padding_reads_nothing(execution, shape, index):
    context = Context(shape, (192,))
    rows = context.chunk(index, C, 0, 0)
    rows.cells[0].tables[:] = -(1 << 20)
    assert not attend(execution.launcher, queries(shape, C), rows, context.kv).any()


# ---- heads: norm, RoPE, the cache ----


def layer_of(shape, hidden, *, extras, seed=9):
    chance = torch.Generator().manual_seed(seed)
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim

    def draw(*size):
        return (torch.randn(size, generator=chance) * 0.2).bfloat16()

    def norm(size):
        return Norm(draw(size) + 1, 1e-5)

    weight, bias = QTensor.plain(draw(width, hidden)), draw(width) if extras else None
    head_norms = [norm(shape.head_dim) if extras else None for _ in range(2)]
    return QKV(norm(hidden), weight, bias, *head_norms, shape.kv_heads, shape.head_dim)


def rope_of(head_dim, positions=256):
    angles = torch.outer(torch.arange(float(positions)), 100.0 ** -torch.linspace(0, 1, head_dim // 2))
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def on_device(layer, device):
    """A layer with its weight packed."""
    norms = {
        name: each and replace(each, weight=each.weight.to(device))
        for name in ("norm", "q_norm", "k_norm")
        for each in (getattr(layer, name),)
    }
    weight = replace(layer.weight, data=layer.weight.data.to(device)).pack()
    return replace(layer, weight=weight, bias=on(device, layer.bias), **norms)


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias and head norms"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_queries_and_cells_are_the_references(execution, shape, extras):
    layer, rope, hidden = layer_of(shape, 96, extras=extras), rope_of(shape.head_dim), torch.randn(C, 96).bfloat16()
    context = Context(shape, (120,))
    rows, before = context.chunk(1, C, 70, 120), empty_cache(shape, len(context.kv.keys))

    def run(launcher):
        kv = on(launcher.device, before)
        q = prefill.Prefill(launcher).qkv(
            *(on(launcher.device, hidden), on_device(layer, launcher.device), on(launcher.device, rope)),
            *(on(launcher.device, rows), kv),
        )
        return q.cpu(), *(x.cpu() for x in (kv.keys, kv.values, kv.key_scales, kv.value_scales) if x is not None)

    found, keys, values, *scales = execution.everywhere(run, 2)
    kv = on("cpu", before)
    wanted = Reference().qkv(hidden, layer, rope, rows, kv)
    live = rows.sequences >= 0
    cells = rows.cells[0].slots[live]
    assert difference(found[live], wanted[live]) < 1e-6
    for mine, theirs in ((keys, kv.keys), (values, kv.values)):
        assert difference(mine[cells].float(), theirs[cells].float()) < 1e-5
    for mine, theirs in zip(scales, (kv.key_scales, kv.value_scales), strict=False):
        assert difference(mine[cells], theirs[cells]) < 1e-6
    untouched = torch.ones(len(keys), dtype=torch.bool).index_fill_(0, cells, value=False)
    assert all(each[untouched].float().isnan().all() for each in (keys, values, *scales))


# ---- the whole block ----


@pytest.mark.parametrize("slab", [UNPACKED_BYTES, 128 * 1024], ids="slab{}".format)
@pytest.mark.parametrize("hidden", [96, 2880], ids="hidden{}".format)
def test_a_block_agrees_with_the_reference(execution, hidden, slab):
    shape, inner = Shape("bf16", 64, 2, 3, 16, window=100), 296
    layer, chance = layer_of(shape, hidden, extras=True), torch.Generator().manual_seed(3)

    def draw(*size):
        return (torch.randn(size, generator=chance) * 0.1).bfloat16()

    output, up, down = (QTensor.plain(draw(*size)) for size in ((hidden, 384), (2 * inner, hidden), (hidden, inner)))
    norm, bias, x = Norm(draw(hidden) + 1, 1e-5), draw(hidden), draw(C, hidden) * 10
    context = Context(shape, (128,))
    rows, rope = context.chunk(1, C, 66, 128), rope_of(64)

    def block(ops, attend, x, rows, kv, pack):
        mixed = attend(ops.qkv(x, on_device(layer, x.device) if pack else layer, rope.to(x.device), rows, kv), rows, kv)
        x = ops.linear(mixed, weight(output, x, pack), x, on(x.device, bias))
        active = ops.gate_up(x, replace(norm, weight=norm.weight.to(x.device)), weight(up, x, pack))
        return ops.linear(active, weight(down, x, pack), x)

    def weight(plain, x, pack):
        moved = replace(plain, data=plain.data.to(x.device))
        return moved.pack() if pack else moved

    launcher = execution.launcher
    ops, theirs = prefill.Prefill(launcher, slab), Reference()
    mine = block(ops, ops.attention, *(on(launcher.device, each) for each in (x, rows, context.kv)), pack=True)
    wanted = block(theirs, theirs.prefill_attention, x.clone(), rows, on("cpu", context.kv), pack=False)
    live = rows.sequences >= 0
    assert difference(mine.cpu()[live], wanted[live]) < 2e-5


def test_a_matrix_is_cut_into_slabs_of_like_size():
    assert prefill.slabs(4096, 4096, UNPACKED_BYTES // 2) == [slice(0, 2048), slice(2048, 4096)]
    chance = random.Random(4)
    for _ in range(300):
        outputs, inputs = chance.randrange(8, 40000, 8), chance.randrange(8, 30000, 8)
        numbers = UNPACKED_BYTES // 2
        parts = prefill.slabs(outputs, inputs, numbers)
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == outputs
        assert all(part.start % 8 == 0 for part in parts)
        assert all(-(-(part.stop - part.start) // 8) * 8 * -(-inputs // 32) * 32 <= numbers for part in parts)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("itemsize", [1, 2])
def test_two_blocks_share_a_multiprocessor(head_dim, itemsize):
    assert 2 * (prefill.shared_bytes(head_dim, itemsize) + 1024) <= 228 * 1024


# ---- bugs that must be seen ----

SOURCE, TILES, SHARED = "prefill.cu", "prefill_tiles.cuh", "attention.cuh"
SMALL = Shape("bf16", 64, 1, 3, 4, window=90)
BUGS = {
    "a page too far": (SHARED, "int page = position / page_size;", "int page = (position + 1) / page_size;"),
    "the key after the query": (SOURCE, "key <= at &&", "key <= at + 1 &&"),
    "a window too wide": (SOURCE, "at - window : -1", "at - window - 1 : -1"),
    "cells that nobody sees": (TILES, "bool known = position >= range.first_key &&", "bool known ="),
    "cells after the last": (TILES, "&& position <= range.last_key", ""),
    "no wait for the tile": (SOURCE, "cp_async_wait<1>();", ""),
    "no barrier before the tile is used": (
        SOURCE,
        "cp_async_wait<1>();\n        block_barrier();",
        "cp_async_wait<1>();",
    ),
    "no barrier before the tile is replaced": (SOURCE, "        block_barrier();\n    }\n    cp", "    }\n    cp"),
}


def is_right(execution, shape):
    q = queries(shape, C)
    for index, first, end in ((2, 130, 161), (2, 128, 192)):
        context = behind(Context(shape, (end,)), first)
        rows = context.chunk(index, C, first, end)
        live = rows.sequences >= 0
        try:
            found = execution.everywhere(partial(attend, q=q, rows=rows, kv=context.kv))
        except (AssertionError, KernelError):
            return False
        if not difference(found[live], reference(q, rows, context.kv, None)[live]) < BOUND:
            return False
    return True


def test_what_finds_bugs_passes_the_right_kernel(execution):
    assert is_right(execution, SMALL)
    assert is_right(execution, replace(SMALL, kv="fp8"))


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(execution, bug):
    wrong = trimmed(execution, SOURCE, "prefill_attention_bf16_64").mutated(*BUGS[bug])
    assert not is_right(wrong, SMALL)


def test_a_wrong_scale_is_seen(execution):
    wrong = trimmed(execution, SOURCE, "prefill_attention_fp8_64")
    wrong = wrong.mutated(TILES, "(chunk ? call.value_scales : call.key_scales)", "call.key_scales")
    assert not is_right(wrong, replace(SMALL, kv="fp8"))


def test_sanitizers_find_nothing(sanitized, tmp_path):
    done = sanitized(f"""
        from contexts import Context, Shape, queries, trimmed_folder
        from fwd.kernels.host import HostLauncher
        from test_prefill_kernels import attend
        folder = trimmed_folder({str(tmp_path / "cuda")!r}, "prefill.cu", "prefill_attention_fp8_64")
        shape = Shape("fp8", 64, 2, 3, 4, window=100)
        context = Context(shape, (150,))
        launcher = HostLauncher(sanitize=True, folder=folder)
        attend(launcher, queries(shape, 64), context.chunk(2, 64, 131, 150), context.kv)
        print("done")
    """)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("done\n")


def test_the_launch_says_what_it_does_not_take():
    shape = Shape("bf16", 64, 1, 2, 16)
    context = Context(shape, (10,))
    with pytest.raises(AssertionError, match="decode rows"):
        attend(HostLauncher(), queries(shape, 1), context.rows([(0, 9)]), context.kv)

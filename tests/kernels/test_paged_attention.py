"""Decode attention over pages: the reference's numbers, and a row's bits from nothing but the row."""

import random
from dataclasses import replace

import pytest
import torch
from agreement import difference, same_bits
from contexts import Context, Shape, on, queries, reference, sinks_of
from paged_contexts import BOUND, attend, last_rows, tree, window_only
from trees import PARENTS, branch

from fwd.kernels import paged_attention as paged
from fwd.kernels.host import HostLauncher
from fwd.kernels.sizes import split_bytes

SHAPES = [
    Shape("bf16", 64, 2, 4, 16),
    Shape("bf16", 64, 1, 16, 4, sinks=True),
    Shape("bf16", 64, 3, 1, 12, window=50),
    Shape("bf16", 128, 2, 5, 16, sinks=True),
    Shape("bf16", 128, 1, 8, 8, window=130),
    Shape("bf16", 256, 1, 9, 4),
    Shape("bf16", 256, 2, 2, 16, window=1, sinks=True),
    Shape("fp8", 64, 2, 3, 4, window=77, sinks=True),
    Shape("fp8", 64, 1, 16, 16),
    Shape("fp8", 128, 2, 4, 16),
    Shape("fp8", 128, 1, 7, 20, sinks=True),
    Shape("fp8", 256, 1, 10, 8, window=64),
]
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 261)
FEW = [SHAPES[0], SHAPES[4], SHAPES[6], SHAPES[7], SHAPES[10]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_agree_with_the_reference(execution, shape):
    context = window_only(Context(shape, LENGTHS))
    q, rows, sinks = queries(shape, len(LENGTHS)), last_rows(context), sinks_of(shape)
    found = execution.everywhere(lambda launcher: attend(launcher, shape, q, rows, context.kv, sinks))
    wanted = reference(q, rows, context.kv, sinks)
    apart = [difference(*pair) for pair in zip(found, wanted, strict=True)]
    assert max(apart) < BOUND, (shape, apart)


@pytest.mark.parametrize("shape", FEW, ids=str)
def test_a_row_has_the_same_bits_in_any_company_at_any_place(execution, shape):
    chance, lengths = random.Random(11), [random.Random(10).choice((1, 3, 66, 140, 300, 517)) for _ in range(16)]
    here, there = (window_only(Context(shape, lengths, places=places)) for places in (3, 4))
    q, sinks = queries(shape, 16), sinks_of(shape)
    whole = attend(execution.launcher, shape, q, last_rows(here), here.kv, sinks)
    for count, context in ((1, there), (2, here), (5, there), (15, here), (16, there)):
        order = chance.sample(range(16), count)
        rows = context.rows([(line, lengths[line] - 1) for line in order])
        part = attend(execution.launcher, shape, q[order], rows, context.kv, sinks)
        assert same_bits(part, whole[order]), (shape, count, order)


def test_the_number_of_blocks_does_not_matter():
    shape, lengths = SHAPES[3], (1, 700, 64, 130)
    context = Context(shape, lengths)
    q, rows = queries(shape, len(lengths)), last_rows(context)
    one, *others = (attend(HostLauncher(7, multiprocessors=count), shape, q, rows, context.kv) for count in (1, 3, 64))
    assert all(same_bits(one, other) for other in others)


def test_padding_rows_are_zero_and_a_row_of_nan_disturbs_no_other(execution):
    shape = SHAPES[1]
    context = Context(shape, (5, 90, 200))
    rows = context.rows([(-1, 7), (0, 4), (1, 89), (-1, 0), (2, 199)])
    q = queries(shape, 5)
    healthy = attend(execution.launcher, shape, q, rows, context.kv, sinks_of(shape))
    assert not healthy[[0, 3]].any()
    q[2, 1, 3] = torch.nan
    ill = attend(execution.launcher, shape, q, rows, context.kv, sinks_of(shape))
    assert same_bits(ill[[0, 1, 3, 4]], healthy[[0, 1, 3, 4]])
    assert ill[2].view(shape.heads, -1)[1].isnan().all()
    assert ill[2].view(shape.heads, -1)[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kv", ["bf16", "fp8"])
def test_a_context_of_thousands(execution, kv):
    shape = Shape(kv, 64, 1, 4, 16)
    context = Context(shape, (9001,))
    assert paged.piece_count(9001) == 36
    q, rows = queries(shape, 2), context.rows([(0, 9000), (0, 8191)])
    found = execution.everywhere(lambda launcher: attend(launcher, shape, q, rows, context.kv), count=2)
    assert difference(found, reference(q, rows, context.kv, None)) < BOUND


@pytest.mark.parametrize("sink", [-80.0, 0.0, 300.0])
def test_a_sink_may_be_anything(execution, sink):
    shape = replace(SHAPES[1], sinks=True)
    context = Context(shape, (40, 170))
    q, rows, sinks = queries(shape, 2), last_rows(context), torch.full((shape.heads,), sink)
    found = attend(execution.launcher, shape, q, rows, context.kv, sinks)
    assert difference(found, reference(q, rows, context.kv, sinks)) < BOUND
    assert bool(found.any()) == (sink < 300)


# ---- pieces ----


def test_pieces_cover_any_context():
    lengths = [*range(1, 5000), 65535, 65536, 65537, 131072, 1 << 20, (1 << 20) + 1, (1 << 27) - 1]
    for length in lengths:
        piece, count = paged.piece_length(length), paged.piece_count(length)
        assert piece % 64 == 0
        assert (count - 1) * piece < length <= count * piece
        assert count <= (32 if length <= 8192 else 256)
        assert piece <= 256 or count > 128
    assert [paged.piece_length(x) for x in (0, 1, 2048, 2049, 4097, 8193, 65536, 65537)] == [
        *(64, 64, 64, 128, 192, 256, 256, 320)
    ]


@pytest.mark.parametrize("length", [1, 64, 65, 1000, 2049, 4500, 8193, 66000])
def test_the_kernel_cuts_a_context_as_stated(execution, length):
    """Where all scores are 0, the total of a piece is the number of its keys."""
    shape, launcher = Shape("bf16", 64, 1, 1, 16), execution.launcher
    context = Context(shape, (length,))
    workspace = paged.Workspace.new(launcher, 1, 1, 64, rows=1)
    q, rows = torch.zeros(1, 1, 64).bfloat16(), last_rows(context)
    paged.decode_attention(launcher, workspace, *(on(launcher.device, x) for x in (q, rows, context.kv)))
    piece, count = paged.piece_length(length), paged.piece_count(length)
    totals = [min(piece, length - start) for start in range(0, length, piece)]
    assert len(totals) == count
    assert count == 1 or workspace.marks[0, 0, :count, 1].tolist() == totals


@pytest.mark.parametrize("head_dim", paged.HEAD_DIMS)
def test_launches_fit(head_dim):
    blocks = paged.grid(head_dim, 132) // 132
    assert blocks * (paged.shared_bytes(head_dim) + 1024) <= 228 * 1024
    assert split_bytes(4, 2, head_dim) == sum(
        each.nbytes for each in vars_of(paged.Workspace.new(HostLauncher(), 4, 2, head_dim))
    )


def vars_of(workspace):
    return (workspace.sums, workspace.marks, workspace.arrivals)


def test_what_is_not_taken_is_said():
    assert paged.supports(32, 8, 128, 16) is None
    assert paged.supports(32, 8, 96, 16) == "head_dim 96: the attention kernels take 64, 128 and 256"
    assert "17 heads on 1 kv heads" in paged.supports(17, 1, 64, 16)
    assert "page_size 6" in paged.supports(8, 8, 64, 6)


# ---- trees ----


@pytest.mark.parametrize("base", [0, 13, 14, 62, 126, 300])
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_drafts_of_a_tree_agree_with_the_reference(execution, shape, base):
    context, rows = tree(shape, base)
    q, sinks = queries(shape, len(PARENTS)), sinks_of(shape)
    found = execution.everywhere(lambda launcher: attend(launcher, shape, q, rows, context.kv, sinks), count=2)
    assert difference(found, reference(q, rows, context.kv, sinks)) < BOUND, (shape, base)


@pytest.mark.parametrize("shape", FEW, ids=str)
def test_an_accepted_branch_had_the_bits_of_the_plain_chain(execution, shape):
    base = 62
    context, rows = tree(shape, base)
    q, sinks, slots = queries(shape, len(PARENTS)), sinks_of(shape), rows.cells[0].slots
    drafted = attend(execution.launcher, shape, q, rows, context.kv, sinks)
    for leaf in (4, 6, 7):
        chain = branch(leaf)
        plain = Context(shape, (base + len(chain), 30), spare=12)
        cells = plain.cell(0, torch.arange(base, base + len(chain)))
        for name in ("keys", "values", "key_scales", "value_scales"):
            if (to := getattr(plain.kv, name)) is not None:
                to[cells] = getattr(context.kv, name)[slots[chain]]
        steps = plain.rows([(0, base + depth) for depth in range(len(chain))])
        assert same_bits(attend(execution.launcher, shape, q[chain], steps, plain.kv, sinks), drafted[chain]), leaf

"""The kernels of mixtures of experts agree with the reference, in every format, and keep a row's bits."""

import math
import random

import pytest
import torch
from agreement import difference, same_bits
from expert_mixtures import FORMATS, SHAPES, SMALL, WIDE, Packed, expected, mixture, summed, table, table_of
from mixtures import Shape

from fwd.kernels import expert_kernels as kernels
from fwd.kernels.builds import SHARED_LIMIT
from fwd.kernels.host import HostLauncher
from fwd.kernels.sizes import MAX_ROWS, mixture_bytes

BOUND = 1e-5  # of `difference`, as in test_gemv.py
CHUNK = 48


def close(found, wanted, what):
    assert len(found) == len(wanted), what
    _, experts, *_ = found
    assert torch.equal(experts.cpu(), wanted[1]), what
    for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
        apart = difference(one, other)
        assert apart < BOUND, (what, place, apart)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_agree_with_the_reference(execution, shape):
    given = mixture(shape)
    for count in (1, 5, 16):
        hidden = given.hidden(count)
        found = execution.everywhere(lambda launcher, hidden=hidden: Packed(launcher, given).run(hidden))
        close(found, expected(given, hidden), (shape, count))


@pytest.mark.parametrize("formats", FORMATS, ids="-and-".join)
def test_they_do_in_every_format(execution, formats):
    for biased in (False, True):
        given = mixture(WIDE, *formats, biased=biased)
        hidden = given.hidden(11)
        found = execution.everywhere(lambda launcher, given=given, hidden=hidden: Packed(launcher, given).run(hidden))
        close(found, expected(given, hidden), (formats, biased))


def test_they_do_in_the_shape_of_gpt_oss(execution):
    """90 scale groups of 32 a row: the last block of four is half empty."""
    given = mixture(Shape(2880, 4, 2, 96, "topk_softmax", biased=True), "mxfp4")
    hidden = given.hidden(3)
    close(Packed(execution.launcher, given).run(hidden), expected(given, hidden), "gpt-oss")


@pytest.mark.parametrize("formats", FORMATS, ids="-and-".join)
def test_a_row_has_the_same_bits_alone_and_in_any_company(execution, formats):
    chance = random.Random(3)
    given = mixture(WIDE, *formats, biased=True, seed=2)
    hidden = given.hidden(16)
    hidden[8:] = hidden[7] + hidden[8:] * 0.05  # more rows than one item of an expert has
    ops = Packed(execution.launcher, given)
    together = ops.run(hidden)
    for count in (1, 1, 2, 3, 7, 8, 9, 12, 16):
        order = chance.sample(range(16), count)
        live = [count == 1 or chance.random() < 0.8 for _ in order]
        rows = hidden[order]
        rows[[row for row in range(count) if not live[row]]] = math.nan
        found = ops.run(rows, [0 if on else -1 for on in live])
        kept = [row for row in range(count) if live[row]]
        for one, other in zip(found, together, strict=True):
            assert same_bits(one[kept], other[[order[row] for row in kept]]), (count, order, live)


@pytest.mark.parametrize("formats", FORMATS, ids="-and-".join)
def test_a_chunk_agrees_and_has_the_bits_of_decode_rows(execution, formats):
    given = mixture(WIDE, *formats, biased=True, seed=4)
    hidden = given.hidden(CHUNK)
    hidden[20:] = hidden[19] + hidden[20:] * 0.05  # more rows than one item of a chunk has
    launcher = execution.launcher
    whole, few = Packed(launcher, given, CHUNK), Packed(launcher, given)
    found = whole.run(hidden, chunk=1)
    close(found, expected(given, hidden, chunk=1), formats)
    for first in (0, 17, 40):
        rows = slice(first, min(first + 16, CHUNK))
        for one, other in zip(few.run(hidden[rows]), found, strict=True):
            assert same_bits(one, other[rows]), first
    for first, last in ((17, CHUNK), (0, 33), (5, 6)):
        part = hidden.clone()
        part[:first] = part[last:] = math.nan
        again = whole.run(part, [0 if first <= row < last else -1 for row in range(CHUNK)], chunk=1)
        for one, other in zip(again, found, strict=True):
            assert same_bits(one[first:last], other[first:last]), (first, last)


def test_a_chunk_has_the_same_bits_everywhere(execution):
    given = mixture(SHAPES[5], seed=5)
    hidden = given.hidden(CHUNK)
    found = execution.everywhere(lambda launcher: Packed(launcher, given, CHUNK).run(hidden, chunk=0))
    close(found, expected(given, hidden, chunk=0), "chunk")


def test_the_number_of_multiprocessors_shapes_nothing():
    given = mixture(SHAPES[4], seed=6)
    hidden = given.hidden(9)
    results = [Packed(HostLauncher(count, multiprocessors=count), given).run(hidden) for count in (1, 3, 132)]
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[5]], ids=str)
def test_a_row_of_nan_disturbs_no_other_row(execution, shape):
    given = mixture(shape, seed=7)
    ops, hidden = Packed(execution.launcher, given), given.hidden(9)
    healthy = ops.run(hidden)
    hidden[3, 5], hidden[6, 0], hidden[8] = math.nan, math.inf, -math.inf
    ill = ops.run(hidden)
    others = [0, 1, 2, 4, 5, 7]
    for one, other in zip(ill, healthy, strict=True):
        assert same_bits(one[others], other[others])
    assert not ill[-1][[3, 6, 8]].isfinite().any()


def test_padding_rows_go_nowhere(execution):
    given = mixture(SMALL, seed=8)
    for count, chunk in ((16, -1), (3, -1), (CHUNK, 0)):
        ops = Packed(execution.launcher, given, max(count, 16))
        live = [row % 3 != 0 for row in range(count)]
        experts = ops.run(given.hidden(count), [0 if on else -1 for on in live], chunk)[1]
        assert ((experts >= 0).all(1).cpu() == torch.tensor(live)).all()
        visits = table(ops.space, count * SMALL.top_k)
        assert sorted(visit for _, found in visits for visit in found) == [
            visit for visit in range(count * SMALL.top_k) if live[visit // SMALL.top_k]
        ]
        nobody = ops.run(given.hidden(count), [-1] * count, chunk)
        assert (nobody[1] == -1).all()
        assert not table(ops.space, count * SMALL.top_k)


@pytest.mark.parametrize(("count", "most"), [(16, kernels.ITEM), (CHUNK, kernels.CHUNK_ITEM)])
def test_the_table_is_by_expert_then_by_row_in_items_of_few(execution, count, most):
    given = mixture(SHAPES[2], seed=9)
    ops, hidden = Packed(execution.launcher, given, CHUNK), given.hidden(count)
    hidden[2:] = hidden[1] + hidden[2:] * 0.02
    experts = ops.run(hidden, chunk=0 if count > 16 else -1)[1].cpu()
    wanted = table_of(experts, most)
    assert len(wanted) > len(experts.unique()), "an expert with more than one item"
    assert table(ops.space, count * 4) == wanted


def test_a_row_is_summed_in_its_own_order_then_the_shared_expert_then_the_residual(execution):
    orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [2, 0, 1]]
    assert summed(execution.launcher, orders, shared=0.0, residual=0.0) == [0.0, 1.0, 0.0, 1.0]
    # −1e8 as bfloat16 holds it, then the residual: only a shared expert that comes before it leaves that
    one = summed(execution.launcher, [[1, 0, 2]], shared=1.0, residual=0.5)
    assert one == [1.5]


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[6]], ids=str)
def test_of_equal_experts_the_first_are_chosen(execution, shape):
    given = mixture(shape, seed=10)
    tied = given.with_ties()
    tied.experts = given.experts
    experts = Packed(execution.launcher, tied).run(given.hidden(9))[1]
    assert experts.tolist() == [list(range(shape.top_k))] * 9


def test_of_equal_groups_the_first_are_chosen(execution):
    shape = Shape(48, 16, 4, 24, "sigmoid", normalize=True, groups=4, top_groups=2, scale=2.5)
    given = mixture(shape, seed=10)
    tied = given.with_ties()
    tied.router.bias.fill_(0.5)
    tied.experts = given.experts
    found = Packed(execution.launcher, tied).run(given.hidden(4))
    assert found[1].tolist() == [[0, 1, 2, 3]] * 4
    assert found[2].tolist() == [[2.5 / 4] * 4] * 4


def test_what_a_workspace_takes_is_counted():
    for rows in (16, 512):
        space = kernels.Workspace.of(HostLauncher(), 64, 33, 5, rows=rows)
        tensors = (space.table, space.logits, space.products, space.counters)
        assert sum(tensor.nbytes for tensor in tensors) == mixture_bytes(64, 33, 5, rows)


def test_what_the_most_visits_take_fits_in_shared_memory():
    assert kernels.down_bytes(MAX_ROWS * kernels.MAX_TOP_K, MAX_ROWS) <= SHARED_LIMIT
    assert 2 * kernels.down_bytes(MAX_ROWS * 8, MAX_ROWS) <= SHARED_LIMIT, "two blocks of the usual models"
    assert kernels.route_bytes(MAX_ROWS, kernels.MAX_HIDDEN, kernels.MAX_TOP_K) <= SHARED_LIMIT


def test_what_no_kernel_takes_is_named():
    assert kernels.supports(hidden=2880, intermediate=2880, experts=128, top_k=4) is None
    assert kernels.supports(hidden=7168, intermediate=2048, experts=384, top_k=8, groups=1) is None
    for refused in (
        {"hidden": 2881},
        {"hidden": 12296},
        {"intermediate": 12},
        {"experts": 513},
        {"top_k": 17},
        {"groups": 33},
    ):
        given = {"hidden": 64, "intermediate": 64, "experts": 8, "top_k": 2, **refused}
        assert str(next(iter(refused.values()))) in kernels.supports(**given)

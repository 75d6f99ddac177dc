"""What must not matter to a row of the matrix-vector kernels: the rows beside it, its index, the machine."""

import pytest
from agreement import same_bits
from layers import LAYERS, Chance, Layer, contents

from fwd.kernels import gemv
from fwd.kernels.host import HostLauncher


@pytest.mark.parametrize("shape", [LAYERS[1], LAYERS[4], LAYERS[6]], ids=str)
def test_a_row_of_qkv_has_the_same_bits_alone_and_in_any_company(execution, shape):
    launcher = execution.launcher
    whole = Layer(shape, 16, 10, launcher.device)
    q, *cells = whole.run(launcher)
    for chosen in ([0], [7], [15], [9, 2], [15, 0, 3, 11, 5, 1, 8], [4, 3, 2, 1, 0, 15, 14, 13, 12]):
        part = Layer(shape, 16, 10, launcher.device)
        part.hidden, part.positions, part.slots = (x[chosen] for x in (whole.hidden, whole.positions, whole.slots))
        few, *others = part.run(launcher)
        assert same_bits(few, q[chosen]), (shape, chosen)
        for one, other in zip(cells, others, strict=True):
            assert same_bits(one[part.slots], other[part.slots]), (shape, chosen)


@pytest.mark.parametrize("shape", [(2880, 48), (4384, 288)], ids=str)
def test_a_row_has_the_same_bits_alone_and_in_any_company(execution, shape):
    inputs, outputs = shape
    launcher = execution.launcher
    chance = Chance(11, launcher.device)
    weight, norm, bias = chance.matrix(outputs, inputs).pack(), chance.norm(inputs), chance(outputs)
    x, residual = chance(16, inputs), chance(16, outputs)

    def run(chosen):
        given = x[chosen].contiguous()
        return (
            gemv.linear(launcher, given, weight, residual[chosen].contiguous(), bias),
            gemv.gate_up(launcher, given, norm, weight),
            gemv.head(launcher, given, norm, weight),
        )

    together = run(list(range(16)))
    for chosen in ([0], [6], [15], [9, 2], [15, 0, 3, 11, 5], [4, 3, 2, 1, 0, 15, 14, 13, 12]):
        for op, (one, all_rows) in enumerate(zip(run(chosen), together, strict=True)):
            assert same_bits(one, all_rows[chosen]), (shape, chosen, op)


def test_the_number_of_multiprocessors_shapes_nothing():
    chance = Chance(12)
    weight, norm, x, residual = chance.matrix(320, 2112).pack(), chance.norm(2112), chance(9, 2112), chance(9, 320)
    results = []
    for count in (1, 3, 10, 132):
        launcher = HostLauncher(count, multiprocessors=count)
        results.append((gemv.linear(launcher, x, weight, residual.clone()), gemv.head(launcher, x, norm, weight)))
    assert {gemv.tiles_at_once(320, 9, count) for count in (1, 132)} == {1, 2}, "both kinds of blocks"
    for linear, head in results[1:]:
        assert same_bits(linear, results[0][0])
        assert same_bits(head, results[0][1])


def test_rows_that_do_not_fit_in_shared_memory_at_once_have_the_bits_of_those_that_do(execution):
    launcher = execution.launcher
    chance = Chance(13, launcher.device)
    weight, norm, hidden = chance.matrix(32, 7200).pack(), chance.norm(7200), chance(16, 7200)
    assert len(list(gemv.parts(16, 7200, launcher.shared_limit))) == 2
    together = gemv.gate_up(launcher, hidden, norm, weight)
    for part in (slice(0, 5), slice(7, 8), slice(11, 16)):
        assert same_bits(gemv.gate_up(launcher, hidden[part], norm, weight), together[part])


def test_a_row_that_is_not_finite_disturbs_no_other(execution):
    launcher = execution.launcher
    layer = Layer(LAYERS[5], 12, 14, launcher.device)
    chance = Chance(15, launcher.device)
    weight, norm = chance.matrix(40, 136).pack(), chance.norm(136)
    before = *layer.run(launcher), gemv.head(launcher, layer.hidden, norm, weight)
    layer.hidden[3, 5], layer.hidden[9] = float("nan"), float("inf")
    after = *layer.run(launcher), gemv.head(launcher, layer.hidden, norm, weight)
    others = [row for row in range(12) if row not in (3, 9)]
    for rows, one, other in zip((others, *[layer.slots[others]] * 2, others), before, after, strict=True):
        assert same_bits(one[rows], other[rows])
    assert after[-1][[3, 9]].isnan().all()


@pytest.mark.parametrize("shape", [LAYERS[0], LAYERS[6]], ids=str)
def test_padding_rows_write_no_cell_whatever_their_position(execution, shape):
    launcher = execution.launcher
    layer = Layer(shape, 6, 16, launcher.device)
    layer.slots[[1, 5]], layer.positions[1], layer.positions[5] = -1, 10**12, -3
    q, keys, values, *_ = layer.run(launcher)
    assert q.isfinite().all()
    _, stale, *_ = contents(layer.cache())
    for cells in (keys, values):
        touched = (cells != stale).flatten(1).any(dim=1)
        assert touched.nonzero().flatten().tolist() == sorted(layer.slots[[0, 2, 3, 4]].tolist())

"""The matrix-vector kernels agree with the reference."""

import pytest
import torch
from agreement import difference, same_bits
from layers import LAYERS, Chance, Layer, to
from torch.nn import functional

from fwd.kernels import gemv
from fwd.kernels.paged import quantize
from fwd.kernels.reference import Reference

BOUND = 1e-5  # of `difference`: a sum in another order now and then rounds to the other bf16 neighbour (2⁻⁹ apart)
# inputs, outputs: ordinary, odd groups of 8, odd blocks of 32, less than one of either, gpt-oss's, more than a round
SHAPES = [(256, 64), (128, 24), (2056, 48), (8, 8), (2880, 32), (4384, 80), (64, 272)]


def close(found, expected, what):
    apart = difference(found, expected)
    assert apart < BOUND, f"{what}: {apart}"


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_agrees_with_the_reference(execution, shape, rows):
    def run(launcher, place=None):
        chance = Chance(rows, place or launcher.device)
        weight, x, residual = chance.matrix(shape[1], shape[0]), chance(rows, shape[0]), chance(rows, shape[1])
        bias = chance(shape[1]) if rows % 2 else None
        if place:
            return (
                residual.float() + x.float() @ weight.dequantize().t() + (0 if bias is None else bias.float())
            ).bfloat16()
        return gemv.linear(launcher, x, weight.pack(), residual, bias)

    close(execution.everywhere(run), run(None, "cpu"), (shape, rows))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] % 16 == 0], ids=str)
def test_linear_rounds_as_often_as_the_reference(execution, shape):
    chance = Chance(3)
    weight, x, residual, bias = (
        chance.matrix(shape[1], shape[0]),
        chance(16, shape[0]),
        chance(16, shape[1]),
        chance(shape[1]),
    )
    ops = Reference()
    if not (packed := ops.pack(weight)).data.is_mkldnn:
        pytest.skip("the reference has no fused product of bfloat16 on this CPU")
    expected = ops.linear(x, packed, residual.clone(), bias)
    device = execution.launcher.device
    found = gemv.linear(execution.launcher, *(to(each, device) for each in (x, weight.pack(), residual, bias)))
    assert (found.cpu() != expected).float().mean() < 0.01  # a second rounding changes a tenth of them


@pytest.mark.parametrize("rows", [1, 4, 11, 16])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] % 16 == 0], ids=str)
def test_gate_up_agrees_with_the_reference(execution, shape, rows):
    def run(launcher, place=None):
        chance = Chance(rows + 20, place or launcher.device)
        hidden, norm, weight = chance(rows, shape[0]), chance.norm(shape[0]), chance.matrix(shape[1], shape[0])
        if place:
            return Reference().gate_up(functional.pad(hidden, (0, 0, 0, -rows % 4)), norm, weight)[:rows]
        return gemv.gate_up(launcher, hidden, norm, weight.pack())

    close(execution.everywhere(run), run(None, "cpu"), (shape, rows))


@pytest.mark.parametrize("rows", [1, 7, 16])
@pytest.mark.parametrize("shape", [*SHAPES, (96, 301)], ids=str)
def test_head_agrees_with_the_reference(execution, shape, rows):
    def run(launcher, place=None):
        chance = Chance(rows + 40, place or launcher.device)
        hidden, norm, weight = chance(rows, shape[0]), chance.norm(shape[0]), chance.matrix(shape[1], shape[0])
        if place:
            head = Reference().pack_head(weight)
            return Reference().head(functional.pad(hidden, (0, 0, 0, -rows % 4)), norm, head)[:rows]
        return gemv.head(launcher, hidden, norm, weight.pack())

    close(execution.everywhere(run), run(None, "cpu"), (shape, rows))


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_qkv_agrees_with_the_reference(execution, shape, rows):
    found = execution.everywhere(lambda launcher: Layer(shape, rows, 5, launcher.device).run(launcher))
    bound = 1e-3 if shape[-1] else BOUND  # a largest number that rounds the other way moves all of its fp8 cell
    for place, pair in enumerate(zip(found, Layer(shape, rows, 5).expected(), strict=True)):
        apart = difference(*pair)
        assert apart < bound, (shape, rows, place, apart)


@pytest.mark.parametrize("shape", [shape for shape in LAYERS if shape[-1] and shape[-2]], ids=str)
def test_fp8_cells_are_those_of_the_rule(execution, shape):
    launcher = execution.launcher
    layer, exact = Layer(shape, 16, 6, launcher.device), Layer((*shape[:-1], False), 16, 6, launcher.device)
    _, keys, values, key_scales, value_scales = layer.run(launcher)
    _, *cells = exact.run(launcher)
    for found, scales, wide in ((keys, key_scales, cells[0]), (values, value_scales, cells[1])):
        numbers, scale = quantize(wide[exact.slots])
        assert same_bits(scales[layer.slots], scale)
        assert same_bits(found[layer.slots], numbers.float() * scale.unsqueeze(-1))


def test_a_head_of_zeros_has_scale_one(execution):
    launcher = execution.launcher
    layer = Layer((64, 2, 1, 64, False, False, True), 3, 7, launcher.device)
    layer.plain.weight.data.zero_()
    q, keys, _, scales, _ = layer.run(launcher)
    assert not q.any()
    assert not keys[layer.slots].any()
    assert (scales[layer.slots] == 1).all()


@pytest.mark.parametrize("packed", [True, False])
def test_embed_copies_rows_of_ids_and_of_tokens_just_drawn(execution, packed):
    def run(launcher):
        weight = Chance(8, launcher.device).matrix(52, 2888)
        ids = torch.tensor([3, -2, 51, 0, -1, -3], device=launcher.device)
        drawn = torch.tensor([17, 50, 9], device=launcher.device)
        return gemv.embed(launcher, ids, weight.pack() if packed else weight, drawn)

    table = Chance(8).matrix(52, 2888).data
    assert same_bits(execution.everywhere(run), table[[3, 50, 51, 0, 17, 9]])


def test_embed_of_what_is_no_id_reads_a_row_that_exists(execution):
    launcher = execution.launcher
    weight = Chance(9, launcher.device).matrix(16, 64)
    ids, drawn = (torch.tensor(each, device=launcher.device) for each in ([99, -9, -1], [-5]))
    assert same_bits(gemv.embed(launcher, ids, weight, drawn), weight.data[[15, 0, 0]])
    assert same_bits(gemv.embed(launcher, ids, weight), weight.data[[15, 0, 0]])

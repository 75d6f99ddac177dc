"""The matrix-vector kernels over quantised weights: number by number, against the float32 definition, row by row."""

import math
from dataclasses import replace

import pytest
import torch
from agreement import difference, same_bits
from layers import Chance
from quants import FORMS, damped, made
from torch.nn import functional

from fwd.kernels import gemv
from fwd.kernels.host import HostLauncher
from fwd.kernels.qtensor import QTensor
from fwd.kernels.reference import Reference

BOUND = 1e-5  # of `difference`: a sum in another order now and then rounds to the other bf16 neighbour (2⁻⁹ apart)
# inputs, outputs: ordinary, odd groups of 8, odd blocks, less than one of either, gpt-oss's, more than a round
SHAPES = [(256, 64), (160, 24), (32, 8), (2880, 32), (4384, 80), (64, 272)]


# ---- every number with every scale: a row that is 1 at one input gives the weights of that input ----


def read(launcher, weight):
    """All weights [out, in] as `linear` gives them, rounded to bfloat16."""
    outputs, inputs = weight.shape
    packed, ones = weight.pack().to(launcher.device), torch.eye(inputs, dtype=torch.bfloat16, device=launcher.device)
    parts = [
        gemv.linear(launcher, x.contiguous(), packed, torch.zeros(len(x), outputs, dtype=x.dtype, device=x.device))
        for x in ones.split(16)
    ]
    return torch.cat(parts).t().cpu()


def codes(outputs, inputs):
    """uint8 [out, in / 2]: every number of four bits in every place of a word, within any 32 inputs all of them."""
    o, i = torch.meshgrid(torch.arange(outputs), torch.arange(inputs), indexing="ij")
    numbers = (5 * i + o + i // 16) % 16
    return (numbers[:, ::2] | numbers[:, 1::2] << 4).to(torch.uint8)


def test_every_mxfp4_number_is_exact_at_every_scale(execution):
    shape = 128, 128
    scales = torch.arange(62, 62 + 127).repeat(5)[: 128 * 4].view(128, 4).to(torch.uint8)
    weight = QTensor(codes(*shape), "mxfp4", shape, block=(1, 32), scales=scales)
    assert len(set(zip(scales.flatten().tolist(), [0, 1, 2, 3] * 128, strict=True))) >= 4 * 127
    assert torch.equal(read(execution.launcher, weight), weight.dequantize().bfloat16())


def test_every_nvfp4_number_is_exact_at_every_scale(execution):
    shape = 128, 128
    scales = torch.arange(127).repeat(9)[: 128 * 8].view(128, 8).to(torch.uint8).view(torch.float8_e4m3fn)
    weight = QTensor(codes(*shape), "nvfp4", shape, block=(1, 16), scales=scales, outer=torch.ones(128))
    found = read(execution.launcher, weight)
    assert torch.equal(found, weight.dequantize().bfloat16())
    assert found.count_nonzero() > 0.8 * found.numel()


def test_every_fp8_number_is_exact(execution):
    o, i = torch.meshgrid(torch.arange(256), torch.arange(32), indexing="ij")
    data = ((o + 8 * i) % 256).to(torch.uint8)
    data[data & 0x7F == 0x7F] = 0x42
    weight = QTensor(data.view(torch.float8_e4m3fn), "fp8", (256, 32), block=(256, 32), scales=torch.ones(1, 1))
    assert torch.equal(read(execution.launcher, weight), weight.dequantize().bfloat16())


@pytest.mark.parametrize("size", [32, 128])
def test_every_int4_number_is_exact_with_every_zero_point(execution, size):
    shape, columns = (136, 128), 128 // size
    zeros = (torch.arange(136).view(-1, 1) + torch.arange(columns) * 5).remainder(17).to(torch.uint8)
    scales = (2.0 ** (torch.arange(136 * columns) % 40 - 24)).view(136, columns) * 1.25
    weight = QTensor(codes(*shape), "int4", shape, block=(1, size), scales=scales, zeros=zeros)
    assert torch.equal(read(execution.launcher, weight), weight.dequantize().bfloat16())


# ---- agreement ----


def close(found, expected, what):
    apart = difference(found, expected)
    assert apart < BOUND, f"{what}: {apart}"


def given(form, shape, rows, launcher=None):
    """A weight, rows, a residual, a bias and a norm; on a launcher's device the weight is packed."""
    chance = Chance(rows, launcher.device if launcher else "cpu")
    weight = damped(form, shape[1], shape[0], seed=rows)
    if launcher:
        weight = weight.pack().to(launcher.device)
    bias = chance(shape[1]) if rows % 2 else None
    return weight, chance(rows, shape[0]), chance(rows, shape[1]), bias, chance.norm(shape[0])


@pytest.mark.parametrize("rows", [1, 8, 13])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_linear_agrees_with_the_definition(execution, form, shape, rows):
    def run(launcher):
        weight, x, residual, bias, _ = given(form, shape, rows, launcher)
        return gemv.linear(launcher, x, weight, residual, bias)

    weight, x, residual, bias, _ = given(form, shape, rows)
    truth = residual.float() + x.float() @ weight.dequantize().t() + (0 if bias is None else bias.float())
    close(execution.everywhere(run), truth.bfloat16(), (form, shape, rows))


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] % 16 == 0], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gate_up_agrees_with_the_reference(execution, form, shape, rows):
    def run(launcher):
        weight, x, _, _, norm = given(form, shape, rows, launcher)
        return gemv.gate_up(launcher, x, norm, weight)

    weight, x, _, _, norm = given(form, shape, rows)
    expected = Reference().gate_up(functional.pad(x, (0, 0, 0, -rows % 4)), norm, weight)[:rows]
    close(execution.everywhere(run), expected, (form, shape, rows))


@pytest.mark.parametrize("rows", [3, 16])
@pytest.mark.parametrize("shape", [(2880, 32), (96, 301)], ids=str)
@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("fp8")])
def test_head_agrees_with_the_reference(execution, form, shape, rows):
    def run(launcher):
        weight, x, _, _, norm = given(form, shape, rows, launcher)
        return gemv.head(launcher, x, norm, weight)

    weight, x, _, _, norm = given(form, shape, rows)
    expected = Reference().head(functional.pad(x, (0, 0, 0, -rows % 4)), norm, weight)[:rows]
    close(execution.everywhere(run), expected, (form, shape, rows))


# ---- what must not matter to a row ----


@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_the_same_bits_alone_and_in_any_company(execution, form):
    launcher = execution.launcher
    chance = Chance(11, launcher.device)
    weight, norm = damped(form, 48, 2880).pack().to(launcher.device), chance.norm(2880)
    x, residual = chance(16, 2880), chance(16, 48)

    def run(chosen):
        few = x[chosen].contiguous()
        linear = gemv.linear(launcher, few, weight, residual[chosen].contiguous())
        return linear, gemv.gate_up(launcher, few, norm, weight)

    together = run(list(range(16)))
    for chosen in ([0], [6], [15], [9, 2], [15, 0, 3, 11, 5], [4, 3, 2, 1, 0, 15, 14, 13, 12]):
        for op, (one, all_rows) in enumerate(zip(run(chosen), together, strict=True)):
            assert same_bits(one, all_rows[chosen]), (form, chosen, op)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_is_not_finite_disturbs_no_other(execution, form):
    launcher = execution.launcher
    chance = Chance(15, launcher.device)
    weight, norm, hidden = damped(form, 48, 160).pack().to(launcher.device), chance.norm(160), chance(12, 160)

    def run():
        zeros = torch.zeros(12, 48, dtype=torch.bfloat16, device=launcher.device)
        return gemv.linear(launcher, hidden, weight, zeros), gemv.gate_up(launcher, hidden, norm, weight)

    before = run()
    hidden[3, 5], hidden[9] = math.nan, math.inf
    others = [row for row in range(12) if row not in (3, 9)]
    for one, other in zip(before, run(), strict=True):
        assert same_bits(one[others], other[others])
        assert not other[[3, 9]].isfinite().any()


@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_multiprocessors_shapes_nothing(form):
    chance = Chance(12)
    weight, norm, x, residual = damped(form, 320, 1056).pack(), chance.norm(1056), chance(9, 1056), chance(9, 320)
    results = []
    for count in (1, 3, 132):
        launcher = HostLauncher(count, multiprocessors=count)
        linear = gemv.linear(launcher, x, weight, residual.clone())
        results.append((linear, gemv.gate_up(launcher, x, norm, weight)))
    for linear, gate_up in results[1:]:
        assert same_bits(linear, results[0][0])
        assert same_bits(gate_up, results[0][1])


def test_rows_that_do_not_fit_in_shared_memory_at_once_have_the_bits_of_those_that_do(execution):
    launcher = execution.launcher
    chance = Chance(13, launcher.device)
    weight, norm = damped("mxfp4", 32, 7200).pack().to(launcher.device), chance.norm(7200)
    hidden = chance(16, 7200)
    assert len(list(gemv.parts(16, 7200, launcher.shared_limit, 128))) == 2
    together = gemv.gate_up(launcher, hidden, norm, weight)
    for part in (slice(0, 5), slice(7, 8), slice(11, 16)):
        assert same_bits(gemv.gate_up(launcher, hidden[part], norm, weight), together[part])


def test_a_matrix_of_a_stack_is_multiplied_where_it_stands(execution):
    launcher = execution.launcher
    chance = Chance(14, launcher.device)
    for form in FORMS:
        stack = damped(form, 3, 24, 160).pack().to(launcher.device)
        x, residual = chance(2, 160), chance(2, 24)
        for index in range(3):
            alone = damped(form, 3, 24, 160).expert(index).pack().to(launcher.device)
            found = gemv.linear(launcher, x, stack.expert(index), residual.clone())
            assert same_bits(found, gemv.linear(launcher, x, alone, residual.clone()))


def test_a_form_is_what_it_says():
    for form, (_, _, name) in FORMS.items():
        assert name.startswith(made(form, 16, 256).format)
    assert replace(made("int4", 16, 256), zeros=None).zeros is None


def test_the_sanitizers_find_nothing(sanitized, execution):
    here = execution
    for file, kernels in (
        (
            "gemv_fp8.cu",
            ("LINEAR(linear_1x8", "GATE_UP(gate_up_8", "GATE_UP(gate_up_16", "HEAD(head_8", "HEAD(head_16"),
        ),
        ("gemv_int4_32.cu", ("LINEAR(linear_1x16", "GATE_UP(gate_up_16")),
    ):
        for kernel in kernels:  # they take long to compile
            here = here.mutated(file, f"FWD_{kernel},", "// ")
    done = sanitized(
        f"""
        from pathlib import Path
        from fwd.kernels import gemv
        from fwd.kernels.host import HostLauncher
        from layers import Chance
        from quants import damped

        launcher, chance = HostLauncher(1, sanitize=True, folder=Path({str(here.folder)!r})), Chance(20)
        for form, rows in (("fp8-block", 11), ("int4-zeros", 3)):
            for inputs, outputs in ((2080, 24), (96, 64)):
                weight = damped(form, outputs, inputs).pack()
                gemv.linear(launcher, chance(rows, inputs), weight, chance(rows, outputs))
        gemv.gate_up(launcher, chance(7, 96), chance.norm(96), weight)
        """
    )
    assert done.returncode == 0, done.stderr[-3000:]

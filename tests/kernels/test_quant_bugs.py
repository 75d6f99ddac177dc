"""Bugs planted in what the matrix-vector kernels make of quantised weights are found by what finds real ones."""

import pytest
from agreement import difference
from layers import Chance
from quants import damped
from torch.nn import functional

from fwd.kernels import gemv
from fwd.kernels.reference import Reference

INPUTS, OUTPUTS, ROWS = 2080, 48, 9  # more than a round of blocks, the last one ragged; several tiles


def error(execution, form):
    """How far `linear` and `gate_up` are from the truth; raises if they depend on order or poison."""

    def given(device):
        chance = Chance(17, device)
        return damped(form, OUTPUTS, INPUTS), chance(ROWS, INPUTS), chance(ROWS, OUTPUTS), chance.norm(INPUTS)

    def run(launcher):
        weight, x, residual, norm = given(launcher.device)
        packed = weight.pack().to(launcher.device)
        return gemv.linear(launcher, x, packed, residual), gemv.gate_up(launcher, x, norm, packed)

    weight, x, residual, norm = given("cpu")
    truth = (residual.float() + x.float() @ weight.dequantize().t()).bfloat16()
    gated = Reference().gate_up(functional.pad(x, (0, 0, 0, -ROWS % 4)), norm, weight)[:ROWS]
    return max(difference(*pair) for pair in zip(execution.everywhere(run), (truth, gated), strict=True))


PLANTED = {
    "nibbles in the other order": ("mxfp4", "quant.cuh", "rotated(word, 6)", "rotated(word, 22)"),
    "a bit of the exponent from elsewhere": ("nvfp4", "quant.cuh", "rotated(word, 26)", "rotated(word, 25)"),
    "the scale of another output": ("mxfp4", "quant.cuh", "512 + group_row() * 4", "512 + quarter() * 4"),
    "the scale of the neighbouring inputs": ("mxfp4", "quant.cuh", "return sub % 2 == 0", "return sub % 2 == 1"),
    "the scale of the inputs 64 on": ("nvfp4", "quant.cuh", "sub < 2 ? mul_bf16x2_low", "sub >= 2 ? mul_bf16x2_low"),
    "the scale of the other 16 inputs": ("nvfp4", "quant.cuh", "quarter() / 2 * 4", "quarter() % 2 * 4"),
    "the outer factor forgotten": ("nvfp4", "gemv.cuh", "sum = __fmul_rn(sum, factor[i]);", ""),
    "the outer factor of the first tile": ("nvfp4", "gemv.cuh", "tiling.first(wanted) + (2", "(2"),
    "the outer factor of one group": ("nvfp4", "gemv.cuh", "(2 * place + m / 8) * tiling", "2 * place * tiling"),
    "the sum's power of two forgotten": ("mxfp4", "quant.cuh", "kFactor = 0x1p60f", "kFactor = 1.0f"),
    "rows not zero to the end of a block": (
        "mxfp4",
        "gemv_rows.cuh",
        "chunk < chunks(); chunk += kThreads) {\n            bool valid",
        "chunk * 8 < inputs; chunk += kThreads) {\n            bool valid",
    ),
    "the row of FP8 blocks of a tile's first group": (
        "fp8-low-block",
        "gemv.cuh",
        "factors + int64_t{place} * pitch + 8",
        "factors + int64_t{tiling.first(tile)} * pitch + 8",
    ),
    "the column of FP8 blocks of a round's first": (
        "fp8-low-block",
        "gemv.cuh",
        "cells[group][step * (kWarps / 2)]",
        "cells[group][0]",
    ),
    "an output's FP8 scale forgotten": ("fp8-channel", "quant.cuh", "kCells = true, kFactors = true", "kCells = true"),
    "a sign of FP8 from the word's end": ("fp8-block", "quant.cuh", "0x87808780u", "0x07808780u"),
    "the zero point of the first inputs": ("int4-zeros", "quant.cuh", "zeros : zeros >> 8", "zeros : zeros"),
    "the int4 scale of the neighbouring inputs": (
        "int4",
        "quant.cuh",
        "int4_scale(sub % 2 == 0",
        "int4_scale(sub % 2 == 1",
    ),
    "the int4 sum of one output for both": (
        "int4-128",
        "gemv.cuh",
        "all[2] = fmaf(to[2], upper",
        "all[2] = fmaf(to[2], lower",
    ),
    "sums of inputs with a scale never begun anew": (
        "int4",
        "gemv.cuh",
        "if (Format::kSpan && sub % Format::kSpan == 0)",
        "if (Format::kSpan && sub == 0)",
    ),
}


@pytest.mark.parametrize("form", sorted({form for form, *_ in PLANTED.values()}))
def test_without_a_planted_bug_nothing_is_found(execution, form):
    assert error(execution, form) < 1e-5


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(execution, bug):
    form, source, old, new = PLANTED[bug]
    mutated = execution.mutated(source, old, new)
    for op in ("LINEAR(linear_1x8", "GATE_UP(gate_up_8", "HEAD(head_8", "HEAD(head_16"):
        if f"FWD_{op}," in (mutated.folder / _file(form)).read_text():
            mutated = mutated.mutated(_file(form), f"FWD_{op},", "// ")  # nine rows launch none of these
    try:
        assert error(mutated, form) > 1e-4
    except AssertionError as found:  # `everywhere` may have found that it depends on what was in memory
        if "depends on" not in str(found):
            raise


def _file(form):
    name = {"int4": "int4_32", "int4-zeros": "int4_32", "int4-128": "int4_128"}.get(form, form.partition("-")[0])
    return f"gemv_{name}.cu"

"""Bugs planted in the matrix-vector kernels are found by what finds real ones."""

import pytest
from agreement import difference
from layers import Chance, Layer
from torch.nn import functional

from fwd.errors import KernelError
from fwd.kernels import gemv
from fwd.kernels.reference import Reference


def linear_error(execution):
    """How far `linear`, `gate_up` and `head` are from the truth; raises if they depend on order or poison."""

    def given(device):
        chance = Chance(17, device)
        return chance.matrix(96, 520), chance(9, 520), chance(9, 96), chance(96), chance.norm(520)

    def run(launcher):
        weight, x, residual, bias, norm = given(launcher.device)
        packed = weight.pack()
        linear = gemv.linear(launcher, x, packed, residual, bias)
        return linear, gemv.gate_up(launcher, x, norm, packed), gemv.head(launcher, x, norm, packed)

    weight, x, residual, bias, norm = given("cpu")
    padded, ops = functional.pad(x, (0, 0, 0, 3)), Reference()
    truth = (residual.float() + bias.float() + x.float() @ weight.dequantize().t()).bfloat16()
    expected = truth, ops.gate_up(padded, norm, weight)[:9], ops.head(padded, norm, ops.pack_head(weight))[:9]
    return max(difference(*pair) for pair in zip(execution.everywhere(run), expected, strict=True))


def qkv_error(execution):
    shape = (64, 2, 2, 64, True, True, True)
    found = execution.everywhere(lambda launcher: Layer(shape, 5, 18, launcher.device).run(launcher))
    return max(difference(one, other) for one, other in zip(found, Layer(shape, 5, 18).expected(), strict=True))


PLANTED = {
    "the bias of the first tile": (
        "gemv_bodies.cuh",
        "to_float(bias[output])",
        "to_float(bias[m])",
        linear_error,
    ),
    "gate and up exchanged": (
        "gemv_bodies.cuh",
        "float gate = round_bf16(sum), up = shuffle_xor(gate, 8);",
        "float up = round_bf16(sum), gate = shuffle_xor(up, 8);",
        linear_error,
    ),
    "no barrier before sums are added": (
        "gemv.cuh",
        "store_sums(turn, sums);\n        block_barrier();",
        "store_sums(turn, sums);",
        linear_error,
    ),
    "no barrier behind the norm": (
        "gemv_rows.cuh",
        "scale(row, rsqrtf(sum / inputs + eps));\n        }\n        block_barrier();",
        "scale(row, rsqrtf(sum / inputs + eps));\n        }",
        linear_error,
    ),
    "sums added in the order they arrive": (
        "gemv.cuh",
        "    int group = group_row(), pair = quarter() * 2;\n",
        """
    int group = group_row(), pair = quarter() * 2;
    static int arrivals[4096];
    int first = lane_index() == 0 ? atomicAdd(arrivals + blockIdx.x, 1) : 0;
    auto warp_index = [arrival = shuffle(first, 0) % kWarps] { return arrival; };
""",
        linear_error,
    ),
    "the inputs after the last block": (
        "gemv.cuh",
        "if ((first + i) * kWarps < there)",
        "if ((first + i) * kWarps <= there)",
        linear_error,
    ),
    "the scale of another head": (
        "qkv_bodies.cuh",
        "cache.scales[cell] = scale",
        "cache.scales[cell / kv_heads * kv_heads] = scale",
        qkv_error,
    ),
    "a head finished before its last tile": (
        "qkv_bodies.cuh",
        "last_arriver(counters + head, tiles())",
        "last_arriver(counters + head, tiles() - 1)",
        qkv_error,
    ),
    "both halves of a pair turned alike": (
        "qkv_bodies.cuh",
        "rotated(upper, lower, false, c, s)",
        "rotated(upper, lower, true, c, s)",
        qkv_error,
    ),
}


@pytest.mark.parametrize("error", [linear_error, qkv_error])
def test_without_a_planted_bug_nothing_is_found(execution, error):
    assert error(execution) < 1e-3


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(execution, bug):
    source, old, new, error = PLANTED[bug]
    mutated = execution.mutated(source, old, new)
    assert seen(error, mutated)


def seen(error, execution):
    try:
        return error(execution) > 1e-3
    except AssertionError:  # `everywhere` found that it depends on the order
        return True


def test_a_kernel_that_does_not_wait_for_the_one_before_is_found(execution):
    launcher = execution.mutant("gemv_bodies.cuh", "    grid_dependency_wait();\n", "")
    chance = Chance(19)
    with pytest.raises(KernelError, match="grid_dependency_wait"):
        gemv.linear(launcher, chance(1, 64), chance.matrix(16, 64).pack(), chance(1, 16))


def test_the_sanitizers_find_nothing(sanitized, execution):
    here = execution
    for kernel in ("LINEAR(linear_1x16", "LINEAR(linear_2x8", "GATE_UP(gate_up_8", "HEAD(head_16"):
        here = here.mutated("gemv.cu", f"FWD_{kernel},", "// ")  # a half of the kernels: they take long to compile
    for kernel in ("qkv_paired_8", "qkv_whole_16"):
        here = here.mutated("qkv.cu", f"FWD_QKV({kernel},", "// ")
    done = sanitized(
        f"""
        from pathlib import Path
        from fwd.kernels import gemv
        from fwd.kernels.host import HostLauncher
        from layers import LAYERS, Chance, Layer

        launcher = HostLauncher(1, sanitize=True, folder=Path({str(here.folder)!r}))
        chance = Chance(20)
        for rows, inputs, outputs in ((3, 2056, 24), (16, 72, 320)):
            gemv.linear(launcher, chance(rows, inputs), chance.matrix(outputs, inputs).pack(), chance(rows, outputs))
        norm = chance.norm(72)
        gemv.gate_up(launcher, chance(11, 72), norm, chance.matrix(48, 72).pack())
        gemv.head(launcher, chance(3, 72), norm, chance.matrix(301, 72).pack())
        Layer(LAYERS[2], 16, 21).run(launcher)
        Layer(LAYERS[6], 5, 21).run(launcher)
        """
    )
    assert done.returncode == 0, done.stderr[-3000:]

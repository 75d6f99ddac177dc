"""The attention input over quantised weights: as the reference has it, and what must not matter to a row."""

import math
from dataclasses import replace

import pytest
from agreement import difference, same_bits
from layers import Layer
from weights import quantised

FORMS = {
    "fp8": {"block": (1, 1 << 20)},
    "fp8-block": {"block": (128, 128)},
    "mxfp4": {},
    "nvfp4": {},
    "int4-zeros": {},
    "int4-128": {},
}
SHAPES = [
    (2880, 2, 1, 64, True, False, False),
    (384, 3, 1, 16, True, False, False),
    (256, 2, 1, 256, True, False, True),
    (96, 6, 2, 64, False, True, False),
    (128, 2, 2, 80, True, True, True),
]
BOUND = 1e-5


def weight_of(form, shape, seed=3):
    """The fused matrix of a layer; of int4 in groups of 128 each has one of the scales of four groups of 32."""
    hidden, heads, kv_heads, dim = shape[:4]
    kind, wide = form.removesuffix("-block").removesuffix("-128"), form.endswith("-128")
    made = quantised(kind, (heads + 2 * kv_heads) * dim, hidden, seed=seed, **FORMS[form])
    if wide:
        made = replace(made, block=(1, 128), scales=made.scales[:, : -(-hidden // 128)].contiguous())
    power = round(math.log2(made.dequantize().std().item() * hidden**0.5))  # numbers of an ordinary size
    if kind == "mxfp4":
        return replace(made, scales=made.scales - power)
    if kind == "nvfp4":
        return replace(made, outer=made.outer * 2.0**-power)
    return replace(made, scales=made.scales * 2.0**-power)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qkv_agrees_with_the_reference(execution, shape, form):
    rows, weight = 5 if shape[0] < 2880 else 16, weight_of(form, shape)
    found = execution.everywhere(lambda launcher: Layer(shape, rows, 5, launcher.device, weight).run(launcher), 2)
    bound = 1e-3 if shape[-1] else BOUND  # a largest number that rounds the other way moves all of its fp8 cell
    for place, pair in enumerate(zip(found, Layer(shape, rows, 5, weight=weight).expected(), strict=True)):
        apart = difference(*pair)
        assert apart < bound, (form, shape, rows, place, apart)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_the_same_bits_alone_and_in_any_company(execution, form):
    launcher, shape = execution.launcher, SHAPES[4]
    whole = Layer(shape, 16, 10, launcher.device, weight_of(form, shape))
    q, *cells = whole.run(launcher)
    for chosen in ([0], [15], [9, 2], [15, 0, 3, 11, 5, 1, 8], [4, 3, 2, 1, 0, 15, 14, 13, 12]):
        part = Layer(shape, 16, 10, launcher.device, whole.plain.weight)
        part.hidden, part.positions, part.slots = (x[chosen] for x in (whole.hidden, whole.positions, whole.slots))
        few, *others = part.run(launcher)
        assert same_bits(few, q[chosen]), (form, chosen)
        for one, other in zip(cells, others, strict=True):
            assert same_bits(one[part.slots], other[part.slots]), (form, chosen)


BUGS = {
    "the halves of a head in one": ("qkv_bodies.cuh", "{heads.tiles()}, inputs", "{2 * heads.tiles()}, inputs"),
    "factors of the next group": (
        "gemv.cuh",
        "factors[int64_t{group} * pitch + m % 8]",
        "factors[int64_t{group ^ 1} * pitch + m % 8]",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(execution, bug):
    shape = SHAPES[3]
    weight = weight_of("nvfp4", shape)
    found = Layer(shape, 3, 5, weight=weight).run(execution.mutant(*BUGS[bug]))
    assert (
        max(difference(*pair) for pair in zip(found, Layer(shape, 3, 5, weight=weight).expected(), strict=True)) > 1e-3
    )

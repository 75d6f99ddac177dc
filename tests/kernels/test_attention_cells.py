"""What the reference writes to cells: rounded once, in fp8 with a scale of each vector's own."""

import pytest
import torch
from blocks import KV_DTYPES, SHAPES, Block, decode_rows, scattered_tables
from hypothesis import given
from hypothesis import strategies as st

from fwd.kernels import paged

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.lists(floats, min_size=3, max_size=3), min_size=1, max_size=5))
def test_finite_vectors_are_finite_in_fp8_and_near(rows):
    vectors = torch.tensor(rows)
    numbers, scales = paged.quantize(vectors)
    assert scales.isfinite().all()
    assert (scales > 0).all()
    back = numbers.float() * scales[:, None]
    assert back.isfinite().all()
    largest = vectors.abs().amax(1, keepdim=True)
    # a normal number keeps 4 bits, a subnormal one steps by 2⁻⁹ of the scale; below, float32 itself has no more digits
    bound = torch.maximum(vectors.abs() / 16, largest / 448 / 1024) + 450 * 2**-149
    assert ((back.double() - vectors).abs() <= bound.double() * 1.0001).all()
    alone = [paged.quantize(vector[None]) for vector in vectors]
    assert all(torch.equal(one[1], scales[i : i + 1]) for i, one in enumerate(alone)), "of its own vector only"


def test_a_zero_vector_has_scale_one_and_the_largest_number_is_448():
    numbers, scales = paged.quantize(torch.tensor([[0.0, -0.0], [7.0, -14.0]]))
    assert scales.tolist() == [1.0, 14 / 448]
    assert numbers.float().tolist() == [[0.0, -0.0], [224.0, -448.0]]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_what_is_written_is_rounded_once_from_the_models_dtype(kv_dtype):
    block, table = Block(SHAPES[0], torch.float32, seed=71), scattered_tables(1, 4, seed=72)
    exact, kv = block.cache(4), block.cache(4, kv=kv_dtype)
    rows, hidden = decode_rows([(0, p) for p in range(12)], table), block.random(12, SHAPES[0][0])
    for cache in (exact, kv):
        block.ops.qkv(hidden, block.layer, block.rope, rows, cache)
    cells, pairs = (
        rows.cells[0].slots,
        ((exact.keys, kv.keys, kv.key_scales), (exact.values, kv.values, kv.value_scales)),
    )
    for whole, found, scales in pairs:
        if kv_dtype == "fp8":
            numbers, scale = paged.quantize(whole[cells])
            assert torch.equal(found[cells].float(), numbers.float())
            assert torch.equal(scales[cells], scale)
        else:
            assert torch.equal(found[cells], whole[cells].to(found.dtype))

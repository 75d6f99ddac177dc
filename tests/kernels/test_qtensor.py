"""Weights in every format: what they mean, number by number, and what is left of it when they are cut and joined."""

import pytest
import torch
from agreement import same_bits
from weights import FORMATS, meant, quantised

from fwd.kernels.blocking import common_rows
from fwd.kernels.qtensor import QTensor, concat, fold

EVERY = [(form, None) for form in FORMATS] + [
    ("fp8", block) for block in ((1, 70), (50, 70), (1, 1), (7, 9), (128, 128))
]


@pytest.mark.parametrize(("form", "block"), EVERY, ids=str)
def test_every_number_is_what_the_formula_says(form, block):
    weight = quantised(form, 50, 70, block=block)
    expected = meant(weight)
    assert same_bits(weight.dequantize(), expected)
    for part in (slice(0, 1), slice(7, 33), slice(49, 50)):
        assert same_bits(weight.dequantize(part), expected[part])


def test_all_codes_of_a_byte_and_all_powers_of_two_are_exact():
    codes = torch.arange(256, dtype=torch.uint8)
    fp8 = QTensor(
        codes.view(1, 256).view(torch.float8_e4m3fn), "fp8", (1, 256), block=(1, 256), scales=torch.ones(1, 1)
    )
    numbers = codes.view(torch.float8_e4m3fn).float()
    assert same_bits(fp8.dequantize()[0], numbers)
    ones = torch.full((253, 16), 0x22, dtype=torch.uint8)  # 1.0 twice
    mxfp4 = QTensor(ones, "mxfp4", (253, 32), block=(1, 32), scales=codes[:253].view(-1, 1))
    powers = torch.tensor([2.0**power for power in range(-127, 126)], dtype=torch.float64)
    assert torch.equal(mxfp4.dequantize()[:, 0].double(), powers)


@pytest.mark.parametrize("form", FORMATS)
def test_a_stack_holds_its_experts(form):
    stacked = quantised(form, 3, 20, 64)
    whole = stacked.dequantize()
    for index in range(3):
        one = stacked.expert(index)
        assert same_bits(whole[index], meant(one))
        assert same_bits(one.dequantize(), whole[index])
        assert one.data.data_ptr() == stacked.data[index].data_ptr()
        assert 3 * one.nbytes == stacked.nbytes


@pytest.mark.parametrize("heights", [(32, 16, 16), (48, 48), (20, 64, 7), (40,)], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_parts_one_above_the_other_keep_every_bit(form, heights):
    parts = [quantised(form, height, 64, seed=seed) for seed, height in enumerate(heights)]
    if form == "int4-groups":
        parts = [QTensor(**{**fields(part), "groups": parts[0].groups}) for part in parts]
    joined = concat(parts)
    assert joined.shape == (sum(heights), 64)
    assert same_bits(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))


def fields(weight):
    return {name: getattr(weight, name) for name in QTensor.__slots__}


@pytest.mark.parametrize("form", FORMATS)
def test_a_stack_folds_into_one_of_pairs(form):
    weight = quantised(form, 6, 24, 64)
    if form == "int4-groups":
        weight = QTensor(**{**fields(weight), "groups": weight.groups[:1].expand(6, -1)})
    folded = fold(weight, 2)
    assert folded.shape == (3, 48, 64)
    assert same_bits(folded.dequantize(), weight.dequantize().view(3, 48, 64))


@pytest.mark.parametrize("form", FORMATS)
def test_rows_come_in_any_order_and_number(form):
    weight = quantised(form, 40, 64)
    for order in (torch.arange(39, -1, -1), torch.tensor([5, 5, 31]), torch.arange(16, 32)):
        assert same_bits(weight.rows(order).dequantize(), weight.dequantize()[order])


def test_blocks_stay_where_rows_stay_in_them():
    weight = quantised("fp8", 40, 64, block=(16, 64))
    within = torch.cat((torch.arange(15, -1, -1), torch.arange(16, 40)))
    assert weight.rows(within).block == (16, 64)
    assert weight.rows(torch.arange(39, -1, -1)).block == (1, 64)


@pytest.mark.parametrize(
    ("blocks", "heights", "rows"),
    [
        ((128,), (300,), 128),
        ((128, 128, 128), (4096, 1024, 1024), 128),
        ((4096, 1024, 1024), (4096, 1024, 1024), 1024),
        ((128, 128), (1536, 576), 128),
        ((128, 128), (96, 96), 96),
        ((128, 128), (200, 64), 8),
        ((1, 1), (7, 5), 1),
        ((7, 5), (7, 5), 7),
    ],
)
def test_parts_share_the_largest_block_that_fits(blocks, heights, rows):
    assert common_rows(blocks, heights) == rows


def test_a_plain_weight_is_itself():
    matrix = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert same_bits(QTensor.plain(matrix).dequantize(slice(1, 3)), matrix[1:3])
    assert same_bits(QTensor.plain(matrix.bfloat16()).dequantize(), matrix.bfloat16().float())

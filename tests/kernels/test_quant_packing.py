"""Quantised weights in the blocks that kernels stream: where each number and scale stands, and that they come back."""

from dataclasses import replace

import pytest
import torch
from agreement import same_bits
from quants import FORMS, made
from weights import quantised

from fwd.errors import ModelError
from fwd.kernels import packing, spread
from fwd.kernels.gemv import staged_bytes
from fwd.kernels.qtensor import QTensor

# outputs and inputs: whole blocks, odd groups and blocks, gpt-oss's, less than a block
SHAPES = [(32, 256), (24, 160), (40, 2880), (8, 32), (56, 96)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_weight_comes_back(form, shape):
    weight = made(form, *shape)
    packed = weight.pack()
    assert packed.packed
    assert packed.shape == weight.shape
    assert same_bits(packed.dequantize(), weight.dequantize())
    assert same_bits(packing.restore(packed).dequantize(), weight.dequantize())
    if shape[0] > 16:
        for outputs in (slice(8, 16), slice(16, shape[0]), slice(3, 21)):
            assert same_bits(packed.dequantize(outputs), weight.dequantize(outputs))


@pytest.mark.parametrize("form", FORMS)
def test_numbers_and_scales_come_back_as_they_were(form):
    weight = made(form, 32, 256)
    found = packing.restore(weight.pack())
    assert same_bits(found.data, weight.data)
    if weight.format != "fp8":
        assert torch.equal(found.scales.float(), weight.scales.float())


@pytest.mark.parametrize("form", FORMS)
def test_experts_stand_one_after_the_other(form):
    weight = made(form, 3, 24, 160)
    whole = weight.pack()
    assert whole.shape == (3, 24, 160)
    for index in range(3):
        part = weight.expert(index)
        alone = part.pack()
        assert same_bits(whole.data[index], alone.data)
        if alone.outer is not None:
            assert same_bits(whole.outer[index], alone.outer)
        assert same_bits(whole.expert(index).dequantize(), part.dequantize())
    assert same_bits(whole.dequantize(), weight.dequantize())
    assert whole.data.is_contiguous()


def test_plain_experts_are_packed_as_well():
    data = torch.randn(3, 24, 40).bfloat16()
    whole = QTensor.plain(data).pack()
    assert same_bits(whole.dequantize(), data.float())
    assert same_bits(whole.data[1], QTensor.plain(data[1]).pack().data)


# ---- the layouts, once more in the words of their docstrings ----


def lane_word(packed, o, i, subs):
    """The word that holds a number, the group and block it is in."""
    group, row, block, inside = o // 8, o % 8, i // (32 * subs), i % (32 * subs)
    sub, lane = inside // 32, 4 * row + inside % 32 // 8
    data = packed.data[group, block]
    first = lane * 16 + (sub * 8 + inside % 8 // 4 * 4 if subs == 2 else sub * 4)
    return int.from_bytes(bytes(data[first : first + 4].tolist()), "little"), data, row, sub


def rotated(word, left):
    return (word << left | word >> (32 - left)) & 0xFFFFFFFF


def pair_of(word, parts):
    return sum(rotated(word, left) & mask for left, mask in parts)


def word_at(data, index):
    return int.from_bytes(bytes(data[512 + 4 * index : 516 + 4 * index].tolist()), "little")


def e2m1(word, i):
    half = pair_of(word, spread.E2M1.pairs[i % 8 // 2]) >> 16 * (i % 2)
    return (half >> 15 & 1) << 3 | half >> 6 & 7


@pytest.mark.parametrize("form", ["mxfp4", "nvfp4"])
def test_the_bytes_of_e2m1(form):
    weight = made(form, 24, 160)
    packed = weight.pack()
    assert packed.data.shape == (4, 2, 544 if form == "mxfp4" else 576)
    for o in range(24):
        for i in range(160):
            word, data, row, sub = lane_word(packed, o, i, 4)
            assert e2m1(word, i) == int(weight.data[o, i // 2]) >> 4 * (i % 2) & 15
            if form == "mxfp4":
                field = rotated(word_at(data, row), 25) >> 8 * sub & 0xFF
                assert field - 66 == int(weight.scales[o, i // 32])
            else:
                code = rotated(word_at(data, 2 * row + i % 32 // 16), 28) >> 8 * sub & 0xFF
                bits = 0x7000 | code << 4
                factor = torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16).double().item()
                assert factor == weight.scales[o, i // 16].double().item() * 2.0**117
    if form == "nvfp4":
        assert torch.equal(packed.outer.flatten()[:24], weight.outer * 512)


def test_the_bytes_of_fp8():
    weight = made("fp8-block", 24, 160)
    packed = weight.pack()
    assert packed.data.shape == (4, 3, 512)
    for o in range(24):
        for i in range(160):
            word, *_ = lane_word(packed, o, i, 2)
            half = pair_of(word, spread.E4M3.pairs[i % 4 // 2]) >> 16 * (i % 2)
            assert (half >> 8 & 0x80) | (half >> 4 & 0x7F) == int(weight.data.view(torch.uint8)[o, i])
    assert packed.outer.shape == (4, 8 + 2)
    assert (packed.outer[:, :8] == 1).all()
    assert torch.equal(packed.outer[:3, 8:], weight.scales.expand(3, -1))
    channel = made("fp8-channel", 24, 160)
    outer = channel.pack().outer
    assert torch.equal(outer[:, :8].flatten()[:24], channel.scales[:, 0])
    assert (outer[:, 8:] == 1).all()


@pytest.mark.parametrize("form", ["int4-zeros", "int4-128"])
def test_the_bytes_of_int4(form):
    weight = made(form, 24, 256)
    packed, size = weight.pack(), 32 if form == "int4-zeros" else 128
    assert packed.block == (1, size)
    assert packed.data.shape == (4, 2, 608 if size == 32 else 544)
    for o in range(24):
        for i in range(256):
            word, data, row, sub = lane_word(packed, o, i, 4)
            assert word >> (16 * (i % 2) + i % 8 // 2 * 4) & 15 == int(weight.data[o, i // 2]) >> 4 * (i % 2) & 15
            if size == 32:
                code, zero = (
                    word_at(data, 8 * (sub // 2) + row) >> 16 * (sub % 2) & 0xFFFF,
                    word_at(data, 16 + row) >> 8 * sub,
                )
            else:
                code, zero = word_at(data, row) & 0xFFFF, word_at(data, row) >> 16
            assert zero & 0xFF == int(weight.zeros[o, i // size])
            scale = 2.0 ** ((code >> 10) - 32) * (1 + (code & 1023) / 1024)
            assert scale == weight.scales[o, i // size].item()


@pytest.mark.parametrize("how", [spread.E2M1, spread.E4M3, spread.NIBBLE])
def test_every_bit_of_a_word_is_of_one_number(how):
    masks = [rotated(mask, 32 - left) for parts in how.pairs for left, mask in parts]
    assert sum(masks) == 0xFFFFFFFF, "each bit once"
    data = torch.randint(256, (500, 4), dtype=torch.uint8)
    assert torch.equal(spread.bytes_of(spread.words_of(data, how), how), data)


# ---- what is said otherwise, and what is refused ----


def test_mxfp4_groups_of_zeros_may_have_any_scale():
    weight = made("mxfp4", 16, 128)
    weight.data[3, 16:32] = 0x80  # −0 and 0
    weight.scales[3, 1] = 0
    assert torch.equal(weight.pack().dequantize(), weight.dequantize())
    weight.data[3, 20] = 0x10
    with pytest.raises(
        ModelError, match=r"^MXFP4 scales outside 2\^-65 … 2\^61 are no factors of bfloat16: use --device cpu$"
    ):
        weight.pack()


def test_nvfp4_scales_of_zero_make_zeros_and_those_that_divide_multiply():
    weight = made("nvfp4", 16, 128)
    weight.scales.view(torch.uint8)[2, 5] = 0
    weight.scales.view(torch.uint8)[1, 1:4] = torch.tensor([1, 5, 126], dtype=torch.uint8)  # 2⁻⁹, a subnormal, 448
    assert torch.equal(weight.pack().dequantize(), weight.dequantize())
    divides = replace(weight, divides=True).pack()
    assert not divides.divides
    assert torch.allclose(divides.dequantize(), replace(weight, divides=True).dequantize(), rtol=3e-7, atol=0)
    weight.scales.view(torch.uint8)[2, 5] = 0xB8
    with pytest.raises(ModelError, match=r"^NVFP4 scales below zero, or that are not finite: use --device cpu$"):
        weight.pack()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int4_scales_are_exact_in_either_half(dtype):
    weight = made("int4-zeros", 16, 256)
    scales = torch.rand(16, 8).to(dtype)
    scales[1, 2], scales[3, 3], scales[4, 4] = 2.0**-24, 0.0, 1.9921875 * 2.0**-9
    weight = replace(weight, scales=scales)
    assert torch.equal(weight.pack().dequantize(), weight.dequantize())


@pytest.mark.parametrize("size", [64, 256, 1000])
def test_int4_groups_of_other_sizes_are_repeated(size):
    weight = quantised("int4", 16, 256)
    columns = -(-256 // size)
    weight = replace(weight, block=(1, size), scales=weight.scales[:, :columns].contiguous())
    packed = weight.pack()
    assert packed.block == (1, 32 if size == 64 else 128)
    assert torch.equal(packed.dequantize(), weight.dequantize())


REFUSED = {
    "int4 in activation order": (
        lambda: quantised("int4-groups", 16, 64),
        r"^int4 in activation order \(desc_act, g_idx\): the kernels take groups in order; use --device cpu$",
    ),
    "int4 in groups of 48": (
        lambda: replace(quantised("int4", 16, 96), block=(1, 48)),
        r"^int4 in groups of 48 of 96 inputs: the kernels take multiples of 32; use --device cpu$",
    ),
    "int4 with 24 bits of scale": (
        lambda: replace(quantised("int4", 16, 64), scales=torch.full((16, 2), 0.1)),
        r"^int4 scales that 16 bits do not hold exactly: use --device cpu$",
    ),
    "int4 with a scale below 0": (
        lambda: replace(quantised("int4", 16, 64), scales=torch.full((16, 2), -0.5)),
        r"^int4 scales below zero, or that are not finite: use --device cpu$",
    ),
    "FP8 in narrow blocks": (
        lambda: quantised("fp8", 16, 256, block=(16, 64)),
        r"^FP8 in blocks of 16×64: the kernels take multiples of 8×128; use --device cpu$",
    ),
    "FP8 in blocks of 4 outputs": (
        lambda: quantised("fp8", 16, 256, block=(4, 128)),
        r"^FP8 in blocks of 4×128: the kernels take multiples of 8×128; use --device cpu$",
    ),
    "FP8 that is no number": (
        lambda: replace(made("fp8-tensor", 8, 32), data=torch.full((8, 32), torch.nan).to(torch.float8_e4m3fn)),
        r"^FP8 weights that are not numbers: use --device cpu$",
    ),
    "float16": (
        lambda: QTensor.plain(torch.zeros(8, 8, dtype=torch.float16)),
        r"^the kernels take no weights in fp16: use --dtype bfloat16 or --device cpu$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_block_says_exactly_is_refused(case):
    build, line = REFUSED[case]
    with pytest.raises(ModelError, match=line):
        build().pack()


@pytest.mark.parametrize("form", FORMS)
def test_bytes_of_a_weight_are_those_of_its_blocks(form):
    """At inputs that fill blocks a step reads these bits a weight, and 4 bytes an output where it has a factor."""
    bits = {"fp8": 8 + 4 / 128, "mxfp4": 4.25, "nvfp4": 4.5, "int4_32": 4.75, "int4_128": 4.25}
    packed = made(form, 32, 256).pack()
    name = packing.name_of(packed)
    assert name == FORMS[form][2]
    factors = 32 * 4 if packed.outer is not None else 0
    assert packed.nbytes == 32 * 256 * bits[name] / 8 + factors


def test_staged_rows_are_padded_to_a_block():
    assert staged_bytes(1, 2880, 128) - staged_bytes(1, 2880) == 2 * 128
    assert staged_bytes(3, 256, 128) == staged_bytes(3, 256)

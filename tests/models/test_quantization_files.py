"""What files say of quantised weights, and what those take."""

import pytest
import quantised
from modules import entry, scheme

from fwd.errors import ModelError
from fwd.models.quantization import LAYOUTS, PLAIN, Stored, is_needless, read_from


def held(**tensors):
    """The format of module `x` in files with these tensors, which have `_` for `.`."""
    return read_from(scheme(quant_method="fp8"), {name.replace("__", "."): each for name, each in tensors.items()})


def test_files_win_over_the_config():
    plain = held(x__weight=entry("BF16", 64, 64))
    assert plain.format_of("x") is None
    assert plain.format_of("y") is None  # though the config says all are fp8
    forgot = read_from(PLAIN, {"x.weight": entry("F8_E4M3", 64, 64), "x.weight_scale": entry("F32", 64, 1)})
    assert forgot.format_of("x") == Stored("fp8", (1, 0), layout="fp8")


@pytest.mark.parametrize(
    ("shape", "scale", "block"),
    [
        ((576, 7168), (5, 56), (128, 128)),
        ((64, 64), (1, 1), (0, 0)),
        ((64, 64), (1,), (0, 0)),
        ((64, 64), (64,), (1, 0)),
        ((64, 256), (1, 2), (0, 128)),
        ((96, 96), (3, 3), (32, 32)),
        ((90, 90), (9, 9), (10, 10)),
    ],
)
def test_blocks_follow_from_shapes(shape, scale, block):
    found = held(x__weight=entry("F8_E4M3", *shape), x__weight_scale_inv=entry("F32", *scale))
    assert found.format_of("x").block == block


def test_each_format_has_the_blocks_of_its_own_group_of_the_config():
    config = quantised.compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=96)
    fp8 = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [96, 96]}
    own = {"targets": ["re:.*down_proj"], "weights": fp8, "format": "float-quantized"}
    files = {
        "x.weight_packed": entry("I32", 64, 24),
        "x.weight_scale": entry("F16", 64, 2),
        "x.weight_shape": entry("I64", 2),
        "y.weight": entry("F8_E4M3", 192, 192),
        "y.weight_scale": entry("F32", 2, 2),
    }
    for groups in (config["config_groups"] | {"group_1": own}, {"group_1": own} | config["config_groups"]):
        found = read_from(scheme(**config | {"config_groups": groups}), files)
        assert (found.format_of("x").block, found.format_of("y").block) == ((1, 96), (96, 96))


@pytest.mark.parametrize(
    "tensors",
    [
        {"x__weight": entry("F8_E4M3", 64, 64)},
        {"x__weight": entry("F8_E5M2", 64, 64), "x__weight_scale": entry("F32")},
        {"x__weight": entry("I8", 64, 64), "x__weight_scale": entry("F32", 64, 1)},
        {"x__weight": entry("U8", 2048, 1)},
        {"x__weight": entry("F8_E4M3", 64, 64), "x__weight_scale": entry("F32"), "x__weight_scale_inv": entry("F32")},
        {"x__weight": entry("F8_E4M3", 64, 64), "x__weight_scale": entry("F32", 0, 0)},
        {"x__weight": entry("F8_E4M3", 64, 64), "x__weight_scale": entry("F32", 64, 64, 64)},
        {"x__weight": entry("F8_E4M3", 64), "x__weight_scale": entry("F32", 64)},
        {"x__weight_packed": entry("U8", 64, 32), "x__weight_scale": entry("F8_E4M3", 64, 4)},
        {"x__qweight": entry("I32", 8, 64), "x__qzeros": entry("I32", 2, 8), "x__scales": entry("F16", 2, 64)},
        {"x__qweight": entry("I32", 9, 60), "x__qzeros": entry("I32", 2, 8), "x__scales": entry("F16", 2, 64)},
        {"x__scales": entry("F16", 2, 64)},
    ],
    ids=lambda tensors: repr([(name, each.dtype, each.shape) for name, each in tensors.items()])[:90],
)
def test_a_quantised_matrix_in_no_known_layout_is_refused_when_it_is_asked_for(tensors):
    found = held(**tensors)
    assert found.format_of("other") is None
    with pytest.raises(ModelError, match=r"model\.safetensors: x has .* no layout"):
        found.format_of("x")


def test_bytes_are_numbers_scales_zeros_and_factors():
    assert Stored("bf16").nbytes(10, 20) == 400
    assert Stored("fp32").nbytes(10, 20) == 800
    assert Stored("fp8", (128, 128)).nbytes(256, 300) == 256 * 300 + 4 * 2 * 3
    assert Stored("fp8", (1, 0)).nbytes(256, 300) == 256 * 300 + 4 * 256
    assert Stored("fp8", (0, 0)).nbytes(256, 300) == 256 * 300 + 4
    assert Stored("mxfp4", (1, 32)).nbytes(2880, 2880) == 2880 * (1440 + 90)
    assert Stored("nvfp4", (1, 16)).nbytes(64, 64) == 64 * (32 + 4 + 4)
    assert Stored("int4", (1, 32)).nbytes(64, 128) == 64 * (64 + 4 * 2)
    assert Stored("int4", (1, 32), zeros=True, groups=True, scale="F32").nbytes(64, 128) == 64 * (64 + 4 * 5) + 4 * 128


def test_scales_of_activations_and_caches_are_needless():
    assert is_needless("model.layers.0.self_attn.k_proj.k_scale")
    assert is_needless("model.layers.0.mlp.up_proj.input_global_scale")
    assert not any(is_needless("x" + suffix) for layout in LAYOUTS.values() for suffix in layout.tensors)
    assert not is_needless("model.layers.0.mlp.up_proj.pre_quant_scale")  # it changes what the matrix means

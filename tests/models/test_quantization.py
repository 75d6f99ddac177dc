"""What configs and files say of quantised weights: formats by module, bytes, refusals by name."""

from pathlib import Path

import pytest
import quantised
from hypothesis import given, settings
from hypothesis import strategies as st

from fwd.errors import ModelError
from fwd.models.names import parse_names
from fwd.models.quantization import LAYOUTS, PLAIN, Stored, is_needless, read_from
from fwd.models.safetensors import Entry
from fwd.models.schemes import METHODS, parse_quantization

Q = "model.layers.3.self_attn.q_proj"


BLOCKS = {"fp8-deepseek": quantised.BLOCK, "fp8-block": quantised.BLOCK, "fp8-modelopt-block": (128, 128)}


def scheme(**table):
    return parse_quantization({"quantization_config": table})


@pytest.mark.parametrize("layout", sorted(quantised.LAYOUTS))
def test_a_config_says_what_its_files_will(layout):
    chosen = quantised.LAYOUTS[layout]
    config = parse_quantization({"quantization_config": chosen.config or None}, chosen.older)
    found = config.format_of(Q)
    assert found.format == layout.split("-")[0].replace("gptq", "int4").replace("awq", "int4")
    if layout in BLOCKS:
        assert found.block == BLOCKS[layout]
    for plain in ("lm_head", "model.embed_tokens", "model.layers.3.mlp.gate"):
        assert config.format_of(plain) is None, plain
    assert config.format_of("model.layers.3.mlp.gate_proj") == found


def test_gpt_oss_keeps_all_but_its_experts_plain():
    config = scheme(**quantised.GPT_OSS)
    assert config.format_of("model.layers.0.mlp.experts.gate_up_proj") == Stored("mxfp4", (1, 32))
    assert config.format_of("model.layers.0.self_attn.q_proj") is None
    assert config.format_of("model.layers.0.mlp.router") is None


def test_no_config_is_plain():
    assert parse_quantization({}) == PLAIN
    assert parse_quantization({"quantization_config": None, "text_config": {}}) == PLAIN
    assert PLAIN.format_of(Q) is None


def test_a_scheme_may_stand_inside_or_under_its_older_names():
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for config in ({"text_config": {"quantization_config": fp8}}, {"compression_config": fp8}):
        assert parse_quantization(config).format_of(Q) == Stored("fp8", (128, 128))
    older = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", "*self_attn*"]}}
    assert parse_quantization({}, older).format_of("model.layers.0.mlp.up_proj").format == "nvfp4"
    assert parse_quantization({}, older).format_of(Q) is None
    assert parse_quantization({"quantization_config": fp8}, older).format_of(Q).format == "fp8"


def test_groups_of_a_scheme_have_their_own_modules():
    config = quantised.compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    config["config_groups"]["group_1"] = {"targets": ["re:.*down_proj"], "weights": fp8, "format": "float-quantized"}
    config["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*", "model.layers.0.mlp.up_proj"]
    found = scheme(**config)
    assert found.format_of(Q).format == "int4"
    assert found.format_of("model.layers.0.mlp.up_proj").format == "int4"
    assert found.format_of("model.layers.1.mlp.up_proj") is None
    assert found.format_of("model.layers.1.mlp.down_proj") == Stored("fp8", (1, 0))


def test_modelopt_may_name_a_format_for_each_layer():
    layers = {Q: {"quant_algo": "FP8"}, "model.layers.3.mlp.up_proj": {"quant_algo": "NVFP4", "group_size": 16}}
    found = scheme(quant_method="modelopt", quant_algo="MIXED_PRECISION", quantized_layers=layers)
    assert found.format_of(Q).format == "fp8"
    assert found.format_of("model.layers.3.mlp.up_proj").format == "nvfp4"
    assert found.format_of("model.layers.3.mlp.down_proj") is None


def test_gptq_leaves_out_what_dynamic_says():
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "dynamic": {r"-:.*\.3\..*": {}, "+:.*": {"bits": 4}},
    }
    assert scheme(**config).format_of(Q) is None
    assert scheme(**config).format_of("model.layers.4.self_attn.q_proj").block == (1, 128)
    with pytest.raises(ModelError, match="bits = 8 is not supported"):
        scheme(**{**config, "dynamic": {".*": {"bits": 8}}})


@pytest.mark.parametrize(
    ("names", "hits", "misses"),
    [
        (["lm_head"], ["lm_head", "model.lm_head"], ["lm_head2", "model.lm"]),
        (["model.layers.0"], ["model.layers.0.mlp.up_proj"], ["model.layers.01.mlp", "model.layers"]),
        (["mlp.gate"], ["model.layers.0.mlp.gate"], ["model.layers.0.mlp.gate_proj"]),
        (["*lm_head*"], ["lm_head", "model.lm_head.x"], ["head"]),
        (["model.layers.*.self_attn"], [Q], ["model.layers.0.mlp.up_proj"]),
        (["re:.*self_attn"], [Q], ["model.layers.0.mlp"]),
        (["re:^model\\.layers\\.\\d+\\.mlp\\.(up|down)_proj$"], ["model.layers.17.mlp.up_proj"], [Q]),
        (["re:[[q].*"], ["q_proj"], [Q]),
        (["*a*b"], ["ab", "xaxb", "aab", "abab"], ["ba", "a", "axbx"]),
        (["aba*ba"], ["abaxba", "ababa"], ["aba", "abab"]),
        (["re:(?!.*self_attn).*"], ["model.layers.0.mlp"], [Q]),
        ([], [], [Q]),
    ],
)
def test_names_are_found_as_configs_mean_them(names, hits, misses):
    found = parse_names(names, "ignore")
    assert all(found.has(name) for name in hits)
    assert not any(found.has(name) for name in misses)


@pytest.mark.parametrize(
    "names",
    ["lm_head", [1], [None], ["re:("], ["re:[z-a]"], ["re:a{4294967296}"], ["*" * 200_000], ["x"] * 70_000],
    ids=lambda names: repr(names)[:30],
)
def test_names_that_are_none_are_refused_at_once(names):
    with pytest.raises(ModelError, match=r"^ignore"):
        parse_names(names, "ignore")


@pytest.mark.parametrize(
    "expression", ["(a+)+$", "(.*)*x", ".*" * 7, "a?" * 30, "(a|a)" * 65, r"(a)\1", "(?P<x>a)(?P=x)"]
)
def test_expressions_that_could_take_long_are_never_matched(expression):
    names = parse_names(["lm_head", f"re:{expression}"], "ignore")
    with pytest.raises(ModelError, match=r"^ignore: .* repeats too much"):
        names.has("a" * 40)
    config = scheme(quant_method="fp8", modules_to_not_convert=[f"re:{expression}"])
    files = {"x.weight": entry("F8_E4M3", 64, 64), "x.weight_scale": entry("F32", 64, 1)}
    assert read_from(config, files).format_of("x").format == "fp8"  # files need no names


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"quant_method": "bitsandbytes"}, ["quant_method", "bitsandbytes", "known are", "awq", "gptq"]),
        ({}, ["quant_method", "known are"]),
        ({"quant_method": ["fp8"]}, ["quant_method", "known are"]),
        ({"quant_method": "fp8", "fmt": "e5m2"}, ["fmt", "e5m2", "e4m3"]),
        ({"quant_method": "fp8", "weight_block_size": [128]}, ["weight_block_size", "two sizes"]),
        ({"quant_method": "fp8", "weight_block_size": [128, -1]}, ["weight_block_size", "two sizes"]),
        ({"quant_method": "fp8", "weight_block_size": [1 << 40, 1]}, ["weight_block_size", "two sizes"]),
        ({"quant_method": "fp8", "modules_to_not_convert": "lm_head"}, ["modules_to_not_convert", "list"]),
        ({"quant_method": "gptq", "bits": 8}, ["bits = 8", "known are 4"]),
        ({"quant_method": "gptq", "bits": True}, ["bits = True", "known are 4"]),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, ["group_size"]),
        ({"quant_method": "gptq", "bits": 4, "desc_act": "yes"}, ["desc_act"]),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, ["checkpoint_format", "gptq_v2"]),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, ["version", "gemm"]),
        ({"quant_method": "awq", "bits": 3}, ["bits = 3"]),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, ["quant_algo", "W4A8_AWQ", "NVFP4"]),
        ({"quant_method": "compressed-tensors", "config_groups": []}, ["config_groups", "object"]),
        ({**quantised.compressed("marlin-24", num_bits=4)}, ["format", "marlin-24", "pack-quantized"]),
        ({**quantised.compressed("pack-quantized", num_bits=8, type="int")}, ["group_0", "num_bits = 8"]),
        ({**quantised.compressed("pack-quantized", num_bits=4, strategy="tensor")}, ["strategy", "channel"]),
        ({**quantised.compressed("float-quantized", num_bits=8, type="int")}, ["type", "float"]),
        (
            {**quantised.compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=32)},
            ["group_size", "16"],
        ),
        ({**quantised.compressed("dense"), "sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparse-24-bitmask"]),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_unknown_schemes_are_refused_by_field_and_value(table, words):
    with pytest.raises(ModelError) as caught:
        scheme(**table)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def entry(dtype, *shape):
    return Entry(Path("model.safetensors"), dtype, shape, 0, 0)


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


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = {
    "bits": [4, 8],
    "group_size": [-1, 32, 128],
    "desc_act": [True],
    "checkpoint_format": ["gptq", "gptq_v2"],
    "dynamic": [{"-:.*": {}}, {".*": {"bits": 4}}],
    "version": ["gemm"],
    "fmt": ["e4m3"],
    "weight_block_size": [[128, 128], None],
    "modules_to_not_convert": [["lm_head", "re:.*x", "*y*"]],
    "ignore": [["lm_head"]],
    "quant_algo": ["FP8", "NVFP4", "MIXED_PRECISION"],
    "quantized_layers": [{"a": {"quant_algo": "FP8"}}],
    "format": ["pack-quantized", "float-quantized", "nvfp4-pack-quantized"],
    "config_groups": [{"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group"}}}],
    "lm_head": [True],
}
tables = st.fixed_dictionaries(
    {"quant_method": st.sampled_from(sorted(METHODS)) | json_values},
    optional={name: st.sampled_from(values) | json_values for name, values in FIELDS.items()},
)


def outcome(read):
    """What a reader gives, or the one line it refuses with."""
    try:
        return read()
    except ModelError as error:
        return str(error)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(tables | json_values, st.none() | json_values)
def test_any_config_is_a_scheme_or_one_error(table, older):
    older = None if older is None else {"quantization": older}
    for config in (
        {"quantization_config": table},
        {"text_config": {"compression_config": table}},
        {"text_config": table},
    ):
        found = outcome(lambda config=config: parse_quantization(config, older).format_of(Q))
        assert found is None or isinstance(found, Stored) or ("\n" not in found and len(found) < 1000)


shapes = st.lists(st.sampled_from([0, 1, 2, 4, 8, 32, 64, 100, 1 << 40]), max_size=4).map(tuple)
dtypes = st.sampled_from(["F8_E4M3", "U8", "I32", "F32", "BF16", "F16", "I64", "F8_E8M0", "F8_E5M2", "BOOL"])
suffixes = st.sampled_from(sorted({suffix for each in LAYOUTS.values() for suffix in (*each.tensors, *each.extras)}))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(tables, st.none() | st.sampled_from(sorted(LAYOUTS)), st.data())
def test_any_headers_are_a_format_or_one_error(table, layout, data):
    if layout:  # names and dtypes that belong together, in any shapes
        tensors = {name: (kinds[0], data.draw(shapes)) for name, kinds in LAYOUTS[layout].tensors.items()}
    else:
        tensors = data.draw(st.dictionaries(suffixes, st.tuples(dtypes, shapes), max_size=4))
    headers = {f"x{name}": entry(dtype, *shape) for name, (dtype, shape) in tensors.items()}
    found = outcome(lambda: read_from(scheme(**table), headers).format_of("x"))
    assert found is None or isinstance(found, Stored) or "\n" not in found
    assert not isinstance(found, Stored) or found.nbytes(64, 64) >= 0

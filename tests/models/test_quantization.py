"""What configs say of quantised weights: formats by module, names, refusals by field."""

import pytest
import quantised
from modules import entry, scheme

from fwd.errors import ModelError
from fwd.models.names import parse_names
from fwd.models.quantization import PLAIN, Stored, read_from
from fwd.models.schemes import parse_quantization

Q = "model.layers.3.self_attn.q_proj"
BLOCKS = {"fp8-deepseek": quantised.BLOCK, "fp8-block": quantised.BLOCK, "fp8-modelopt-block": (128, 128)}


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

"""Every architecture of the table: transformers' own configs read alike, whole or as sizes only; refusals; a fuzz."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DeepseekV3Config,
    Glm4MoeLiteConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from fwd.errors import ModelError
from fwd.models.architectures import ARCHITECTURES
from fwd.models.config import parse_spec
from fwd.models.safetensors import Entry
from fwd.models.spec import ExpertSpec, LatentSpec, ModelSpec

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 260,
    "max_position_embeddings": 8192,
}
LATENT = {
    **SIZES,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "n_routed_experts": 16,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
SMALLEST = {  # what no architecture has a default for
    "LlamaForCausalLM": (LlamaConfig, SIZES),
    "MistralForCausalLM": (MistralConfig, SIZES),
    "Qwen2ForCausalLM": (Qwen2Config, SIZES),
    "Qwen3ForCausalLM": (Qwen3Config, SIZES),
    "Qwen3MoeForCausalLM": (Qwen3MoeConfig, {**SIZES, "moe_intermediate_size": 48}),
    "GptOssForCausalLM": (GptOssConfig, {**SIZES, "num_local_experts": 16}),
    "DeepseekV3ForCausalLM": (DeepseekV3Config, LATENT),
    "Glm4MoeLiteForCausalLM": (Glm4MoeLiteConfig, LATENT),
}
NESTED = {
    "KimiK25ForConditionalGeneration": LATENT,
    "Kimi_K25ForConditionalGeneration": LATENT,
    "Mistral3ForConditionalGeneration": SIZES,
}


def config_of(name, **changes):
    """A config of sizes only."""
    if name in NESTED:
        return {"architectures": [name], "dtype": "bfloat16", "text_config": {**NESTED[name], **changes}}
    return {"architectures": [name], "dtype": "bfloat16", **SMALLEST[name][1], **changes}


def test_every_architecture_is_here():
    assert SMALLEST.keys() | NESTED.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", SMALLEST)
def test_what_is_absent_is_what_transformers_takes(name):
    reads, sizes = SMALLEST[name]
    whole = reads(**sizes).to_dict() | {"architectures": [name], "dtype": "bfloat16"}
    unstated = {"num_nextn_predict_layers": 0, "num_mtp_layers": 0}  # files tell whether there are any
    assert parse_spec(json.loads(json.dumps(whole)) | unstated) == parse_spec(config_of(name))


@pytest.mark.parametrize("name", [name for name in SMALLEST if "kv_lora_rank" not in SMALLEST[name][1]])
def test_key_value_heads_that_are_absent_are_those_of_transformers(name):
    reads, sizes = SMALLEST[name]
    sizes = {key: value for key, value in sizes.items() if key != "num_key_value_heads"} | {"num_attention_heads": 64}
    config = {"architectures": [name], "head_dim": 16, **sizes}
    wanted = reads(**sizes).num_key_value_heads
    assert parse_spec(config).kv_heads == wanted
    assert parse_spec(config | {"num_key_value_heads": None}).kv_heads == 64


@pytest.mark.parametrize("name", NESTED)
def test_a_text_model_in_a_config_of_several(name):
    inner = "MistralForCausalLM" if "Mistral" in name else "DeepseekV3ForCausalLM"
    spec = parse_spec(config_of(name))
    assert (spec.prefix, spec.others[0], spec.dtype) == ("language_model.", "vision_tower.", "bfloat16")
    assert spec.family == parse_spec(config_of(inner)).family
    assert parse_spec({**config_of(name), "tie_word_embeddings": True}).tied
    assert not parse_spec(config_of(name, tie_word_embeddings=False) | {"tie_word_embeddings": True}).tied


@pytest.mark.parametrize("name", NESTED)
def test_a_head_that_is_tied_outside_the_text_model_is_tied_where_the_files_have_none(name):
    config = config_of(name, tie_word_embeddings=False) | {"tie_word_embeddings": True}
    layers = [f"language_model.model.layers.{index}.input_layernorm.weight" for index in range(4)]
    files = {name: Entry(Path("file"), "BF16", (64,), 0, 128) for name in layers}
    head = Entry(Path("file"), "BF16", (260, 64), 128, 128 + 260 * 64 * 2)
    assert parse_spec(config, files=files).tied
    assert not parse_spec(config | {"tie_word_embeddings": False}, files=files).tied
    assert not parse_spec(config, files=files | {"language_model.lm_head.weight": head}).tied


def test_experts_and_latents_of_deepseek():
    spec = parse_spec(config_of("DeepseekV3ForCausalLM", rope_theta=1e4, rope_scaling=YARN, num_nextn_predict_layers=1))
    assert spec.moe == ExpertSpec(16, 8, 48, "sigmoid", True, (3,), 48, 2.5, 8, 4)
    assert spec.mla == LatentSpec(1536, 32, 16, 8, 128, pytest.approx(24**-0.5 * 1.87385, rel=1e-5))
    assert (spec.rope.attention_factor, spec.rope.truncate, spec.max_context) == (1.0, True, 163840)
    assert (spec.head_dim, spec.rotated, spec.mtp) == (24, 8, 1)
    assert not parse_spec(config_of("DeepseekV3ForCausalLM", q_lora_rank=None)).mla.q_rank


def test_the_scale_of_kimi():
    spec = parse_spec(config_of("KimiK25ForConditionalGeneration", rope_scaling={**YARN, "factor": 64.0}))
    assert spec.mla.scale == pytest.approx(24**-0.5 * 2.00474, rel=1e-5)


def test_gpt_oss():
    spec = parse_spec(config_of("GptOssForCausalLM", experts_per_token=3))
    assert spec.moe == ExpertSpec(16, 3, 96, "topk_softmax", False, (0, 1, 2, 3), bias=True)
    assert spec.windows == (128, 0, 128, 0)
    assert (spec.sinks, spec.qkv_bias, spec.output_bias, spec.head_dim) == (True, True, True, 64)
    assert (spec.rope.truncate, spec.rope.attention_factor) == (False, pytest.approx(1.34657, rel=1e-5))


def test_layers_with_experts():
    def layers(name, **changes):
        return parse_spec(config_of(name, **changes)).moe.layers

    assert layers("Qwen3MoeForCausalLM", decoder_sparse_step=2, mlp_only_layers=[1]) == (3,)
    assert layers("DeepseekV3ForCausalLM", first_k_dense_replace=1) == (1, 2, 3)
    assert layers("DeepseekV3ForCausalLM", first_k_dense_replace=9) == ()
    assert layers("Glm4MoeLiteForCausalLM") == (1, 2, 3)
    assert layers("Glm4MoeLiteForCausalLM", mlp_layer_types=["sparse", "dense"] * 2) == (0, 2)


def test_a_window_of_qwen_moe_is_of_all_layers():
    assert parse_spec(config_of("Qwen3MoeForCausalLM", sliding_window=32)).windows == (0,) * 4
    assert parse_spec(config_of("Qwen3MoeForCausalLM", sliding_window=32, use_sliding_window=True)).windows == (32,) * 4


def test_rope_may_be_keyed_by_layer_type_where_all_are_equal():
    rope = {"rope_type": "default", "rope_theta": 5e5}
    nested = {"full_attention": rope, "sliding_attention": rope}
    assert parse_spec(config_of("LlamaForCausalLM", rope_parameters=nested)).rope.theta == 5e5
    nested["sliding_attention"] = {**rope, "rope_theta": 1e4}
    with pytest.raises(ModelError, match="rope_parameters that differ between layer types"):
        parse_spec(config_of("LlamaForCausalLM", rope_parameters=nested))


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("DeepseekV3ForCausalLM", {"attention_bias": True}, "attention_bias"),
        ("DeepseekV3ForCausalLM", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("DeepseekV3ForCausalLM", {"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ("DeepseekV3ForCausalLM", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("DeepseekV3ForCausalLM", {"index_topk": 2048}, "index_topk"),
        ("DeepseekV3ForCausalLM", {"n_group": 3}, "n_group 3 does not divide"),
        ("DeepseekV3ForCausalLM", {"n_group": 16}, "in groups of 2 up"),
        ("DeepseekV3ForCausalLM", {"topk_group": 9}, "topk_group 9 of n_group 8"),
        ("DeepseekV3ForCausalLM", {"topk_group": 3}, "hold no 8 experts a token"),
        ("DeepseekV3ForCausalLM", {"qk_rope_head_dim": 7}, "qk_rope_head_dim 7 is odd"),
        ("DeepseekV3ForCausalLM", {"n_routed_experts": 1 << 40}, "n_routed_experts"),
        ("DeepseekV3ForCausalLM", {"kv_lora_rank": 0}, "kv_lora_rank"),
        ("Glm4MoeLiteForCausalLM", {"mlp_layer_types": ["dense"]}, "mlp_layer_types names 1 layers"),
        ("Glm4MoeLiteForCausalLM", {"mlp_layer_types": ["dense", "odd"] * 2}, "dense or sparse"),
        ("GptOssForCausalLM", {"swiglu_limit": 8.0}, "swiglu_limit"),
        ("GptOssForCausalLM", {"swiglu_alpha": 1.0}, "swiglu_alpha"),
        ("GptOssForCausalLM", {"num_experts_per_tok": 17}, "num_experts_per_tok must be an integer from 1 to 16"),
        ("GptOssForCausalLM", {"sliding_window": None}, "sliding_window is null"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": "all"}, "mlp_only_layers"),
        ("Qwen3MoeForCausalLM", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
        ("Qwen3MoeForCausalLM", {"num_experts": 0}, "num_experts"),
        ("LlamaForCausalLM", {"num_local_experts": 8}, "num_local_experts = 8 is not supported"),
        ("LlamaForCausalLM", {"kv_lora_rank": 512}, "kv_lora_rank"),
        ("LlamaForCausalLM", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("MistralForCausalLM", {"layer_types": ["full_attention"] * 4}, "layer_types"),
        ("Mistral3ForConditionalGeneration", {"model_type": "ministral3"}, "model_type = 'ministral3'"),
        ("KimiK25ForConditionalGeneration", {"model_type": "kimi_linear"}, "model_type = 'kimi_linear'"),
        ("LlamaForCausalLM", {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
        ("KimiK25ForConditionalGeneration", {"quantization_config": {"quant_method": "gguf"}}, "quant_method = 'gguf'"),
    ],
    ids=str,
)
def test_what_changes_the_mathematics_is_refused_by_name(name, change, named):
    with pytest.raises(ModelError) as refused:
        parse_spec(config_of(name, **change))
    assert named in refused.value.message
    assert "\n" not in refused.value.message


def test_a_config_without_its_text_model_is_refused():
    for text in (None, [], "deepseek_v3"):
        with pytest.raises(ModelError, match="text_config must be an object"):
            parse_spec({"architectures": ["KimiK25ForConditionalGeneration"], "text_config": text})


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 4096, "n_routed_experts": 4096, "first_k_dense_replace": 0},
        {"hidden_size": 1 << 20, "vocab_size": 1 << 24},
        {"num_hidden_layers": 4096, "hidden_size": 1 << 20, "intermediate_size": 1 << 22},
        {"num_attention_heads": 4096, "kv_lora_rank": 1 << 16, "v_head_dim": 1024, "num_hidden_layers": 4096},
    ],
    ids=str,
)
def test_sizes_that_are_hostile_together_are_refused_at_once(change):
    started = time.process_time()
    with pytest.raises(ModelError, match=r"are over [\d,]+"):
        parse_spec(config_of("DeepseekV3ForCausalLM", **change))
    assert time.process_time() - started < 5


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 1 << 24)
    | st.floats()
    | st.sampled_from(["", "yarn", "sigmoid", "full_attention", "\ud800", "\n"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["type", "factor", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = sorted(
    {key for reads, _ in SMALLEST.values() for key in reads().to_dict()}
    | {
        "rope_scaling",
        "rope_theta",
        "quantization_config",
        "torch_dtype",
        "layer_types",
        "mlp_only_layers",
        "text_config",
    }
)


def outcome(config):
    """The spec, or the line that refuses it."""
    try:
        return parse_spec(config)
    except ModelError as error:
        return error.message


@settings(max_examples=600)
@given(st.sampled_from(sorted(ARCHITECTURES)), st.dictionaries(st.sampled_from(KEYS), values, max_size=3))
def test_any_change_of_a_config_gives_a_spec_or_one_line(name, changes):
    found = outcome(config_of(name, **changes))
    if isinstance(found, str):
        assert len(found.splitlines()) == 1
        assert len(found) < 1000
        return
    assert isinstance(found, ModelSpec)
    assert len(found.windows) == found.layers
    assert found.parameters() > 0
    assert found.weight_bytes() > 0
    assert all(layout.token_bytes("bfloat16") > 0 for layout in found.cache)


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(["architectures", *KEYS]), values, max_size=8))
def test_any_object_is_refused_in_one_line(config):
    assert len(outcome(config).splitlines()) == 1

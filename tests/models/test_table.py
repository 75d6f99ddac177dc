"""`fwd plan` gives the numbers that are known of public models, from their configs, to 2 %.

Parameters, bytes of weights, bytes that a token reads, bytes of KV a token: computed by hand from the models' published
dimensions in decimal GB and rounded as they stand here. Of formats it was assumed that embeddings and heads stay
bfloat16, and that scales of FP8 weigh nothing; of MLA, that the way up from latents is read as it is stored, while this
engine holds it in bfloat16 (`WAYS_UP`). Kernels' packed weights are a little larger (`PADDING`).
"""

from dataclasses import replace

import pytest

from fwd.engine.ceilings import ceilings
from fwd.engine.device import GPUS
from fwd.engine.plan import plan
from fwd.models.config import parse_spec

HUGE = replace(GPUS["b200"], memory=4 * 10**12)  # one device for all of them


def dense(architecture, layers, hidden, heads, kv_heads, intermediate, vocab, **more):
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16",
        **more,
    }


def latent(architecture, layers, hidden, heads, intermediate, vocab, *, value=128, nope=128, q=1536, **more):
    mla = {"q_lora_rank": q, "kv_lora_rank": 512, "qk_nope_head_dim": nope, "qk_rope_head_dim": 64, "v_head_dim": value}
    return dense(architecture, layers, hidden, heads, heads, intermediate, vocab, **mla, n_shared_experts=1, **more)


def yarn(factor):
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 4096,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
    }


TIED, WIDE = {"tie_word_embeddings": True}, {"head_dim": 128}
DEEPSEEK = latent(
    "DeepseekV3", 61, 7168, 128, 18432, 129280,
    moe_intermediate_size=2048, n_routed_experts=256, num_nextn_predict_layers=1, rope_scaling=yarn(40),
)  # fmt: skip
KIMI = latent(
    "DeepseekV3", 61, 7168, 64, 18432, 163840,
    moe_intermediate_size=2048, n_routed_experts=384, first_k_dense_replace=1, n_group=1, topk_group=1,
    routed_scaling_factor=2.827, rms_norm_eps=1e-5, rope_theta=50000.0, rope_scaling=yarn(64),
)  # fmt: skip
MODELS = {
    "Llama-3.2-1B": dense("Llama", 16, 2048, 32, 8, 8192, 128256, **TIED),
    "Llama-3.2-3B": dense("Llama", 28, 3072, 24, 8, 8192, 128256, **TIED),
    "Llama-3.1-8B": dense("Llama", 32, 4096, 32, 8, 14336, 128256),
    "Llama-3.3-70B": dense("Llama", 80, 8192, 64, 8, 28672, 128256),
    "Qwen2.5-7B": dense("Qwen2", 28, 3584, 28, 4, 18944, 152064),
    "Qwen2.5-32B": dense("Qwen2", 64, 5120, 40, 8, 27648, 152064),
    "Qwen2.5-72B": dense("Qwen2", 80, 8192, 64, 8, 29568, 152064),
    "Qwen3-0.6B": dense("Qwen3", 28, 1024, 16, 8, 3072, 151936, **TIED, **WIDE),
    "Qwen3-4B": dense("Qwen3", 36, 2560, 32, 8, 9728, 151936, **TIED, **WIDE),
    "Qwen3-8B": dense("Qwen3", 36, 4096, 32, 8, 12288, 151936, **WIDE),
    "Qwen3-14B": dense("Qwen3", 40, 5120, 40, 8, 17408, 151936, **WIDE),
    "Qwen3-32B": dense("Qwen3", 64, 5120, 64, 8, 25600, 151936, **WIDE),
    "Qwen3-30B-A3B": dense(
        "Qwen3Moe", 48, 2048, 32, 4, 6144, 151936, **WIDE,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
    ),
    "Mistral-7B-v0.3": dense("Mistral", 32, 4096, 32, 8, 14336, 32768, sliding_window=None),
    "Mistral-Small-24B": dense("Mistral", 40, 5120, 32, 8, 32768, 131072, sliding_window=None, **WIDE),
    "gpt-oss-20b": dense("GptOss", 24, 2880, 64, 8, 2880, 201088, num_local_experts=32),
    "gpt-oss-120b": dense("GptOss", 36, 2880, 64, 8, 2880, 201088, num_local_experts=128),
    "GLM-4.7-Flash": latent(
        "Glm4MoeLite", 47, 2048, 20, 10240, 154880, value=256, nope=192, q=768,
        moe_intermediate_size=1536, n_routed_experts=64, num_nextn_predict_layers=1,
    ),
    "DeepSeek-V3": DEEPSEEK,
    "Kimi-K2.5": {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "tie_word_embeddings": False,
        "text_config": {name: value for name, value in KIMI.items() if name != "architectures"},
        "vision_config": {"hidden_size": 1152},
    },
}  # fmt: skip
WAYS_UP = {  # bytes by which bfloat16 is over 8 bits
    "GLM-4.7-Flash": 47 * 20 * (192 + 256) * 512 / 1e9,
    "DeepSeek-V3": 61 * 128 * (128 + 128) * 512 / 1e9,
}

PADDING = {  # by which the order that kernels stream is larger
    "gpt-oss-20b": 1.03,  # 2,880 inputs are 23 blocks of 128
    "gpt-oss-120b": 1.03,
    "Kimi-K2.5": 1.06,  # of groups of 32 in int4 a zero point each
}

EIGHT = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
FOUR = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


def compressed(form, weights, *ignored):
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *ignored],
    }


ATTENTION, SHARED, FIRST = "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*layers\\.0\\..*"
FORMATS = {
    "bf16": None,
    "fp8": compressed("float-quantized", EIGHT),
    "blocks": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
    "nvfp4 experts": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "ignore": ["lm_head", "*self_attn*", "*shared_experts*", "model.layers.0.*"],
    },
    "mxfp4": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
    "int4": compressed("pack-quantized", FOUR, ATTENTION, SHARED, FIRST),
}

# billions of parameters, in all and those a token multiplies with; GB of weights, GB a token reads; bytes of KV a token
ROWS = [
    ("Llama-3.2-1B", "bf16", 1.24, None, 2.47, 2.47, 32 << 10),
    ("Llama-3.2-3B", "bf16", 3.21, None, 6.4, 6.4, 112 << 10),
    ("Llama-3.1-8B", "bf16", 8.03, None, 16.1, 15.0, 128 << 10),
    ("Llama-3.1-8B", "fp8", 8.03, None, 9.1, 8.0, 128 << 10),
    ("Llama-3.1-8B", "nvfp4", 8.03, None, 6.0, 5.0, 128 << 10),
    ("Llama-3.3-70B", "bf16", 70.6, None, 141, None, 320 << 10),
    ("Llama-3.3-70B", "fp8", 70.6, None, 72.7, 70.6, 320 << 10),
    ("Llama-3.3-70B", "nvfp4", 70.6, None, 42.7, 40.6, 320 << 10),
    ("Qwen2.5-7B", "bf16", 7.6, None, 15.2, 14.1, 56 << 10),
    ("Qwen2.5-32B", "bf16", 32.8, None, 65.5, 64.0, 256 << 10),
    ("Qwen2.5-72B", "fp8", 72.7, None, 75.2, 72.7, 320 << 10),
    ("Qwen3-0.6B", "bf16", 0.6, None, 1.2, None, 112 << 10),
    ("Qwen3-4B", "bf16", 4.0, None, 8.0, None, 144 << 10),
    ("Qwen3-8B", "bf16", 8.2, None, 16.4, None, 144 << 10),
    ("Qwen3-14B", "bf16", 14.8, None, 29.5, None, 160 << 10),
    ("Qwen3-32B", "bf16", 32.8, None, 65.5, None, 256 << 10),
    ("Qwen3-32B", "blocks", 32.8, None, 34.3, None, 256 << 10),
    ("Qwen3-30B-A3B", "bf16", 30.5, 3.0, 61.1, 6.1, 96 << 10),
    ("Qwen3-30B-A3B", "blocks", 30.5, 3.0, 31.2, 3.4, 96 << 10),
    ("Mistral-7B-v0.3", "bf16", 7.25, None, 14.5, 14.2, 128 << 10),
    ("Mistral-Small-24B", "bf16", 23.6, None, 47.1, 45.8, 160 << 10),
    ("gpt-oss-20b", "mxfp4", 20.9, 3.6, 13.8, 3.7, 48 << 10),
    ("gpt-oss-120b", "mxfp4", 116.8, 5.1, 65.3, 5.0, 72 << 10),
    ("GLM-4.7-Flash", "bf16", 29.9, 3.6, 59.9, 7.2, 54_144),
    ("GLM-4.7-Flash", "blocks", 29.9, 3.6, 30.6, 3.9, 54_144),
    ("GLM-4.7-Flash", "nvfp4 experts", 29.9, 3.6, 20.0, 4.7, 54_144),
    ("DeepSeek-V3", "blocks", 671, 36.6, 673, 37.6, 70_272),
    ("Kimi-K2.5", "int4", 1026, 31.7, 594, 33, 70_272),
]


def planned(name, quantised, **options):
    config = MODELS[name]
    scheme = FORMATS[quantised]
    return plan(
        parse_spec(config | {"quantization_config": scheme} if scheme else config), HUGE, context=1024, **options
    )


@pytest.mark.parametrize(("name", "quantised", "total", "active", "weights", "read", "kv"), ROWS)
def test_a_model_costs_what_is_known(name, quantised, total, active, weights, read, kv):
    found = planned(name, quantised)
    spec, more = found.spec, WAYS_UP.get(name, 0) if quantised == "blocks" else 0
    packed = sum(size for kind, size in found.items.items() if kind.startswith(("weights_", "head_")))
    assert spec.parameters() / 1e9 == pytest.approx(total, rel=0.02)
    assert spec.weight_bytes() / 1e9 == pytest.approx(weights + more, rel=0.02)
    assert 1 <= packed / spec.weight_bytes() <= PADDING.get(name, 1.01)
    assert found.token_bytes == kv
    if active:
        assert spec.active_parameters() / 1e9 == pytest.approx(active, rel=0.02)
    if read:
        one = ceilings(found, HUGE.bandwidth)[0].bytes - spec.kv_bytes(found.context, found.kv)
        assert one / 1e9 == pytest.approx(read + more, rel=0.02)


def test_fp8_keeps_the_rotated_key_of_latents_wide():
    assert planned("DeepSeek-V3", "blocks", kv_dtype="fp8").token_bytes == 40_016  # 656 a layer


def test_windows_of_gpt_oss_do_not_grow():
    found = planned("gpt-oss-20b", "mxfp4")
    assert {group.window: group.unit_bytes(1, found.kv) for group in found.groups} == {0: 24 << 10, 128: 24 << 10}


VERIFIED = {  # what a step of 2, 4, 6, 8 tokens reads, in steps of one: experts chosen independently, all alike
    ("Llama-3.1-8B", "bf16"): (1.0, 1.0, 1.0, 1.0),
    ("Qwen3-30B-A3B", "bf16"): (1.56, 2.57, 3.47, 4.25),
    ("gpt-oss-20b", "mxfp4"): (1.30, 1.79, 2.17, 2.45),
    ("gpt-oss-120b", "mxfp4"): (1.37, 2.07, 2.73, 3.35),
    ("GLM-4.7-Flash", "bf16"): (1.45, 2.28, 3.01, 3.64),
}


@pytest.mark.parametrize("model", VERIFIED, ids=str)
def test_more_tokens_a_step_read_the_experts_that_are_expected(model):
    spec = planned(*model).spec
    one = spec.step_bytes(1, 0, "bfloat16")
    found = [spec.step_bytes(rows, 0, "bfloat16") / one for rows in (2, 4, 6, 8)]
    assert found == pytest.approx(VERIFIED[model], rel=0.02)

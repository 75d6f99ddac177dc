"""The models that are measured or predicted: true shapes in the layouts that are published, as config.json."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Config = dict[str, Any]

CONTEXT = (128 << 10) + 1024  # a prompt of 128k tokens and room for its answer
_COMMON: Config = {
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}
_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA: Config = {
    **_COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "rope_parameters": {**_ROPE, "factor": 8.0},
}
_LLAMA_1B: Config = {  # meta-llama/Llama-3.2-1B
    **_LLAMA,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "rope_parameters": {**_ROPE, "factor": 32.0},
}
_LLAMA_8B: Config = {  # meta-llama/Llama-3.1-8B
    **_LLAMA,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_LLAMA_70B: Config = {  # meta-llama/Llama-3.3-70B
    **_LLAMA,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
# As NVIDIA publishes Llama with ModelOpt: everything but the head.
_FP8: Config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}}
_NVFP4: Config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}}
_GPT_OSS: Config = {
    **_COMMON,
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "rms_norm_eps": 1e-5,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "num_experts_per_tok": 4,
    "swiglu_limit": 7.0,
    "vocab_size": 201088,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1.5e5,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
}
_QWEN3_MOE: Config = {  # Qwen/Qwen3-30B-A3B
    **_COMMON,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "rms_norm_eps": 1e-6,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
_BLOCKS: Config = {  # Qwen's own FP8 release
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
}
_GLM: Config = {  # zai-org/GLM-4.7-Flash
    **_COMMON,
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "model_type": "glm4_moe_lite",
    "rms_norm_eps": 1e-5,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
    "num_nextn_predict_layers": 0,  # what predicts further tokens is not read
    "vocab_size": 154880,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}

TRUE: Mapping[str, Config] = MappingProxyType(
    {
        "llama-1b": _LLAMA_1B,
        "llama-8b": _LLAMA_8B,
        "llama-8b-fp8": _LLAMA_8B | _FP8,
        "llama-8b-nvfp4": _LLAMA_8B | _NVFP4,
        "llama-70b-fp8": _LLAMA_70B | _FP8,
        "llama-70b-nvfp4": _LLAMA_70B | _NVFP4,
        "gpt-oss-20b": _GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
        "gpt-oss-120b": _GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
        "qwen3-30b-a3b": _QWEN3_MOE,
        "qwen3-30b-a3b-fp8": _QWEN3_MOE | _BLOCKS,
        "glm-4.7-flash": _GLM,
    }
)
DENSE = ("llama-1b", "llama-8b")  # in bfloat16: those that every bench and every peer takes

# What dry runs take of each: other sizes, of gpt-oss none that is a multiple of 128, and a plain rotation.
_SHRUNK: Config = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "sliding_window": 32,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
_ODD = {"hidden_size": 160, "intermediate_size": 96}


def _shrunk(config: Config) -> Config:
    sizes = {name: size for name, size in _SHRUNK.items() if name in config}
    heads = {"num_key_value_heads": 4 if "q_lora_rank" in config else 2}
    return config | sizes | heads | (_ODD if "num_local_experts" in config else {})


def tiny(name: str) -> str:
    """The shrunken twin of a model."""
    return "tiny" if name in DENSE else f"tiny-{name}"


MODELS: Mapping[str, Config] = MappingProxyType(
    {**TRUE, **{tiny(name): _shrunk(config) for name, config in TRUE.items() if name != "llama-1b"}}
)

"""Tiny configs of every family, by `transformers`' own classes: what `checkpoints` makes."""

from transformers import (
    DeepseekV3Config,
    Glm4MoeLiteConfig,
    GptOssConfig,
    Kimi_K25Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 260  # a token for each byte, and special ones
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 256,
    "initializer_range": 0.15,
}
_SLIDING = {**_SIZES, "num_hidden_layers": 3}
_LONG = {  # one full-attention head and sliding layers, for contexts of a million tokens
    **_SIZES,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1 << 20,
    "tie_word_embeddings": True,
    "use_sliding_window": True,
    "sliding_window": 64,
    "max_window_layers": 1,
}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
DENSE = {
    "llama": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "llama-bias": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=False, attention_bias=True),
    "llama3-rope": lambda: LlamaConfig(
        **_SIZES, tie_word_embeddings=False, rope_parameters={**_LLAMA3, "original_max_position_embeddings": 64}
    ),
    "yarn": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=False, rope_parameters=_YARN),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=None, head_dim=24),
    "mistral-sliding": lambda: MistralConfig(**_SLIDING, sliding_window=24, rope_parameters=_YARN),
    "qwen2": lambda: Qwen2Config(**_SIZES, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**_SIZES, tie_word_embeddings=True, head_dim=32),
    "qwen2-sliding": lambda: Qwen2Config(
        **_SLIDING, tie_word_embeddings=False, use_sliding_window=True, sliding_window=24, max_window_layers=1
    ),
    "qwen3-sliding": lambda: Qwen3Config(
        **_SLIDING,
        tie_word_embeddings=True,
        head_dim=32,
        use_sliding_window=True,
        sliding_window=17,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "long": lambda: Qwen3Config(**_LONG),
    # what kernels take: heads of 64
    "llama-64": lambda: LlamaConfig(
        **{**_SIZES, "num_attention_heads": 2, "num_key_value_heads": 1}, head_dim=64, attention_bias=True
    ),
    "qwen3-64": lambda: Qwen3Config(**_SIZES, tie_word_embeddings=True, head_dim=64),
    "qwen3-sliding-64": lambda: Qwen3Config(
        **_SLIDING,
        tie_word_embeddings=True,
        head_dim=64,
        use_sliding_window=True,
        sliding_window=17,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}
_SINKS = {
    **_SIZES,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": 24,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
}
_SINKS_ODD = {  # nothing is a multiple of 16
    **_SINKS,
    "hidden_size": 72,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "sliding_window": 17,
    "num_local_experts": 3,
    "num_experts_per_tok": 1,
    "tie_word_embeddings": True,
}
_SINKS_MANY = {
    **_SINKS,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "sliding_window": 2,  # with 1 transformers generates otherwise than it scores
    "num_local_experts": 32,
    "num_experts_per_tok": 8,
    "layer_types": ["full_attention", "sliding_attention"],
}
_STRETCHED = {  # as gpt-oss has it
    "rope_type": "yarn",
    "rope_theta": 1.5e5,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}
GPT_OSS = {
    "gpt-oss": lambda: GptOssConfig(**_SINKS, rope_parameters=_STRETCHED),
    "gpt-oss-64": lambda: GptOssConfig(**{**_SINKS, "head_dim": 64}, rope_parameters=_STRETCHED),
    "gpt-oss-odd": lambda: GptOssConfig(**_SINKS_ODD, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "gpt-oss-many": lambda: GptOssConfig(
        **_SINKS_MANY, rope_parameters={**_STRETCHED, "truncate": True, "factor": 4.0}
    ),
}
_EXPERTS = {
    **_SIZES,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "moe_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
_EXPERTS_ODD = {
    **_EXPERTS,
    "hidden_size": 72,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "moe_intermediate_size": 20,
    "num_experts": 3,
    "norm_topk_prob": False,
    "tie_word_embeddings": True,
}
_EXPERTS_MIXED = {  # in layers 1 and 5
    **_EXPERTS,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [0, 3],
    "attention_bias": True,
}
_EXPERTS_ALL = {  # are visited by every row
    **_EXPERTS,
    "num_hidden_layers": 2,
    "num_experts": 5,
    "num_experts_per_tok": 5,
    "norm_topk_prob": False,
}
MOE = {
    "qwen3-moe": lambda: Qwen3MoeConfig(**_EXPERTS),
    "qwen3-moe-64": lambda: Qwen3MoeConfig(**{**_EXPERTS, "head_dim": 64}),
    "qwen3-moe-odd": lambda: Qwen3MoeConfig(**_EXPERTS_ODD),
    "qwen3-moe-mixed": lambda: Qwen3MoeConfig(**_EXPERTS_MIXED, rope_parameters=_YARN),
    "qwen3-moe-all": lambda: Qwen3MoeConfig(**_EXPERTS_ALL),
}
_LATENTS = {
    **_SIZES,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_mtp_layers": 0,
}
_LATENTS_ODD = {  # no query latents, two dense layers, groups, shared experts, half pairing
    **_LATENTS,
    "hidden_size": 72,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "moe_intermediate_size": 20,
    "q_lora_rank": None,
    "kv_lora_rank": 36,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "n_routed_experts": 15,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "n_group": 5,
    "topk_group": 2,
    "first_k_dense_replace": 2,
    "norm_topk_prob": False,
    "rope_interleave": False,
    "tie_word_embeddings": True,
}
_LATENTS_YARN = {  # experts in all layers, groups
    **_LATENTS,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_routed_experts": 16,
    "num_experts_per_tok": 8,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 0,
}
_YARN_40 = {**_YARN, "factor": 40.0, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0}
_LATENTS_LITE = {**_LATENTS, "num_attention_heads": 5, "qk_nope_head_dim": 24, "v_head_dim": 32, "rms_norm_eps": 1e-5}
_VISION = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
DEEPSEEK = {
    "deepseek": lambda: DeepseekV3Config(**_LATENTS),
    "deepseek-odd": lambda: DeepseekV3Config(**_LATENTS_ODD),
    "deepseek-yarn": lambda: DeepseekV3Config(**_LATENTS_YARN, rope_parameters=_YARN_40),
    "deepseek-mscale": lambda: DeepseekV3Config(
        **{**_LATENTS, "first_k_dense_replace": 3}, rope_parameters={**_YARN_40, "mscale": 0.707, "mscale_all_dim": 0.5}
    ),
    "glm4-moe-lite": lambda: Glm4MoeLiteConfig(
        **_LATENTS_LITE,
        mlp_layer_types=["sparse", "dense", "sparse"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "kimi-k25": lambda: Kimi_K25Config(
        text_config=DeepseekV3Config(
            **{**_LATENTS, "rms_norm_eps": 1e-5}, rope_parameters={**_YARN_40, "rope_theta": 5e4, "factor": 64.0}
        ),
        vision_config=_VISION,
        projection_hidden_size=32,
        tie_word_embeddings=False,
    ),
}
KINDS = {**DENSE, **GPT_OSS, **MOE, **DEEPSEEK}

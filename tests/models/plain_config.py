"""A config of the dense family as tests change it."""

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 260,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
SLIDING = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}
FULL, SLIDES = "full_attention", "sliding_attention"

"""Tiny random checkpoints made by transformers' own classes, with a byte-level tokenizer and a chat template."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
VOCAB = 256 + len(SPECIAL)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
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
    "sliding_window": 1,
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
    "qwen3-moe-odd": lambda: Qwen3MoeConfig(**_EXPERTS_ODD),
    "qwen3-moe-mixed": lambda: Qwen3MoeConfig(**_EXPERTS_MIXED, rope_parameters=_YARN),
    "qwen3-moe-all": lambda: Qwen3MoeConfig(**_EXPERTS_ALL),
}
KINDS = {**DENSE, **GPT_OSS, **MOE}


def make(kind: str, folder: Path, seed: int = 0) -> None:
    """Write a random model of `kind` (a key of KINDS) and its tokenizer; norms and biases are random too."""
    model = build(kind, seed)
    model.save_pretrained(folder)
    make_tokenizer(folder)


def build(kind: str, seed: int = 0):
    """Return the random model itself, in float32 and eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(KINDS[kind](), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif name.endswith("sinks"):
                parameter.normal_(0, 3)
            elif "norm" in name:
                parameter.normal_(1, 0.2)
    return model.eval()


def make_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer (one token per byte, then SPECIAL) and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], chat_template=CHAT_TEMPLATE)
    fast.save_pretrained(folder)

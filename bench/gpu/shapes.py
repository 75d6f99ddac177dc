"""The models that are measured: true shapes with random weights, and what each kernel of a step must read of them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from fwd.models.config import parse_spec
from fwd.models.layout import KVFormat
from fwd.models.spec import ITEMSIZE, ModelSpec

CONTEXT = (128 << 10) + 1024  # a prompt of 128k tokens and room for its answer
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": CONTEXT,
    "attention_bias": False,
    "mlp_bias": False,
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
MODELS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "llama-1b": {  # meta-llama/Llama-3.2-1B
            **_LLAMA,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
            "rope_parameters": {**_ROPE, "factor": 32.0},
        },
        "llama-8b": {  # meta-llama/Llama-3.1-8B
            **_LLAMA,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "tie_word_embeddings": False,
            "rope_parameters": {**_ROPE, "factor": 8.0},
        },
        "tiny": {
            **_LLAMA,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 512,
            "tie_word_embeddings": False,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
)


class Work(NamedTuple):
    """One kernel of a step: how often it is launched and the bytes that each launch must read."""

    launches: int
    bytes: int


def spec(name: str) -> ModelSpec:
    """The spec of a model in the table."""
    return parse_spec(MODELS[name])


def step_work(model: ModelSpec, rows: int, context: int, kv: KVFormat) -> dict[str, Work]:
    """What the kernels of a decode step must read; together that is `ModelSpec.step_bytes`, which `fwd plan` shows."""
    size, q = ITEMSIZE[model.dtype], model.heads * model.head_dim
    qk_norms = 2 * model.head_dim if model.qk_norm else 0
    qkv = model.hidden * (1 + model.qkv_width) + model.qkv_bias * model.qkv_width + qk_norms
    parameters = {
        "qkv": (model.layers, qkv),
        "output": (model.layers, model.hidden * (q + model.output_bias)),
        "gate_up": (model.layers, model.hidden * (1 + 2 * model.intermediate)),
        "down": (model.layers, model.hidden * model.intermediate),
        "head": (1, model.hidden * (1 + model.vocab)),
        "embed": (1, rows * model.hidden),
    }
    read = {name: Work(launches, count * size) for name, (launches, count) in parameters.items()}
    return read | {"attention": Work(model.layers, rows * model.kv_bytes(context, kv) // model.layers)}

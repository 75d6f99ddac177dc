"""A Llama in plain torch, for training only: names and mathematics are those of a checkpoint, so export is a cast."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from fwd.demo import tokenizer

EPS = 1e-5
THETA = 10000.0
CONTEXT = 2048


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    layers: int
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 768
    vocab: int = tokenizer.VOCAB


MODEL = Shape(layers=6)
DRAFT = Shape(layers=1)


class Norm(nn.Module):
    """RMS norm, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same."""
        return functional.rms_norm(x.float(), self.weight.shape, self.weight, EPS)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head: x is [rows, heads, tokens, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def angles(tokens: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position and frequency, [tokens, width / 2]."""
    inverse = THETA ** -(torch.arange(0, width, 2, device=device) / width)
    phase = torch.outer(torch.arange(tokens, device=device), inverse)
    return phase.cos(), phase.sin()


class Attention(nn.Module):
    """Causal attention with grouped heads, from position 0 on: training never continues a cache."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.q_proj = nn.Linear(s.hidden, s.heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[rows, tokens, hidden] to the same."""
        q, k, v = (self.split(linear(x)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rope(q, cos, sin).to(v.dtype), rope(k, cos, sin).to(v.dtype)
        group = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # [rows, heads, tokens, head_dim]
        mixed: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return mixed

    def split(self, x: Tensor) -> Tensor:
        """[rows, tokens, heads * head_dim] to [rows, heads, tokens, head_dim]."""
        return x.view(*x.shape[:2], -1, self.shape.head_dim).transpose(1, 2)


class Mlp(nn.Module):
    """The gated feed-forward block."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.intermediate, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.intermediate, bias=False)
        self.down_proj = nn.Linear(s.intermediate, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each after a norm and added to the stream."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(s.hidden)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = Norm(s.hidden)
        self.mlp = Mlp(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[rows, tokens, hidden] to the same."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """Tied embeddings: the output matrix is the input one, and is not stored twice."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = Norm(s.hidden)
        self.apply(self.init)

    def init(self, module: nn.Module) -> None:
        """Small normal weights, smaller still where a block writes to the stream."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Layer):
            for out in (module.self_attn.o_proj, module.mlp.down_proj):
                nn.init.normal_(out.weight, std=0.02 / math.sqrt(2 * self.shape.layers))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits for each position of ids, [rows, tokens]."""
        x = self.embed_tokens(ids)  # [rows, tokens, hidden]
        cos, sin = angles(ids.shape[1], self.shape.head_dim, ids.device)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return functional.linear(self.norm(x), self.embed_tokens.weight)  # [rows, tokens, vocab]


def config(s: Shape) -> dict[str, object]:
    """The content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "intermediate_size": s.intermediate,
        "vocab_size": s.vocab,
        "max_position_embeddings": CONTEXT,
        "rope_theta": THETA,
        "rms_norm_eps": EPS,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": [2, 0],
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def save(model: Llama, folder: Path) -> None:
    """Weights as bf16 safetensors, config.json and generation_config.json: an ordinary model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": p.to("cpu", torch.bfloat16) for name, p in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(model.shape), indent=2) + "\n")
    generation = {"eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")

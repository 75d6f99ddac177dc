"""A peer: the plainest decoder in torch under torch.compile, with a static cache: `python -m gpu.decoder FOLDER …`.

One function from a token to the next, compiled as a whole with CUDA graphs; the cache holds random numbers, since only
the speed of decoding is asked for. All tensors are buffers: compiled graphs copy the others at every call. Prints
tokens per second of each round as JSON.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor, nn
from torch._inductor import config as inductor

from fwd.models.checkpoint import Checkpoint
from fwd.models.config import read_spec
from fwd.models.rope import rope_table
from fwd.models.spec import ModelSpec


class Block(nn.Module):
    """One layer: its fused weights and its cache [2, kv_heads, context, head_dim]."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint, layer: int, context: int, device: str) -> None:
        super().__init__()
        self.spec = spec
        weights = {
            "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "output": ("self_attn.o_proj",),
            "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
            "down": ("mlp.down_proj",),
            "before": ("input_layernorm",),
            "after": ("post_attention_layernorm",),
        }
        for name, parts in weights.items():
            found = [checkpoint.raw(f"model.layers.{layer}.{part}.weight") for part in parts]
            self.register_buffer(name, torch.cat(found).to(device))
        cache = torch.randn(2, spec.kv_heads, context, spec.head_dim, device=device).to(torch.bfloat16)
        self.register_buffer("cache", cache)

    def forward(self, x: Tensor, rope: Tensor, position: Tensor, hidden_keys: Tensor) -> Tensor:
        """Take and return x [1, hidden]."""
        x = x + F.linear(self.attention(self.norm(x, self.before), rope, position, hidden_keys), self.output)
        gate, up = F.linear(self.norm(x, self.after), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm."""
        return F.rms_norm(x, x.shape[-1:], weight, self.spec.eps)

    def attention(self, x: Tensor, rope: Tensor, position: Tensor, hidden_keys: Tensor) -> Tensor:
        """Over all of the static cache, keys after the position masked."""
        spec = self.spec
        q, k, v = F.linear(x, self.qkv).view(-1, spec.head_dim).split([spec.heads, spec.kv_heads, spec.kv_heads])
        self.cache[:, :, position] = torch.stack((_rotated(k, rope), v)).unsqueeze(2)
        q = _rotated(q, rope).view(spec.kv_heads, -1, spec.head_dim)  # [kv_heads, group, head_dim]
        scores = (q @ self.cache[0].mT).float() * spec.head_dim**-0.5
        shares = scores.masked_fill(hidden_keys, float("-inf")).softmax(-1).to(q.dtype)
        return (shares @ self.cache[1]).view(1, -1)


class Decoder(nn.Module):
    """From a token and its position to the next token, greedily."""

    def __init__(self, folder: Path, context: int, device: str) -> None:
        super().__init__()
        spec, checkpoint = read_spec(folder), Checkpoint(folder, lambda _done, _total: None)
        self.spec = spec
        self.blocks = nn.ModuleList(Block(spec, checkpoint, layer, context, device) for layer in range(spec.layers))
        embedding = checkpoint.raw("model.embed_tokens.weight").to(device)
        self.register_buffer("embedding", embedding)
        self.register_buffer("last", checkpoint.raw("model.norm.weight").to(device))
        self.register_buffer("head", embedding if spec.tied else checkpoint.raw("lm_head.weight").to(device))
        self.register_buffer("rope", rope_table(spec.rope, spec.head_dim, context).to(device))
        self.register_buffer("places", torch.arange(context, device=device))

    def forward(self, token: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Token and position, int64 [1], to those that follow."""
        x, rope, hidden_keys = self.embedding[token], self.rope[position][0], self.places > position
        for block in self.blocks:
            x = block(x, rope, position, hidden_keys)
        x = F.rms_norm(x, x.shape[-1:], self.last, self.spec.eps)
        return F.linear(x, self.head).argmax(-1), position + 1


def _rotated(x: Tensor, rope: Tensor) -> Tensor:
    """RoPE in half pairing; rope [2, head_dim/2]."""
    low, high = x.float().chunk(2, -1)
    return torch.cat((low * rope[0] - high * rope[1], high * rope[0] + low * rope[1]), -1).to(x.dtype)


@torch.no_grad()
def rates(folder: Path, chosen: argparse.Namespace) -> list[float]:
    """Tokens per second of `rounds` answers after `context` tokens; the first ones compile and do not count."""
    inductor.coordinate_descent_tuning = True  # without it products with one row go to the library
    model = Decoder(folder, chosen.context + chosen.tokens, chosen.device)
    step = model if chosen.device == "cpu" else torch.compile(model, mode="reduce-overhead", fullgraph=True)
    found = [_rate(step, chosen) for _ in range(chosen.rounds + 2)]
    return found[2:]


def _rate(step: nn.Module, chosen: argparse.Namespace) -> float:
    token, position = (torch.tensor([at], device=chosen.device) for at in (1, chosen.context))
    began = time.perf_counter()
    for _ in range(chosen.tokens):
        token, position = (each.clone() for each in step(token, position))
    token.item()  # waits for all of them
    return chosen.tokens / (time.perf_counter() - began)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a peer."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("folder", type=Path)
    found.add_argument("--device", default="cuda")
    found.add_argument("--context", type=int, required=True)
    found.add_argument("--tokens", type=int, required=True)
    found.add_argument("--rounds", type=int, required=True)
    return found


if __name__ == "__main__":
    arguments = parser(__doc__).parse_args()
    json.dump(rates(arguments.folder, arguments), sys.stdout)

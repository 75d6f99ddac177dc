"""Rotary position embedding tables (Su et al. 2021) with the scaling rules of Llama 3.1 and YaRN (Peng et al. 2023)."""

import math

import torch
from torch import Tensor

from fwd.models.spec import RopeSpec

_SLICE = 4096  # positions


def rope_table(rope: RopeSpec, head_dim: int, positions: int) -> Tensor:
    """Return cos and sin: float32 [positions, 2, head_dim/2].

    Angles are float32 products, as checkpoints were trained; their cosine is taken in float64, so that no entry
    depends on the table's length. Little more memory than the table's own is taken on the way.
    """
    table = torch.empty(positions, 2, head_dim // 2)
    steps = frequencies(rope, head_dim).float()
    for start in range(0, positions, _SLICE):
        places = torch.arange(start, min(start + _SLICE, positions), dtype=torch.float32)  # exact below 2²⁴
        angles = torch.outer(places, steps).double()
        table[start : start + _SLICE, 0] = angles.cos().mul_(rope.attention_factor)
        table[start : start + _SLICE, 1] = angles.sin().mul_(rope.attention_factor)
    return table


def frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Return the angle per position of each pair: float64 [head_dim/2]."""
    plain = rope.theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    match rope.kind:
        case "default":
            return plain
        case "linear":
            return plain / rope.factor
        case "llama3":
            return _llama3(rope, plain)
        case "yarn":
            return _yarn(rope, plain, head_dim)


def _llama3(rope: RopeSpec, plain: Tensor) -> Tensor:
    """Keep short wavelengths, divide long ones by the factor, blend between (Llama 3.1)."""
    turns = rope.original * plain / (2 * math.pi)  # within the original context
    smooth = ((turns - rope.low) / (rope.high - rope.low)).clamp(0, 1)
    return (1 - smooth) * plain / rope.factor + smooth * plain


def _yarn(rope: RopeSpec, plain: Tensor, head_dim: int) -> Tensor:
    """Blend from kept (fast) to interpolated (slow) along a ramp over the pair index."""
    low, high = (_pair_of(rope, turns, head_dim) for turns in (rope.high, rope.low))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def _pair_of(rope: RopeSpec, turns: float, head_dim: int) -> float:
    """Return the (fractional) pair index that makes `turns` turns within the original context."""
    return head_dim * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

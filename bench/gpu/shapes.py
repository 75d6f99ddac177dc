"""What each kernel of a step must read of a model in `gpu.configs`."""

import functools
from typing import NamedTuple

import numpy as np

from fwd.models.config import parse_spec
from fwd.models.layout import KVFormat
from fwd.models.spec import ITEMSIZE, ExpertSpec, ModelSpec
from gpu.configs import MODELS


class Work(NamedTuple):
    """One kernel of a step: how often it is launched and the bytes that each launch must read."""

    launches: int
    bytes: int


def spec(name: str) -> ModelSpec:
    """The spec of a model in the table."""
    return parse_spec(MODELS[name])


SKEW = 0.5  # logits of a skewed router have deviations of (1 + expert)^−SKEW
STEPS = 2000  # that are drawn to know how many experts they visit


def step_bytes(model: ModelSpec, rows: int, context: int, *, skewed: bool = False) -> int:
    """Bytes that a step must read with its KV in bfloat16, as `fwd plan` counts them; with a skewed router less."""
    whole = model.step_bytes(rows, context, "bfloat16")
    if not skewed or model.moe is None:
        return whole
    experts = [(part, size) for part, _, size in model.held if part.copies > 1]
    saved = sum(size * (part.read(rows) - visited(model.moe, rows)) for part, size in experts)
    return whole - round(saved)


@functools.cache
def visited(moe: ExpertSpec, rows: int) -> float:
    """Experts that rows visit together, on average, where a skewed router chooses for each of them."""
    deviations = (1 + np.arange(moe.experts)) ** -SKEW
    logits = np.random.default_rng(0).standard_normal((STEPS, rows, moe.experts)) * deviations
    chosen = np.zeros(logits.shape, bool)
    np.put_along_axis(chosen, np.argsort(-logits, axis=-1)[..., : moe.top_k], values=True, axis=-1)
    return float(chosen.any(axis=1).sum() / STEPS)


ENDS = 4  # launches of a step outside its layers: embedding, head, and two of the sampler
ATTENTION = 3  # qkv, attention, output
LATENTS = 5  # latents and the key they share, queries, attention over latents, values, output
MLP = 2  # gate and up, down
EXPERTS = 3  # router, gate and up, down


def launches(model: ModelSpec) -> int:
    """Launches of a decode step, each of which waits for the one before it."""
    mixed = len(model.moe.layers) if model.moe else 0
    attention = LATENTS if model.mla else ATTENTION
    return ENDS + model.layers * attention + mixed * EXPERTS + (model.layers - mixed) * MLP


def step_work(model: ModelSpec, rows: int, context: int, kv: KVFormat) -> dict[str, Work]:
    """What the kernels of a dense step in bfloat16 read: together `ModelSpec.step_bytes`, which `fwd plan` shows."""
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

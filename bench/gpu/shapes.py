"""What each kernel of a step must read of a model in `gpu.configs`."""

import functools
from typing import NamedTuple

import numpy as np

from fwd.models.config import parse_spec
from fwd.models.layout import KVFormat
from fwd.models.spec import HEAD, ITEMSIZE, LAYER, ExpertSpec, LatentSpec, ModelSpec
from gpu.configs import MODELS


class Work(NamedTuple):
    """One op of a step: how often it is called and the bytes that each call must read."""

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
    experts = [held for held in model.held if held.part.copies > 1]
    saved = sum(held.nbytes * (held.part.read(rows) - visited(model.moe, rows)) for held in experts)
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
    """What the ops of a decode step must read; together that is `ModelSpec.step_bytes`, which `fwd plan` shows."""
    size, mixed = ITEMSIZE[model.dtype], model.moe.layers if model.moe else ()
    dense = [layer for layer in range(model.layers) if layer not in mixed]
    work = _latents(model, model.mla) if model.mla else _attention(model)
    work |= _cells(model, rows, context, kv, work.get("latent attention", Work(0, 0)).bytes)
    if dense:
        at, norm = LAYER.format(dense[0]), model.hidden * size
        work["gate_up"] = Work(len(dense), _read(model, f"{at}mlp.gate_proj") + norm)
        work["down"] = Work(len(dense), _read(model, f"{at}mlp.down_proj"))
    if model.moe:
        work |= _mixture(model, model.moe, rows)
    head = model.vocab * model.hidden * size if model.tied else _read(model, HEAD)
    return work | {"head": Work(1, head + model.hidden * size), "embed": Work(1, rows * model.hidden * size)}


def _attention(model: ModelSpec) -> dict[str, Work]:
    at, size = f"{LAYER.format(0)}self_attn.", ITEMSIZE[model.dtype]
    vectors = model.hidden + 2 * model.qk_norm * model.head_dim + model.qkv_bias * model.qkv_width
    output = _read(model, f"{at}o_proj") + size * model.output_bias * model.hidden
    return {
        "qkv": Work(model.layers, _read(model, f"{at}q_proj") + size * vectors),
        "output": Work(model.layers, output),
    }


def _latents(model: ModelSpec, mla: LatentSpec) -> dict[str, Work]:
    """`kv_b_proj` is read in two parts: keys with the queries, values behind attention."""
    at, size = f"{LAYER.format(0)}self_attn.", ITEMSIZE[model.dtype]
    first, up = ("q_a_proj", "q_b_proj") if mla.q_rank else ("kv_a_proj_with_mqa", "q_proj")
    keys, values = (size * model.heads * width * mla.latent for width in (mla.nope, mla.value))
    norms = size * (model.hidden + mla.q_rank + mla.latent)
    return {
        "latent qkv": Work(model.layers, _read(model, at + first) + _read(model, at + up) + keys + norms),
        "latent attention": Work(model.layers, values),
        "output": Work(model.layers, _read(model, f"{at}o_proj")),
    }


def _cells(model: ModelSpec, rows: int, context: int, kv: KVFormat, beside: int) -> dict[str, Work]:
    """Attention by the layers that see as much, with what is read beside cells."""
    found = {}
    for layout in model.cache:
        window = getattr(layout, "window", 0)
        name = "latent attention" if model.mla else f"attention, window {window}" if window else "attention"
        cells = rows * min(context, window or context) * layout.token_bytes(kv) // len(layout.layers)
        found[name] = Work(len(layout.layers), cells + beside + model.sinks * model.heads * ITEMSIZE["float32"])
    return found


def _mixture(model: ModelSpec, moe: ExpertSpec, rows: int) -> dict[str, Work]:
    """Experts are those that are expected of rows which choose each for itself."""
    at, many, wide = f"{LAYER.format(moe.layers[0])}mlp.", len(moe.layers), ITEMSIZE["float32"]
    router, gate_up, down = (
        ("router", "gate_up_proj", "down_proj") if moe.bias else ("gate", "0.gate_proj", "0.down_proj")
    )
    biases = moe.experts * (moe.bias + (moe.scoring == "sigmoid"))
    visits = moe.experts * (1 - (1 - moe.top_k / moe.experts) ** rows)
    up = visits * (_read(model, f"{at}experts.{gate_up}") + wide * moe.bias * 2 * moe.intermediate)
    back = visits * (_read(model, f"{at}experts.{down}") + wide * moe.bias * model.hidden)
    shared = [_read(model, f"{at}shared_experts.{name}") if moe.shared else 0 for name in ("gate_proj", "down_proj")]
    norm = model.hidden * ITEMSIZE[model.dtype]
    return {
        "route": Work(many, _read(model, at + router) + norm + wide * biases),
        "expert_gate_up": Work(many, round(up) + shared[0]),
        "expert_down": Work(many, round(back) + shared[1]),
    }


def _read(model: ModelSpec, module: str) -> int:
    """Bytes of the matrix that begins with a module."""
    return _matrices(model)[module]


@functools.lru_cache(maxsize=4)
def _matrices(model: ModelSpec) -> dict[str, int]:
    return {held.part.module: held.nbytes for held in model.held}

"""The tensors of a synthetic checkpoint, named and laid out as models are published, and how each is drawn.

Matrices keep the size of what they multiply, whatever their format; all numbers of a format are drawn, so that memory,
caches and power see what they would of trained weights.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from fwd.models.checkpoint import DTYPES
from fwd.models.quantization import Stored
from fwd.models.spec import EMBEDDING, HEAD, LAYER, ExpertSpec, LatentSpec, ModelSpec
from gpu.shapes import SKEW

Draw = Callable[[int, Generator], Tensor]  # so many numbers of a flat tensor
E2M1_RMS = math.sqrt(sum(value**2 for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)) / 8)  # of all 4-bit codes alike
E4M3_MAX = 448.0
E4M3_RMS = E4M3_MAX / 4  # of normal numbers that hardly ever reach it


class Drawn(NamedTuple):
    """A tensor of a file; `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    draw: Draw

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)


def tensors(model: ModelSpec, *, skewed: bool = False) -> Iterator[Drawn]:
    """All tensors of a model; `skewed`: routers prefer some experts, as `gpu.shapes.visited` says."""
    yield _matrix(f"{EMBEDDING}.weight", model.vocab, model.hidden)
    for layer in range(model.layers):
        at = LAYER.format(layer)
        yield _norm(f"{at}input_layernorm.weight", model.hidden)
        yield from _latents(model, model.mla, at) if model.mla else _attention(model, at)
        yield _norm(f"{at}post_attention_layernorm.weight", model.hidden)
        if model.moe and layer in model.moe.layers:
            yield from _router(model, model.moe, at, skewed=skewed)
            yield from _experts(model, model.moe, at)
        else:
            yield from _gated(model, f"{at}mlp", model.intermediate)
    yield _norm("model.norm.weight", model.hidden)
    if not model.tied:
        yield from _linear(model, HEAD, model.vocab, model.hidden)


def _attention(model: ModelSpec, at: str) -> Iterator[Drawn]:
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    for name, outputs, inputs, bias in (
        ("q_proj", q, model.hidden, model.qkv_bias),
        ("k_proj", kv, model.hidden, model.qkv_bias),
        ("v_proj", kv, model.hidden, model.qkv_bias),
        ("o_proj", model.hidden, q, model.output_bias),
    ):
        yield from _linear(model, f"{at}self_attn.{name}", outputs, inputs)
        if bias:
            yield Drawn(f"{at}self_attn.{name}.bias", "BF16", (outputs,), _normal(0, 0.02))
    for name in ("q_norm", "k_norm") if model.qk_norm else ():
        yield _norm(f"{at}self_attn.{name}.weight", model.head_dim)
    if model.sinks:
        yield Drawn(f"{at}self_attn.sinks", "BF16", (model.heads,), _normal(0, 1))


def _latents(model: ModelSpec, mla: LatentSpec, at: str) -> Iterator[Drawn]:
    head = mla.nope + mla.rope
    for name, outputs, inputs in (
        ("q_a_proj", mla.q_rank, model.hidden),
        ("q_b_proj", model.heads * head, mla.q_rank),
        ("kv_a_proj_with_mqa", mla.latent + mla.rope, model.hidden),
        ("kv_b_proj", model.heads * (mla.nope + mla.value), mla.latent),
        ("o_proj", model.hidden, model.heads * mla.value),
    ):
        yield from _linear(model, f"{at}self_attn.{name}", outputs, inputs)
    yield _norm(f"{at}self_attn.q_a_layernorm.weight", mla.q_rank)
    yield _norm(f"{at}self_attn.kv_a_layernorm.weight", mla.latent)


def _router(model: ModelSpec, moe: ExpertSpec, at: str, *, skewed: bool) -> Iterator[Drawn]:
    name, shape = f"{at}mlp.{'router' if moe.bias else 'gate'}", (moe.experts, model.hidden)
    yield Drawn(f"{name}.weight", "BF16", shape, _lines(moe.experts, model.hidden, SKEW if skewed else 0.0))
    if moe.bias:
        yield Drawn(f"{name}.bias", "BF16", shape[:1], _normal(0, 0.02))
    if moe.scoring == "sigmoid":
        yield Drawn(f"{name}.e_score_correction_bias", "F32", shape[:1], _normal(0, 0.002))


def _experts(model: ModelSpec, moe: ExpertSpec, at: str) -> Iterator[Drawn]:
    if moe.bias:
        yield from _stack(model, f"{at}mlp.experts.gate_up_proj", moe.experts, 2 * moe.intermediate, model.hidden)
        yield from _stack(model, f"{at}mlp.experts.down_proj", moe.experts, model.hidden, moe.intermediate)
        return
    for expert in range(moe.experts):
        yield from _gated(model, f"{at}mlp.experts.{expert}", moe.intermediate)
    if moe.shared:
        yield from _gated(model, f"{at}mlp.shared_experts", moe.shared)


def _gated(model: ModelSpec, at: str, width: int) -> Iterator[Drawn]:
    yield from _linear(model, f"{at}.gate_proj", width, model.hidden)
    yield from _linear(model, f"{at}.up_proj", width, model.hidden)
    yield from _linear(model, f"{at}.down_proj", model.hidden, width)


def _stack(model: ModelSpec, name: str, experts: int, outputs: int, inputs: int) -> Iterator[Drawn]:
    """gpt-oss: MXFP4 blocks of 32 inputs of all experts, their scales, biases."""
    stored = model.quantization.format_of(name)
    assert stored is not None, name
    assert stored.format == "mxfp4", name
    blocks = (experts, outputs, inputs // 32)
    yield Drawn(f"{name}_blocks", "U8", (*blocks, 16), draw_bytes)
    yield Drawn(f"{name}_scales", "U8", blocks, draw_powers(inputs**-0.5 / E2M1_RMS))
    yield Drawn(f"{name}_bias", "BF16", (experts, outputs), _normal(0, 0.02))


def _linear(model: ModelSpec, module: str, outputs: int, inputs: int) -> Iterator[Drawn]:
    """A matrix in the format that the config gives to its module."""
    stored, deviation = model.quantization.format_of(module), inputs**-0.5
    if stored is None:
        yield _matrix(f"{module}.weight", outputs, inputs)
    elif stored.format == "fp8":
        yield Drawn(f"{module}.weight", "F8_E4M3", (outputs, inputs), draw_e4m3)
        shape, name = _blocks(stored, outputs, inputs)
        scale = deviation / E4M3_RMS
        yield Drawn(module + name, "F32", shape, draw_near(scale) if shape else _normal(scale, 0))
    else:
        assert stored.format == "nvfp4", stored.format
        yield Drawn(f"{module}.weight", "U8", (outputs, inputs // 2), draw_bytes)
        yield Drawn(f"{module}.weight_scale", "F8_E4M3", (outputs, inputs // 16), _scales_of_16)
        yield Drawn(f"{module}.weight_scale_2", "F32", (), _normal(deviation / (E2M1_RMS * E4M3_RMS), 0))


def _blocks(stored: Stored, outputs: int, inputs: int) -> tuple[tuple[int, ...], str]:
    """Shape and suffix of the scales of FP8: one a matrix as ModelOpt has it, else one a block as DeepSeek does."""
    if not any(stored.block):
        return (), ".weight_scale"
    return (-(-outputs // stored.block[0]), -(-inputs // stored.block[1])), ".weight_scale_inv"


def _norm(name: str, width: int) -> Drawn:
    return Drawn(name, "BF16", (width,), _normal(1, 0.02))


def _matrix(name: str, outputs: int, inputs: int) -> Drawn:
    return Drawn(name, "BF16", (outputs, inputs), _normal(0, inputs**-0.5))


# ---- How numbers are drawn, on the generator's device ----


def _standard(count: int, generator: Generator) -> Tensor:
    return torch.randn(count, generator=generator, device=generator.device)


def _normal(mean: float, deviation: float) -> Draw:
    return lambda count, generator: _standard(count, generator) * deviation + mean


def _lines(lines: int, width: int, skew: float) -> Draw:
    """A matrix, drawn whole, whose line e has deviation width^−½ · (1 + e)^−skew."""

    def draw(count: int, generator: Generator) -> Tensor:
        assert count == lines * width, (count, lines, width)
        deviations = (1 + torch.arange(lines, device=generator.device)) ** -skew * width**-0.5
        return (_standard(count, generator).view(lines, width) * deviations[:, None]).view(-1)

    return draw


def draw_near(value: float) -> Draw:
    """Positive numbers about a value."""
    return lambda count, generator: (
        value * (0.75 + 0.5 * torch.rand(count, generator=generator, device=generator.device))
    )


def draw_bytes(count: int, generator: Generator) -> Tensor:
    """Codes of any kind."""
    return torch.randint(0, 256, (count,), generator=generator, device=generator.device, dtype=torch.uint8)


def draw_powers(value: float) -> Draw:
    """Codes 127 + e of the two powers of two about a value, of which squares have its square as their mean."""
    low = math.floor(math.log2(value))
    upper = ((value / 2**low) ** 2 - 1) / 3  # 1 − p + 4·p
    return lambda count, generator: (
        127 + low + (torch.rand(count, generator=generator, device=generator.device) < upper).to(torch.uint8)
    )


def draw_e4m3(count: int, generator: Generator) -> Tensor:
    """Normal numbers as e4m3 has them, before they are rounded."""
    return (_standard(count, generator) * E4M3_RMS).clamp_(-E4M3_MAX, E4M3_MAX)


def _scales_of_16(count: int, generator: Generator) -> Tensor:
    return draw_near(E4M3_RMS)(count, generator)

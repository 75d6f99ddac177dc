"""The ops as kernels: `cuda/` over a launcher, for models in bfloat16. A decode step is launched and never waited for.

On a GPU a prefill chunk is the library's products between own kernels; on the host it is the reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fwd.errors import ConfigError, ModelError
from fwd.kernels import expert_kernels, gemv, latent_kernels, paged_attention, prefill, streams
from fwd.kernels import sample as sampler
from fwd.kernels.chunks import Chunks, ReferenceChunks
from fwd.kernels.drawing import Drawing, Outcome
from fwd.kernels.kv import KV, LatentKV
from fwd.kernels.launch import Launcher
from fwd.kernels.ops import QKV, Active, Draw, Experts, Latents, Norm, Routed, Router, Sampled
from fwd.kernels.qtensor import QTensor
from fwd.kernels.rows import Rows
from fwd.kernels.sizes import MAX_ROWS
from fwd.kernels.spaces import Spaces


class Mixture(NamedTuple):
    """Of a model's experts."""

    experts: int
    top_k: int
    groups: int
    intermediate: int
    shared: int


class LatentShape(NamedTuple):
    """Of a model's latent attention."""

    heads: int
    rank: int
    latent: int
    nope: int
    rope: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides whether the kernels take a model, and which they are."""

    dtype: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    products: tuple[str, ...] = ("qkv.cu",)  # files of the kernels over its weights
    mixture: Mixture | None = None
    latents: LatentShape | None = None


def check(device: str, shape: Shape) -> None:
    """Raise ConfigError for a model in another dtype than the kernels', ModelError for one of another shape."""
    if shape.dtype != "bfloat16":
        raise ConfigError(
            f"--device {device} runs bfloat16 models, this one is {shape.dtype}: use --dtype bfloat16 or --device cpu"
        )
    dim = paged_attention.HEAD_DIMS[0] if shape.latents else shape.head_dim
    gemv.check_model(hidden=shape.hidden, intermediate=shape.intermediate, head_dim=dim)
    if refusal := _attention_refusal(shape) or _mixture_refusal(shape):
        raise ModelError(f"{refusal}; use --device cpu")
    if shape.vocab > sampler.MAX_VOCAB:
        raise ModelError(f"vocab_size is {shape.vocab}: the sampler takes up to {sampler.MAX_VOCAB}; use --device cpu")


def _attention_refusal(shape: Shape) -> str | None:
    if shape.latents:
        return latent_kernels.supports(*shape.latents)
    return paged_attention.supports(shape.heads, shape.kv_heads, shape.head_dim, page_size=4)


def _mixture_refusal(shape: Shape) -> str | None:
    if (mixture := shape.mixture) is None:
        return None
    widths = dict.fromkeys((mixture.intermediate, mixture.shared or 8))
    each = [
        expert_kernels.supports(
            hidden=shape.hidden,
            intermediate=width,
            experts=mixture.experts,
            top_k=mixture.top_k,
            groups=mixture.groups,
        )
        for width in widths
    ]
    return next(filter(None, each), None)


def sources(shape: Shape) -> tuple[str, ...]:
    """Return the files that a decode step is made of."""
    attention = ("latent_attention.cu", "latent_value.cu") if shape.latents else ("paged_attention.cu",)
    return tuple(dict.fromkeys(("gemv.cu", "sample.cu", *attention, *shape.products)))


class DeviceOps:
    """Executes `fwd.kernels.ops.LatentOps` with a `Launcher`.

    `next_ids` int64 [MAX_ROWS] holds what each line drew last, for the rows whose id is −1 − line.
    """

    row_block = 1

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.name, self.device = launcher.name, launcher.device
        self.next_ids = torch.zeros(MAX_ROWS, dtype=torch.int64, device=launcher.device)
        self._spaces = Spaces(launcher)
        on_gpu = launcher.device.type == "cuda"
        self._chunks: Chunks = prefill.Prefill(launcher, spaces=self._spaces) if on_gpu else ReferenceChunks()

    def pack(self, weight: QTensor) -> QTensor:
        """Return the matrix in the order that the kernels stream it; in bfloat16 where none streams its format."""
        outputs, inputs = weight.shape[-2:]
        ordered = weight.groups is not None
        taken = streams.refusal(weight.format, weight.block, outputs, inputs, ordered=ordered) is None
        return (weight if taken else weight.rounded()).pack()

    def pack_head(self, weight: QTensor) -> QTensor:
        """Return the same of the head; `embed` reads it as well where it is the embedding."""
        return self.pack(weight if weight.format in streams.HEADS else weight.rounded())

    def pack_router(self, weight: QTensor) -> QTensor:
        """Return the matrix of a router, in bfloat16."""
        return self.pack(weight if weight.format == "bf16" else weight.rounded())

    def pack_experts(self, weight: QTensor) -> QTensor:
        """Return the matrices of experts, one after the other."""
        return self.pack(weight)

    def embed(self, ids: Tensor, weight: QTensor) -> Tensor:  # noqa: D102
        return gemv.embed(self.launcher, ids, weight, self.next_ids)

    def qkv(self, hidden: Tensor, layer: QKV, rope: Tensor, rows: Rows, kv: KV) -> Tensor:  # noqa: D102
        if rows.chunk >= 0:
            return self._chunks.qkv(hidden, layer, rope, rows, kv)
        space = self._spaces.projection(layer)
        return gemv.qkv(self.launcher, space, hidden, layer, rope, rows=rows, kv=kv)

    def decode_attention(self, q: Tensor, rows: Rows, kv: KV, sinks: Tensor | None = None) -> Tensor:  # noqa: D102
        space = self._spaces.split(q.shape[1], kv.keys.shape[1], q.shape[2])
        return paged_attention.decode_attention(self.launcher, space, q, rows, kv, sinks=sinks)

    def prefill_attention(self, q: Tensor, rows: Rows, kv: KV, sinks: Tensor | None = None) -> Tensor:  # noqa: D102
        return self._chunks.attention(q, rows, kv, sinks)

    def linear(self, x: Tensor, weight: QTensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: D102
        if len(x) > MAX_ROWS:
            return self._chunks.linear(x, weight, residual, bias)
        return gemv.linear(self.launcher, x, weight, residual, bias)

    def gate_up(self, hidden: Tensor, norm: Norm, weight: QTensor) -> Tensor:  # noqa: D102
        if len(hidden) > MAX_ROWS:
            return self._chunks.gate_up(hidden, norm, weight)
        return gemv.gate_up(self.launcher, hidden, norm, weight)

    def route(self, hidden: Tensor, router: Router, rows: Rows) -> Routed:  # noqa: D102
        if rows.chunk >= 0:
            return self._chunks.route(hidden, router, rows)
        space = self._spaces.router(len(hidden), router)
        return expert_kernels.route(self.launcher, space, hidden, router, rows)

    def expert_gate_up(self, routed: Routed, experts: Experts) -> Active:  # noqa: D102
        if len(routed.x) > MAX_ROWS:
            return self._chunks.expert_gate_up(routed, experts)
        return expert_kernels.expert_gate_up(self.launcher, self._spaces.mixture(routed, experts), routed, experts)

    def expert_down(self, active: Active, routed: Routed, experts: Experts, residual: Tensor) -> Tensor:  # noqa: D102
        if len(routed.x) > MAX_ROWS:
            return self._chunks.expert_down(active, routed, experts, residual)
        space = self._spaces.mixture(routed, experts)
        return expert_kernels.expert_down(self.launcher, space, active, routed, experts, residual=residual)

    def latent_qkv(self, hidden: Tensor, layer: Latents, rope: Tensor, rows: Rows, kv: LatentKV) -> Tensor:  # noqa: D102
        if rows.chunk >= 0:
            return self._chunks.latent_qkv(hidden, layer, rope, rows, kv)
        space = self._spaces.latents(layer)
        return latent_kernels.latent_qkv(self.launcher, space, hidden, layer, rope, rows=rows, kv=kv)

    def decode_latent_attention(self, q: Tensor, layer: Latents, rows: Rows, kv: LatentKV) -> Tensor:  # noqa: D102
        space = self._spaces.latents(layer)
        return latent_kernels.decode_latent_attention(self.launcher, space, q, layer, rows=rows, kv=kv)

    def prefill_latent_attention(self, q: Tensor, layer: Latents, rows: Rows, kv: LatentKV) -> Tensor:  # noqa: D102
        return self._chunks.latent_attention(q, layer, rows, kv)

    def head(self, hidden: Tensor, norm: Norm, weight: QTensor) -> Tensor:  # noqa: D102
        return gemv.head(self.launcher, hidden, norm, weight)

    def draw(
        self, logits: Tensor, ids: Tensor, rows: Rows, drawing: Drawing, outcome: Outcome, *, step: Tensor
    ) -> None:
        """Draw, verify and commit for the rows of a step; see `fwd.kernels.sample.draw`."""
        launcher, space = self.launcher, self._spaces.sampler(logits.shape[1])
        next_ids = self.next_ids[: len(outcome.accepted)]
        sampler.draw(launcher, space, logits, ids, rows, drawing=drawing, outcome=outcome, next_ids=next_ids, step=step)

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> Sampled:  # noqa: D102
        return sampler.sample(self.launcher, self._spaces.sampler(logits.shape[1]), logits, draws)

    def score(self, logits: Tensor, ids: Sequence[int], tops: Sequence[int]) -> Sampled:  # noqa: D102
        return sampler.score(self.launcher, self._spaces.sampler(logits.shape[1]), logits, ids, tops)

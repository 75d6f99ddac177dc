"""The ops as kernels: `cuda/` over a launcher, for models in bfloat16. A decode step is launched and never waited for.

On a GPU a prefill chunk is the library's products between own kernels; on the host it is the reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fwd.errors import ConfigError, ModelError
from fwd.kernels import gemv, paged_attention, prefill, streams
from fwd.kernels import sample as sampler
from fwd.kernels.chunks import Chunks, ReferenceChunks
from fwd.kernels.drawing import Drawing, Outcome
from fwd.kernels.kv import KV
from fwd.kernels.launch import Launcher
from fwd.kernels.ops import QKV, Draw, Norm, Sampled
from fwd.kernels.qtensor import QTensor
from fwd.kernels.rows import MAX_ROWS, Rows


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides whether the kernels take a model."""

    dtype: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    streams: tuple[str, ...] = ("bf16",)  # of its weights (`fwd.kernels.streams`)
    beyond: tuple[str, ...] = ()  # what no kernel takes yet, in words


def check(device: str, shape: Shape) -> None:
    """Raise ConfigError for a model in another dtype than the kernels', ModelError for one of another shape."""
    if shape.dtype != "bfloat16":
        raise ConfigError(
            f"--device {device} runs bfloat16 models, this one is {shape.dtype}: use --dtype bfloat16 or --device cpu"
        )
    if shape.beyond:
        raise ModelError(f"the kernels of this build do not take {', '.join(shape.beyond)} yet: use --device cpu")
    gemv.check_model(hidden=shape.hidden, intermediate=shape.intermediate, head_dim=shape.head_dim)
    if refusal := paged_attention.supports(shape.heads, shape.kv_heads, shape.head_dim, page_size=4):
        raise ModelError(f"{refusal}; use --device cpu")
    if shape.vocab > sampler.MAX_VOCAB:
        raise ModelError(f"vocab_size is {shape.vocab}: the sampler takes up to {sampler.MAX_VOCAB}; use --device cpu")


def sources(shape: Shape) -> tuple[str, ...]:
    """Return the files that a decode step is made of."""
    quantised = [name for name in shape.streams if name != "bf16"]
    products = [f"{family}_{name}.cu" for family in ("gemv", "qkv") for name in quantised]
    return ("gemv.cu", "paged_attention.cu", "qkv.cu", "sample.cu", *products)


def workspace_bytes(shape: Shape) -> int:
    """Bytes of the workspaces that `DeviceOps` makes for a model, and of `next_ids`."""
    heads = shape.heads + 2 * shape.kv_heads
    split = paged_attention.workspace_bytes(shape.heads, shape.kv_heads, shape.head_dim)
    return gemv.Workspace.nbytes(heads, shape.head_dim) + split + sampler.workspace_bytes(shape.vocab) + 8 * MAX_ROWS


class DeviceOps:
    """Executes `fwd.kernels.ops.Ops` with a `Launcher`.

    Workspaces are made for a shape when it is first met, which is before a step is captured. `next_ids` int64
    [MAX_ROWS] holds what each line drew last, for the rows whose id is −1 − line.
    """

    row_block = 1

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.name, self.device = launcher.name, launcher.device
        self.next_ids = torch.zeros(MAX_ROWS, dtype=torch.int64, device=launcher.device)
        on_gpu = launcher.device.type == "cuda"
        self._chunks: Chunks = prefill.Prefill(launcher) if on_gpu else ReferenceChunks()
        self._projections: dict[tuple[int, int], gemv.Workspace] = {}
        self._splits: dict[tuple[int, int, int], paged_attention.Workspace] = {}
        self._samplers: dict[int, sampler.Workspace] = {}

    def pack(self, weight: QTensor) -> QTensor:
        """Return the matrix in the order that the kernels stream it; in bfloat16 where none streams its format."""
        outputs, inputs = weight.shape[-2:]
        ordered = weight.groups is not None
        taken = streams.refusal(weight.format, weight.block, outputs, inputs, ordered=ordered) is None
        return (weight if taken else weight.rounded()).pack()

    def pack_head(self, weight: QTensor) -> QTensor:
        """Return the same of the head; `embed` reads it as well where it is the embedding."""
        return self.pack(weight if weight.format in streams.HEADS else weight.rounded())

    def embed(self, ids: Tensor, weight: QTensor) -> Tensor:  # noqa: D102
        return gemv.embed(self.launcher, ids, weight, self.next_ids)

    def qkv(self, hidden: Tensor, layer: QKV, rope: Tensor, rows: Rows, kv: KV) -> Tensor:  # noqa: D102
        if rows.chunk >= 0:
            return self._chunks.qkv(hidden, layer, rope, rows, kv)
        key = (layer.weight.shape[0] // layer.head_dim, layer.head_dim)
        if key not in self._projections:
            self._projections[key] = gemv.Workspace.of(self.device, *key)
        return gemv.qkv(self.launcher, self._projections[key], hidden, layer, rope, rows=rows, kv=kv)

    def decode_attention(self, q: Tensor, rows: Rows, kv: KV, sinks: Tensor | None = None) -> Tensor:  # noqa: D102
        key = (q.shape[1], kv.keys.shape[1], q.shape[2])
        if key not in self._splits:
            self._splits[key] = paged_attention.Workspace.new(self.launcher, *key)
        return paged_attention.decode_attention(self.launcher, self._splits[key], q, rows, kv, sinks=sinks)

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

    def head(self, hidden: Tensor, norm: Norm, weight: QTensor) -> Tensor:  # noqa: D102
        return gemv.head(self.launcher, hidden, norm, weight)

    def draw(
        self, logits: Tensor, ids: Tensor, rows: Rows, drawing: Drawing, outcome: Outcome, *, step: Tensor
    ) -> None:
        """Draw, verify and commit for the rows of a step; see `fwd.kernels.sample.draw`."""
        launcher, space, next_ids = self.launcher, self._sampler(logits), self.next_ids[: len(outcome.accepted)]
        sampler.draw(launcher, space, logits, ids, rows, drawing=drawing, outcome=outcome, next_ids=next_ids, step=step)

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> Sampled:  # noqa: D102
        return sampler.sample(self.launcher, self._sampler(logits), logits, draws)

    def score(self, logits: Tensor, ids: Sequence[int], tops: Sequence[int]) -> Sampled:  # noqa: D102
        return sampler.score(self.launcher, self._sampler(logits), logits, ids, tops)

    def _sampler(self, logits: Tensor) -> sampler.Workspace:
        vocab = logits.shape[1]
        if vocab not in self._samplers:
            self._samplers[vocab] = sampler.Workspace.new(self.launcher, vocab)
        return self._samplers[vocab]

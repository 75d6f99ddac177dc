"""The operations of a decoder step, named once, at the grain of one fused launch each; models call nothing else.

Activations travel between ops in the model's dtype; norms, softmax and sums run in float32; logits are float32.
Row-invariance: a row's bits depend neither on the number of rows beside it, nor on its index, nor on its neighbours.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fwd.kernels.kv import KV, LatentKV
from fwd.kernels.qtensor import QTensor
from fwd.kernels.rows import Rows

Mask = NDArray[np.uint32]  # [⌈vocab/32⌉], bit i mod 32 of word i/32: id i may be drawn


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """RMSNorm over the last dimension (Zhang & Sennrich 2019): x·rsqrt(mean(x²)+eps) in float32, rounded, × weight."""

    weight: Tensor  # [dim], the model's dtype
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class QKV:
    """The fused attention input of one layer: heads stand as all q, then all k, then all v."""

    norm: Norm
    weight: QTensor  # [(heads + 2·kv_heads)·head_dim, hidden]
    bias: Tensor | None  # [(heads + 2·kv_heads)·head_dim]
    q_norm: Norm | None  # over head_dim, before RoPE
    k_norm: Norm | None
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, eq=False)
class Latents:
    """The attention input of a layer that keeps latents (MLA, DeepSeek-V2 2024), for heads of nope + rope numbers.

    The rows of `down` and `query` that make rotated parts are in the order of half pairing, whatever the checkpoint's.
    """

    norm: Norm
    down: QTensor  # [q_rank + latent + rope, hidden]: query latent, latent, rotated key shared by all heads
    q_norm: Norm | None  # over q_rank; None: there is no query latent, `query` takes the normed hidden
    query: QTensor  # [heads·(nope + rope), q_rank or hidden], a head's nope part first
    kv_norm: Norm  # over latent
    up_key: Tensor  # [heads, nope, latent], the model's dtype: keys are up_key·latent
    up_value: Tensor  # [heads, value, latent]: values are up_value·latent
    rope: int
    scale: float  # of q·k before the softmax


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """Which experts a row goes to and with what weights; logits are x·Wᵀ + bias of the normed row, all in float32.

    softmax: of all logits, then the `top_k` largest. topk_softmax: the `top_k` largest logits, softmax of those.
    sigmoid (DeepSeek-V3): the `top_k` largest of σ(logit) + correction among the `top_groups` of `groups` equal ranges
    whose two best of these sum highest; their weights are σ(logit). With `normalize` weights are divided by their sum
    + 1e-20; all are multiplied by `scale`. A row's experts stand in the order of what they were chosen by, the largest
    first, of equals the lowest index first.
    """

    norm: Norm
    weight: QTensor  # [experts, hidden]
    bias: Tensor | None  # float32 [experts]
    correction: Tensor | None  # float32 [experts]
    scoring: Literal["softmax", "topk_softmax", "sigmoid"]
    top_k: int
    groups: int = 1
    top_groups: int = 1
    normalize: bool = False
    scale: float = 1.0
    ahead: QTensor | None = None  # what the next layer begins with: a device may fetch some of it meanwhile


class Routed(NamedTuple):
    """The rows of a step on their way to experts."""

    x: Tensor  # [rows, hidden], normed, the model's dtype
    experts: Tensor  # int32 [rows, top_k]; −1: a padding row goes nowhere
    weights: Tensor  # float32 [rows, top_k]


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """The experts of one layer, and the one that every row visits with weight 1.

    silu: silu(gate)·up. clamped (gpt-oss): gate ≤ 7, −7 ≤ up ≤ 7, gate·σ(1.702·gate)·(up + 1).
    """

    gate_up: QTensor  # [experts, 2·intermediate, hidden]: gate, then up
    gate_up_bias: Tensor | None  # float32 [experts, 2·intermediate]
    down: QTensor  # [experts, hidden, intermediate]
    down_bias: Tensor | None  # float32 [experts, hidden]
    activation: Literal["silu", "clamped"] = "silu"
    shared_gate_up: QTensor | None = None  # [2·shared, hidden]
    shared_down: QTensor | None = None  # [hidden, shared]


class Active(NamedTuple):
    """What experts made of the rows, before their down projections."""

    experts: Tensor  # [rows, top_k, intermediate], the model's dtype; of padding rows: undefined
    shared: Tensor | None  # [rows, shared]


@dataclass(slots=True)
class Draw:
    """How one row draws its token. Ids are vocabulary ids; the neutral value of every field is its default."""

    seed: int = 0  # uint64
    position: int = 0  # index of the drawn token in prompt + output
    temperature: float = 1.0  # below 1e-5: greedy, no noise
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of ids in prompt or output
    presence_penalty: float = 0.0  # subtracted once from ids in output
    frequency_penalty: float = 0.0  # subtracted per occurrence in output
    bias: Mapping[int, float] = field(default_factory=dict)  # added to logits
    banned: Sequence[int] = ()  # never drawn (stop ids before min_tokens)
    mask: Mask | None = None  # ids without their bit are never drawn (a grammar); None: all have it
    seen: Collection[int] = ()  # ids in prompt or output, each once, in any order; read only for the repetition penalty
    counts: Mapping[int, int] = field(default_factory=dict)  # of each id in output; read only for the other penalties
    top_logprobs: int = -1  # N most likely ids wanted; −1: none


@dataclass(frozen=True, slots=True, eq=False)
class Top:
    """The N most likely ids of a row: logit descending, then id ascending."""

    ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """What `sample` and `score` give per row; log-probabilities are of the raw logits, before penalties and so on."""

    ids: Tensor  # int64 [rows]; of a row that is not finite: 0
    logprobs: Tensor  # float32 [rows], of `ids`
    finite: Tensor  # bool [rows]; False: the row's logits held NaN or infinity
    tops: list[Top | None]  # per row, where asked for


class Ops(Protocol):
    """One execution of the operations. Rows come in multiples of `row_block` (see `Rows.padded`)."""

    name: str  # in the receipt
    row_block: int
    device: torch.device  # of all tensors

    def pack(self, weight: QTensor) -> QTensor:
        """Return the weight in the order that `qkv`, `linear` and `gate_up` stream it here; done once, at load."""
        ...

    def pack_head(self, weight: QTensor) -> QTensor:
        """Return the weight as `head` streams it; done once, at load."""
        ...

    def embed(self, ids: Tensor, weight: QTensor) -> Tensor:
        """Return hidden [rows, hidden]: row `ids[i]` (int64 [rows]) of weight [vocab, hidden]."""
        ...

    def qkv(self, hidden: Tensor, layer: QKV, rope: Tensor, rows: Rows, kv: KV) -> Tensor:
        """Norm, project, add bias, norm heads, rotate q and k, write k and v of rows with a slot into `kv`.

        Returns q [rows, heads, head_dim]. `rope` is float32 [positions, 2, head_dim/2] (cos, sin), half pairing:
        i with i + head_dim/2 (RoFormer, Su et al. 2021, as GPT-NeoX pairs).
        """
        ...

    def decode_attention(self, q: Tensor, rows: Rows, kv: KV, sinks: Tensor | None = None) -> Tensor:
        """Return softmax(q·kᵀ/√head_dim)·v over the cells each row sees: [rows, heads·head_dim]; padding rows give 0.

        A row sees cells 0…p of its sequence (see `Rows`), or the last `kv.window` of them. `sinks` is float32 [heads]:
        one more logit in each head's softmax, with no value behind it (gpt-oss; Xiao et al. 2023).
        """
        ...

    def prefill_attention(self, q: Tensor, rows: Rows, kv: KV, sinks: Tensor | None = None) -> Tensor:
        """Return the same for the C rows of a chunk; what padding rows give is undefined.

        Cells after the last position that has a slot are never read, nor those that no row with a slot sees.
        """
        ...

    def linear(self, x: Tensor, weight: QTensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return residual + x·Wᵀ (+ bias): x [rows, in], weight [out, in]; residual [rows, out] may be overwritten."""
        ...

    def gate_up(self, hidden: Tensor, norm: Norm, weight: QTensor) -> Tensor:
        """Return silu(gate)·up of the normed hidden [rows, intermediate]; weight [2·intermediate, hidden]: gate, up."""
        ...

    def head(self, hidden: Tensor, norm: Norm, weight: QTensor) -> Tensor:
        """Return logits float32 [rows, vocab] of the normed hidden; weight [vocab, hidden]."""
        ...

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> Sampled:
        """Draw one id per row of logits float32 [rows, vocab]; the rule is in `fwd.kernels.sampling`."""
        ...

    def score(self, logits: Tensor, ids: Sequence[int], tops: Sequence[int]) -> Sampled:
        """Return the log-probabilities of given `ids` (one per row) and of the `tops[i]` most likely (−1: none)."""
        ...


@runtime_checkable
class ExpertOps(Ops, Protocol):
    """Executions that take mixtures of experts as well. Sums stand in float32 until they are rounded, once."""

    def pack_router(self, weight: QTensor) -> QTensor:
        """Return the matrix of a router as `route` streams it here; done once, at load."""
        ...

    def pack_experts(self, weight: QTensor) -> QTensor:
        """Return the matrices of experts, or of the one that all rows visit, as the ops below stream them; the same."""
        ...

    def route(self, hidden: Tensor, router: Router, rows: Rows) -> Routed:
        """Norm the rows of hidden [rows, hidden] and choose their experts."""
        ...

    def expert_gate_up(self, routed: Routed, experts: Experts) -> Active:
        """Return act(gate + bias, up + bias) of each row for each of its experts, and for the shared one."""
        ...

    def expert_down(self, active: Active, routed: Routed, experts: Experts, residual: Tensor) -> Tensor:
        """Return residual + Σ weightₖ·(downₖ·activeₖ + biasₖ) + shared: [rows, hidden].

        The sum is in a row's own order of experts, then the shared one, then the residual (which may be overwritten).
        """
        ...


@runtime_checkable
class LatentOps(ExpertOps, Protocol):
    """Executions that take latent attention as well (MLA, DeepSeek-V2 2024)."""

    def latent_qkv(self, hidden: Tensor, layer: Latents, rope: Tensor, rows: Rows, kv: LatentKV) -> Tensor:
        """Norm, project down, norm the latents, write latent and rotated key of rows with a slot, project queries.

        Returns q [rows, heads, nope + rope], its last part rotated; `rope` is float32 [positions, 2, rope/2]. What is
        projected, normed or rotated is rounded to the model's dtype each time.
        """
        ...

    def decode_latent_attention(self, q: Tensor, layer: Latents, rows: Rows, kv: LatentKV) -> Tensor:
        """Return softmax(q·k·scale)·v over the cells each row sees: [rows, heads·value]; padding rows give 0.

        In the absorbed form: q' = q_nope·up_key is scored on latents, Σ p·latent goes through up_value; all of that in
        float32, rounded once.
        """
        ...

    def prefill_latent_attention(self, q: Tensor, layer: Latents, rows: Rows, kv: LatentKV) -> Tensor:
        """Return the same for the C rows of a chunk, which read what `prefill_attention` says.

        In the expanded form: keys and values of all heads are made from the latents and rounded to the model's dtype;
        what follows is in float32, rounded once.
        """
        ...

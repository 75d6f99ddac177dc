"""The operations of a decoder step, named once, at the grain of one fused launch each; models call nothing else.

Activations travel between ops in the model's dtype; norms, softmax and sums run in float32; logits are float32.
Row-invariance: a row's bits depend neither on the number of rows beside it, nor on its index, nor on its neighbours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor

from fwd.kernels.qtensor import QTensor


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one step: which token of which sequence each row computes, and where its KV goes.

    A decode row at position p attends to cells 0…p of its sequence, also those that rows of this step write.
    A prefill step is exactly C rows of one sequence at positions iC … iC+C−1 (`chunk` = i).
    """

    positions: Tensor  # int64 [rows], absolute; of padding rows: any
    slots: Tensor  # int64 [rows], KV cell to write = page · page_size + offset; −1: a padding row, writes nothing
    sequences: Tensor  # int64 [rows], line of `tables`
    tables: Tensor  # int64 [sequences, max_pages], block table: page of each page_size positions; unused: any
    parents: Tensor  # int64 [rows], row this draft follows; −1: the committed context or the previous row of the chain
    chunk: int = -1  # −1: decode rows; else the index i of the prefill chunk

    def padded(self, block: int) -> "Rows":
        """Append padding rows up to a multiple of `block`."""
        if (extra := -len(self.positions) % block) == 0:
            return self
        assert self.chunk < 0, "a prefill chunk comes whole"
        return replace(
            self,
            positions=F.pad(self.positions, (0, extra)),
            slots=F.pad(self.slots, (0, extra), value=-1),
            sequences=F.pad(self.sequences, (0, extra)),
            parents=F.pad(self.parents, (0, extra), value=-1),
        )


@dataclass(frozen=True, slots=True, eq=False)
class KV:
    """Keys and values of one layer; a cell is one token: cell = page · page_size + offset. Contents start undefined."""

    keys: Tensor  # [cells, kv_heads, head_dim], the model's dtype
    values: Tensor  # the same
    page_size: int  # tokens, a multiple of 4: every page then starts at 16 bytes


@dataclass(frozen=True, slots=True, eq=False)
class KVCache:
    """The paged cache of a model: its pages hold the same cells in every layer."""

    layers: tuple[KV, ...]


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
    prompt: Sequence[int] = ()  # history, read only when a penalty is set; arrays are fastest
    output: Sequence[int] = ()
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

    def decode_attention(self, q: Tensor, rows: Rows, kv: KV) -> Tensor:
        """Return softmax(q·kᵀ/√head_dim)·v over cells 0…p of each row's sequence: [rows, heads·head_dim].

        Padding rows give 0.
        """
        ...

    def prefill_attention(self, q: Tensor, rows: Rows, kv: KV) -> Tensor:
        """Return the same for the C rows of a chunk; cells after the last position that has a slot are never read."""
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

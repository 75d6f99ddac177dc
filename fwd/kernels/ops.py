"""The operations of a decoder step, named once, at the grain of one fused launch each; models call nothing else.

Activations travel between ops in the model's dtype; norms, softmax and sums run in float32; logits are float32.
Row-invariance: a row's bits depend neither on the number of rows beside it, nor on its index, nor on its neighbours.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor

from fwd.kernels.qtensor import QTensor

MAX_ROWS = 16  # of a decode step; more are a prefill chunk, whose shapes are fixed


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Where the rows of a step find and put the KV of one group of layers, which has page numbers of its own."""

    slots: Tensor  # int64 [rows], KV cell to write = page · page_size + offset; −1: a padding row, writes nothing
    tables: Tensor  # int32 [sequences, max_pages], page of each page_size positions; unused or behind a window: any


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """Which recurrent state each row continues and where it leaves its own; a record once written never changes."""

    reads: Tensor  # int64 [rows], record of the state before the row; −1: the empty state, or not read
    writes: Tensor  # int64 [rows], record of the state after the row; −1: not kept


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one step: which token of which sequence each row computes, and where what it leaves goes.

    A decode row at position p attends to cells 0…p of its sequence (the last `window` of them in a sliding group), also
    those that rows of this step write. Drafts may form a tree: a row whose parent is q ≥ 0 stands below row q, one
    position after it, in the same sequence, and sees what q sees and itself. Its cell is its own slot, whatever the
    block table holds there; up to and with its first ancestor whose parent is −1 all is found through the block table.
    Keys are taken in order of position wherever they stand: an accepted branch has the bits of the plain chain.

    A prefill step is exactly C rows of one sequence at positions iC … iC+C−1 (`chunk` = i); rows that are not needed,
    at its beginning or its end, are padding. Of a prefill step only the first row that is no padding reads a record and
    only the last one writes one.
    """

    positions: Tensor  # int64 [rows], absolute; of padding rows: any
    sequences: Tensor  # int64 [rows], line of the tables; −1: a padding row
    parents: Tensor  # int64 [rows], row this draft follows; −1: what the block table holds before it (also a chain)
    cells: tuple[Cells, ...]  # per paged group
    records: Records | None = None  # where the model keeps states
    chunk: int = -1  # −1: decode rows; else the index i of the prefill chunk

    def padded(self, block: int) -> "Rows":
        """Append padding rows up to a multiple of `block`."""
        if (extra := -len(self.positions) % block) == 0:
            return self
        assert self.chunk < 0, "a prefill chunk comes whole"

        def padding(rows: Tensor, value: int = -1) -> Tensor:
            return F.pad(rows, (0, extra), value=value)

        records = self.records
        return replace(
            self,
            positions=padding(self.positions, 0),
            sequences=padding(self.sequences),
            parents=padding(self.parents),
            cells=tuple(Cells(padding(each.slots), each.tables) for each in self.cells),
            records=records and Records(padding(records.reads), padding(records.writes)),
        )


@dataclass(frozen=True, slots=True, eq=False)
class KV:
    """Keys and values of one layer; a cell is one token: cell = page · page_size + offset. Contents start undefined.

    The KV dtype is float32, bfloat16 or fp8, whatever the model's. Vectors are rounded to it (to nearest, ties to even)
    from the model's dtype as they are written, once, and to the model's dtype as attention reads them. In fp8 (e4m3) a
    cell holds x / scale, clamped to ±448 and rounded; scale = max|x| / 448 of that token and head, 1 where that is 0.
    What is read is number · scale in float32, rounded to the model's dtype.
    """

    keys: Tensor  # [cells, kv_heads, head_dim], the KV dtype
    values: Tensor  # the same
    page_size: int  # tokens, a multiple of 4: every page then starts at 16 bytes
    group: int = 0  # index in `Rows.cells`
    window: int = 0  # tokens that a row sees, itself included; 0: all
    key_scales: Tensor | None = None  # fp8: float32 [cells, kv_heads]
    value_scales: Tensor | None = None  # the same

    def copy(self, source: int, target: int) -> None:
        """Copy the cells of page `source` to page `target`."""
        size = self.page_size
        for tensor in (self.keys, self.values, self.key_scales, self.value_scales):
            if tensor is not None:
                tensor[target * size : (target + 1) * size] = tensor[source * size : (source + 1) * size]


@dataclass(frozen=True, slots=True, eq=False)
class KVCache:
    """The paged cache of a model: the pages of a group hold the same cells in each of its layers."""

    layers: tuple[KV, ...]

    def copy(self, copies: Iterable[tuple[int, int, int]]) -> None:
        """Copy pages, in order: each (group, source, target) in all layers of the group."""
        for group, source, target in copies:
            for kv in self.layers:
                if kv.group == group:
                    kv.copy(source, target)


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

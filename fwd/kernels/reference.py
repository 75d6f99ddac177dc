"""The ops in plain torch: the definition that others are tested against. Row-invariant on a CPU, thread count fixed.

What torch 2.13 keeps was measured: products in oneDNN's blocked layout are row-invariant in multiples of 4 rows, in
torch's own for a fixed number of rows only (`fwd.kernels.products`), elementwise functions when a call holds whole
rows. Attention runs row by row (decode) or on fixed shapes (prefill).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor

from fwd.kernels import experts as mixtures
from fwd.kernels import latent, sampling
from fwd.kernels.attention import Piece, attend, decode_pieces, prefill_pieces
from fwd.kernels.kv import KV, LatentKV
from fwd.kernels.ops import QKV, Active, Draw, Experts, Latents, Norm, Routed, Router, Sampled, Top
from fwd.kernels.paged import aligned, write, write_latents
from fwd.kernels.products import by_whole_rows, product
from fwd.kernels.qtensor import Format, QTensor
from fwd.kernels.rows import Rows

_block = torch.ops.mkldnn._reorder_linear_weight  # noqa: SLF001 -- torch.compile's own products, in no public module
_blocked = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
_BLOCKS: dict[Format, Callable[[], bool]] = {
    "fp32": torch.backends.mkldnn.is_available,
    "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported,  # noqa: SLF001
    "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported,  # noqa: SLF001
}


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """What the layers of a step share, computed once from its rows."""

    rows: Rows
    rope: Tensor
    cos: Tensor  # float32 [rows, 1, head_dim]
    sin: Tensor  # the same, first half negated
    live: slice | Tensor  # rows that are no padding
    slots: tuple[Tensor, ...]  # per paged group: int64, the cells they write
    pieces: dict[tuple[int, int], list[list[Piece]]]  # by group and window: per row, of a prefill chunk one entry

    def pieces_of(self, kv: KV | LatentKV, group: int, dtype: torch.dtype) -> list[list[Piece]]:
        """What rows attend to in a layer whose keys serve `group` heads each; masks are in `dtype`."""
        key = (kv.group, kv.window)
        if key not in self.pieces:
            chunked = self.rows.chunk >= 0
            self.pieces[key] = (
                [prefill_pieces(self.rows, kv, group, dtype)] if chunked else decode_pieces(self.rows, kv)
            )
        return self.pieces[key]


class Reference:
    """Executes `fwd.kernels.ops.Ops` on the CPU. One instance serves one thread: it remembers the step it is in."""

    name = "reference"
    row_block = 4
    device = torch.device("cpu")

    def __init__(self) -> None:
        self._step: _Step | None = None

    def pack(self, weight: QTensor) -> QTensor:
        """Return the matrix in oneDNN's blocked layout; as it is where oneDNN has no product of the format here."""
        blocks = _BLOCKS.get(weight.format, lambda: False)
        return replace(weight, data=_block(weight.data, None)) if blocks() else weight

    def pack_head(self, weight: QTensor) -> QTensor:
        """Return a plain head in float32: torch rounds the product of narrower matrices to their own dtype."""
        return weight if weight.scales is not None else self.pack(QTensor.plain(weight.dequantize()))

    def pack_router(self, weight: QTensor) -> QTensor:
        """Return the matrix as it is: its products are float32."""
        return weight

    def pack_experts(self, weight: QTensor) -> QTensor:
        """Return the matrices as they are, since only some are used at a time."""
        return weight

    def embed(self, ids: Tensor, weight: QTensor) -> Tensor:  # noqa: D102
        assert weight.scales is None, "embeddings are plain"
        return F.embedding(ids, weight.data)

    def qkv(self, hidden: Tensor, layer: QKV, rope: Tensor, rows: Rows, kv: KV) -> Tensor:  # noqa: D102
        step = self._enter(rows, rope)
        fused = _project(normed(hidden, layer.norm), layer.weight, layer.bias)
        heads = fused.view(len(fused), -1, layer.head_dim)  # [rows, heads + 2·kv_heads, head_dim]
        turned = _rotate(_head_norms(heads[:, : -layer.kv_heads], layer), step)
        keys, values = turned[step.live, -layer.kv_heads :], heads[step.live, -layer.kv_heads :]
        write(kv, step.slots[kv.group], keys, values)
        return turned[:, : -layer.kv_heads]

    def decode_attention(self, q: Tensor, rows: Rows, kv: KV, sinks: Tensor | None = None) -> Tensor:  # noqa: D102
        assert rows.chunk < 0, "prefill rows"
        kv_heads = kv.keys.shape[1]
        pieces = self._current(rows).pieces_of(kv, q.shape[1] // kv_heads, q.dtype)
        out = [q.new_zeros(q.shape[1] * q.shape[2])] * len(q)
        for row, own in enumerate(pieces):
            if own:
                out[row] = attend(aligned(q[row]).view(1, kv_heads, -1, q.shape[2]), kv, own, sinks).flatten()
        return torch.stack(out)

    def prefill_attention(self, q: Tensor, rows: Rows, kv: KV, sinks: Tensor | None = None) -> Tensor:  # noqa: D102
        assert rows.chunk >= 0, "decode rows"
        count, kv_heads, dim = len(q), kv.keys.shape[1], q.shape[2]
        (pieces,) = self._current(rows).pieces_of(kv, q.shape[1] // kv_heads, q.dtype)
        grouped = q.reshape(count, kv_heads, -1, dim).permute(1, 2, 0, 3)  # [kv_heads, group, C, head_dim]
        out = attend(grouped.reshape(1, kv_heads, -1, dim), kv, pieces, sinks)
        return out.view(kv_heads, -1, count, dim).permute(2, 0, 1, 3).reshape(count, -1)

    def latent_qkv(self, hidden: Tensor, layer: Latents, rope: Tensor, rows: Rows, kv: LatentKV) -> Tensor:  # noqa: D102
        step, width = self._enter(rows, rope), layer.up_key.shape[2]
        x = normed(hidden, layer.norm)
        narrow, latents, keys = _project(x, layer.down, None).tensor_split((-width - layer.rope, -layer.rope), dim=1)
        query = x if layer.q_norm is None else normed(narrow, layer.q_norm)
        q = _project(query, layer.query, None).view(len(x), len(layer.up_key), -1)  # [rows, heads, nope + rope]
        latents, keys = normed(latents, layer.kv_norm), _rotate(keys.unsqueeze(1), step).squeeze(1)
        write_latents(kv, step.slots[kv.group], latents[step.live], keys[step.live])
        return torch.cat((q[..., : -layer.rope], _rotate(q[..., -layer.rope :], step)), dim=-1)

    def decode_latent_attention(self, q: Tensor, layer: Latents, rows: Rows, kv: LatentKV) -> Tensor:  # noqa: D102
        assert rows.chunk < 0, "prefill rows"
        return latent.decode(q, layer, kv, self._current(rows).pieces_of(kv, 1, torch.float32))

    def prefill_latent_attention(self, q: Tensor, layer: Latents, rows: Rows, kv: LatentKV) -> Tensor:  # noqa: D102
        assert rows.chunk >= 0, "decode rows"
        (pieces,) = self._current(rows).pieces_of(kv, 1, torch.float32)
        return latent.prefill(q, layer, kv, pieces)

    def linear(self, x: Tensor, weight: QTensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: D102
        _check_rows(x)
        if not weight.data.is_mkldnn:
            return _biased(product(x, weight), bias).add_(residual).to(residual.dtype)
        total: Tensor = _blocked.binary(x, residual, weight.data, bias, "add")
        return total

    def gate_up(self, hidden: Tensor, norm: Norm, weight: QTensor) -> Tensor:  # noqa: D102
        gate, up = _project(normed(hidden, norm), weight, None).chunk(2, dim=1)
        return by_whole_rows(F.silu, gate).mul_(up)

    def route(self, hidden: Tensor, router: Router, rows: Rows) -> Routed:  # noqa: D102
        _check_rows(hidden)
        return mixtures.route(normed(hidden, router.norm), router, rows)

    def expert_gate_up(self, routed: Routed, experts: Experts) -> Active:  # noqa: D102
        return mixtures.gate_up(routed, experts)

    def expert_down(self, active: Active, routed: Routed, experts: Experts, residual: Tensor) -> Tensor:  # noqa: D102
        return mixtures.down(active, routed, experts, residual)

    def head(self, hidden: Tensor, norm: Norm, weight: QTensor) -> Tensor:  # noqa: D102
        return _project(normed(hidden, norm).float(), weight, None)

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> Sampled:  # noqa: D102
        array = logits.numpy()
        finite = [sampling.is_finite(row) for row in array]
        ids = [sampling.sample_row(row, draw) if ok else 0 for row, draw, ok in zip(array, draws, finite, strict=True)]
        return self.score(logits, ids, [draw.top_logprobs for draw in draws])

    def score(self, logits: Tensor, ids: Sequence[int], tops: Sequence[int]) -> Sampled:  # noqa: D102
        scored = [_score_row(row, *wanted) for row, *wanted in zip(logits.numpy(), ids, tops, strict=True)]
        logprobs, finite, top = zip(*scored, strict=True)
        return Sampled(torch.tensor(ids), torch.tensor(logprobs), torch.tensor(finite), list(top))

    def _enter(self, rows: Rows, rope: Tensor) -> _Step:
        if self._step is None or self._step.rows is not rows or self._step.rope is not rope:
            self._step = _begin(rows, rope)
        return self._step

    def _current(self, rows: Rows) -> _Step:
        """What qkv began; rows of a block drafter, which see further than they stand, have pieces of their own."""
        assert self._step is not None, "qkv comes before attention"
        assert self._step.rows.sequences is rows.sequences, "qkv comes before attention"
        return self._step if self._step.rows is rows else replace(self._step, rows=rows, pieces={})


def _begin(rows: Rows, rope: Tensor) -> _Step:
    live = _live(rows.sequences.tolist())
    angles = rope.index_select(0, rows.positions.clamp(0, len(rope) - 1))  # [rows, 2, head_dim/2]
    cos, sin = angles[:, 0].unsqueeze(1), angles[:, 1].unsqueeze(1)
    return _Step(
        rows,
        rope,
        torch.cat((cos, cos), dim=-1),
        torch.cat((-sin, sin), dim=-1),
        live,
        tuple(cells.slots[live] for cells in rows.cells),
        {},
    )


def _live(sequences: list[int]) -> slice | Tensor:
    live = [row for row, sequence in enumerate(sequences) if sequence >= 0]
    if live and live[-1] - live[0] == len(live) - 1:
        return slice(live[0], live[-1] + 1)
    return torch.tensor(live, dtype=torch.int64)


def _check_rows(x: Tensor) -> None:
    assert len(x) % Reference.row_block == 0, f"{len(x)} rows are no multiple of {Reference.row_block}: use Rows.padded"


def normed(x: Tensor, norm: Norm) -> Tensor:
    """Return the rows of x in its dtype, rounded where `fwd.kernels.ops.Norm` says."""
    return F.rms_norm(x, (x.shape[-1],), None, norm.eps).mul_(norm.weight)


def _head_norms(heads: Tensor, layer: QKV) -> Tensor:
    if layer.q_norm is None or layer.k_norm is None:
        return heads
    q, k = heads[:, : -layer.kv_heads], heads[:, -layer.kv_heads :]
    return torch.cat((normed(q, layer.q_norm), normed(k, layer.k_norm)), dim=1)


def _project(x: Tensor, weight: QTensor, bias: Tensor | None) -> Tensor:
    _check_rows(x)
    if not weight.data.is_mkldnn:
        return _biased(product(x, weight), bias).to(x.dtype)
    total: Tensor = _blocked(x, weight.data, bias, "none", [], "")
    return total


def _biased(total: Tensor, bias: Tensor | None) -> Tensor:
    return total if bias is None else total.add_(bias)


def _rotate(x: Tensor, step: _Step) -> Tensor:
    wide = x.float()
    turned = wide.roll(x.shape[-1] // 2, dims=-1)
    return (wide * step.cos).add_(turned.mul_(step.sin)).to(x.dtype)


def _score_row(logits: sampling.Logits, token: int, top: int) -> tuple[float, bool, Top | None]:
    if not sampling.is_finite(logits):
        return float("nan"), False, None
    total = sampling.log_total(logits)
    wanted = sampling.top_logprobs(logits, top, total) if top >= 0 else None
    return float(logits[token]) - total, True, wanted

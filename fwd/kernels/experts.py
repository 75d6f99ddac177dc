"""Mixtures of experts in the reference: which experts a row visits, and what they make of it.

Row-invariant: an expert's rows run in tiles of one shape, which zeros fill up; what a row gets back is summed in its
own order. At their widest the ops take what one expert's matrix takes as it becomes float32 (`kernels.dequantize`),
beside 20·rows·intermediate bytes of its activations, or 4·rows·hidden·(top_k + 2) of all experts' results.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor

from fwd.kernels.ops import Active, Experts, Routed, Router
from fwd.kernels.paged import aligned
from fwd.kernels.products import by_whole_rows, product
from fwd.kernels.qtensor import QTensor
from fwd.kernels.rows import Rows
from fwd.kernels.sizes import MAX_ROWS

ALPHA, LIMIT = 1.702, 7.0  # of the clamped activation (gpt-oss)
DECODE_TILE, CHUNK_TILE = 4, 16  # rows of a product
_EPSILON = 1e-20  # keeps a sum of weights from 0


def route(x: Tensor, router: Router, rows: Rows) -> Routed:
    """Choose the experts of the normed rows x [rows, hidden]; see `fwd.kernels.ops.Router`."""
    logits = product(x, router.weight)  # [rows, experts]
    if router.bias is not None:
        logits.add_(router.bias)
    weights, experts = _choose(logits, router)
    if router.normalize:
        weights = weights / (_sum(weights.unbind(1)) + _EPSILON).unsqueeze(1)
    experts = experts.masked_fill((rows.sequences < 0).unsqueeze(1), -1)
    return Routed(x, experts.int(), weights * router.scale)


def gate_up(routed: Routed, experts: Experts) -> Active:
    """Return what experts make of rows; see `fwd.kernels.ops.ExpertOps.expert_gate_up`."""
    x, top_k = routed.x, routed.experts.shape[1]
    width = experts.gate_up.shape[1] // 2
    active = x.new_zeros(len(x) * top_k, width)
    for expert, visits in _visits(routed.experts):
        wide = _tiled(x[visits // top_k], experts.gate_up.expert(expert), tile_of(x))  # [visits, 2·intermediate]
        if experts.gate_up_bias is not None:
            wide.add_(experts.gate_up_bias[expert])
        active[visits] = _activated(wide, experts.activation).to(x.dtype)
    shared = experts.shared_gate_up
    return Active(
        active.view(len(x), top_k, width),
        None if shared is None else _activated(product(x, shared), "silu").to(x.dtype),
    )


def down(active: Active, routed: Routed, experts: Experts, residual: Tensor) -> Tensor:
    """Return residual + Σ weightₖ·expertₖ + shared; see `fwd.kernels.ops.ExpertOps.expert_down`."""
    count, top_k = routed.experts.shape
    given = active.experts.flatten(0, 1)  # [rows·top_k, intermediate]
    out = torch.zeros(count * top_k, residual.shape[1])
    for expert, visits in _visits(routed.experts):
        out[visits] = _tiled(given[visits], experts.down.expert(expert), tile_of(residual))
        if experts.down_bias is not None:
            out[visits] += experts.down_bias[expert]
    parts = list(out.view(count, top_k, -1).mul_(routed.weights.unsqueeze(2)).unbind(1))
    if experts.shared_down is not None:
        assert active.shared is not None, "the shared expert's down comes with its gate and up"
        parts.append(product(active.shared, experts.shared_down))
    return _sum([*parts, residual.float()]).to(residual.dtype)


def tile_of(rows: Tensor) -> int:
    """Rows of a product: those of a decode step are few."""
    return DECODE_TILE if len(rows) <= MAX_ROWS else CHUNK_TILE


def _choose(logits: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """Weights and experts [rows, top_k], the best first."""
    match router.scoring:
        case "softmax":
            return _best(logits.softmax(dim=-1), router.top_k)
        case "topk_softmax":
            best, experts = _best(logits, router.top_k)
            return best.softmax(dim=-1), experts
        case "sigmoid":
            scores = torch.stack([row.sigmoid() for row in logits])
            chosen = scores if router.correction is None else scores + router.correction
            _, experts = _best(_in_best_groups(chosen, router), router.top_k)
            return scores.gather(1, experts), experts


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest scores of each row and their places, of equals the lowest place first."""
    ranked, places = scores.sort(dim=-1, descending=True, stable=True)
    return ranked[:, :count], places[:, :count]


def _in_best_groups(chosen: Tensor, router: Router) -> Tensor:
    """The scores, −∞ outside the groups whose two best sum highest."""
    if router.top_groups == router.groups:
        return chosen
    grouped = chosen.view(len(chosen), router.groups, -1)  # [rows, groups, experts / groups]
    two, _ = grouped.sort(dim=-1, descending=True, stable=True)
    _, groups = _best(_sum(two[..., :2].unbind(-1)), router.top_groups)
    closed = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter_(1, groups, value=False)
    return grouped.masked_fill(closed.unsqueeze(2), float("-inf")).flatten(1)


def _visits(experts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each expert that rows go to, and which visits those are: int64, row · top_k + place in the row's order."""
    flat = experts.flatten().numpy()
    order = np.argsort(flat, kind="stable")
    found, starts = np.unique(flat[order], return_index=True)
    for expert, visits in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
        if expert >= 0:
            yield expert, torch.from_numpy(visits)


def _tiled(x: Tensor, weight: QTensor, tile: int) -> Tensor:
    """x·Wᵀ in float32, `tile` rows at a time."""
    matrix = aligned(weight.dequantize())
    tiles = F.pad(x.float(), (0, 0, 0, -len(x) % tile)).view(-1, tile, x.shape[1])
    return torch.cat([F.linear(aligned(rows), matrix) for rows in tiles])[: len(x)]


def _activated(wide: Tensor, activation: Literal["silu", "clamped"]) -> Tensor:
    """The activation of float32 [rows, 2·width], which is overwritten; see `fwd.kernels.ops.Experts`."""
    gate, up = wide.chunk(2, dim=1)
    match activation:
        case "silu":
            return by_whole_rows(F.silu, gate).mul_(up)
        case "clamped":
            gate.clamp_(max=LIMIT)
            steep, _ = (wide * ALPHA).chunk(2, dim=1)
            return gate.mul_(by_whole_rows(torch.sigmoid, steep)).mul_(up.clamp_(-LIMIT, LIMIT).add_(1))


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of the parts, first to last."""
    return reduce(torch.add, parts)

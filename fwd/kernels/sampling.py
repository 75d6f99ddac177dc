"""The sampler's definition, one row at a time, so that a row depends on nothing beside it.

Penalties, bias, mask → temperature → top-k, top-p, min-p → argmax of t + g with Gumbel noise g (Maddison et al. 2014).
Thresholds use integer weights w = floor(exp(t − max)·2³⁰): their sums are exact in any order. Ties: the lowest id.
"""

import math

import numpy as np
from numpy.typing import NDArray

from fwd.kernels.noise import gumbel
from fwd.kernels.ops import Draw, Top

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]

GREEDY_BELOW = 1e-5
UNIT = 2**30


def is_finite(logits: Logits) -> bool:
    """Tell whether no logit of the row is NaN or infinite."""
    return bool(np.isfinite(logits).all())


def sample_row(logits: Logits, draw: Draw) -> int:
    """Return the id drawn from one row of finite logits [vocab]."""
    adjusted = adjust(logits, draw)
    if draw.temperature < GREEDY_BELOW:
        return int(adjusted.argmax())
    tempered = adjusted / np.float32(draw.temperature)
    kept = keep(tempered, draw)
    scores = tempered[kept] + gumbel(draw.seed, draw.position, kept)
    return int(kept[scores.argmax()])


def adjust(logits: Logits, draw: Draw) -> Logits:
    """Return logits after penalties (repetition: prompt + output; presence, frequency: output), bias and mask."""
    counted = bool(draw.presence_penalty or draw.frequency_penalty)
    if draw.repetition_penalty == 1.0 and not (counted or draw.bias or draw.banned):
        return logits
    out = logits.copy()
    if draw.repetition_penalty != 1.0:
        seen = _ids(list(draw.seen))
        penalty = np.float32(draw.repetition_penalty)
        out[seen] = np.where(out[seen] > 0, out[seen] / penalty, out[seen] * penalty)
    if counted:
        ids, counts = _ids(list(draw.counts)), np.asarray(list(draw.counts.values()), dtype=np.float32)
        out[ids] -= np.float32(draw.frequency_penalty) * counts + np.float32(draw.presence_penalty)
    for token, bias in draw.bias.items():
        out[token] += np.float32(bias)
    out[_ids(draw.banned)] = -np.inf
    return out


def keep(tempered: Logits, draw: Draw) -> Ids:
    """Return the ids that may be drawn, ascending: top-k first, then top-p over what is left, then min-p."""
    kept = most_likely(tempered, draw.top_k) if 0 < draw.top_k < len(tempered) else np.arange(len(tempered))
    if draw.top_p < 1.0 or draw.min_p > 0.0:
        values = tempered[kept]
        weights = np.floor(np.exp(values - values.max()) * np.float32(UNIT)).astype(np.int64)
        nucleus = _nucleus(values, weights, draw.top_p) if draw.top_p < 1.0 else np.True_
        kept = kept[nucleus & (weights >= draw.min_p * UNIT)]
    return kept


def most_likely(values: Logits, count: int) -> Ids:
    """Return exactly `count` ids of the largest values, ascending; among equal values the lowest ids."""
    border = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > border)
    level = np.flatnonzero(values == border)[: count - len(above)]
    return np.sort(np.concatenate((above, level)))


def _nucleus(values: Logits, weights: Ids, top_p: float) -> NDArray[np.bool_]:
    """Mark tokens in the order (value descending, id ascending) until the mass before them is top_p of the total."""
    order = np.argsort(-values, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    inside = before < top_p * float(weights.sum())
    inside[0] = True
    mask = np.zeros(len(values), dtype=np.bool_)
    mask[order[inside]] = True
    return mask


def log_total(logits: Logits) -> float:
    """Return log Σ exp(logits): the number to subtract from a raw logit to have its log-probability."""
    top = logits.max()
    return float(top) + math.log(float(np.exp(logits - top).sum(dtype=np.float64)))


def top_logprobs(logits: Logits, count: int, total: float) -> Top:
    """Return the `count` most likely ids (logit descending, id ascending) with their log-probabilities."""
    count = min(count, len(logits))
    ids = most_likely(logits, count) if count else np.arange(0)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return Top(ids.tolist(), (logits[ids].astype(np.float64) - total).tolist())


def _ids(tokens: object) -> Ids:
    return np.asarray(tokens, dtype=np.int64)

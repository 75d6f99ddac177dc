"""The sampler's definition, one row at a time, so that a row depends on nothing beside it.

Penalties, bias, mask → temperature → top-k, top-p, min-p → argmax of t + g with Gumbel noise g (Maddison et al. 2014).
Thresholds use integer weights w = ⌊exp(t − max)·2³⁰⌋: their sums are exact in any order. Ties: the lowest id.

Every number that decides comes out the same wherever it is computed (`cuda/sampling.cuh` is the twin): parameters are
float32; penalties and bias are float64, rounded once; the exponential is one polynomial in float64 without fused
multiply-add; what is below 2⁻¹²⁶ in size counts as zero, as on devices. Only the noise goes through a library's log.
"""

import math

import numpy as np
from numpy.typing import NDArray

from fwd.kernels.noise import gumbel
from fwd.kernels.ops import Draw, Mask, Top

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]

GREEDY_BELOW = np.float32(1e-5)
UNIT = 2**30
FEW = 32  # tokens that a nucleus is first looked for in
REACH = 21.0  # exp(−21)·2³⁰ < 1: what is further below the maximum has no weight

_LARGEST = np.finfo(np.float32).max
_SMALLEST = np.finfo(np.float32).tiny
_LOG2_E = 1.4426950408889634
_POWERS_OF_2 = (  # (ln 2)ⁿ / n!, so that 2^f = Σ cₙfⁿ: off by less than 3e-13 for |f| ≤ ½
    1.0,
    0.6931471805599453,
    0.24022650695910072,
    0.05550410866482158,
    0.009618129107628477,
    0.0013333558146428443,
    0.0001540353039338161,
    1.525273380405984e-05,
    1.3215486790144307e-06,
    1.01780860092397e-07,
    7.054911620801121e-09,
)


def is_finite(logits: Logits) -> bool:
    """Tell whether no logit of the row is NaN or infinite."""
    return bool(np.isfinite(logits).all())


def single(value: float) -> np.float32:
    """Return a parameter as the sampler reads it: float32, nothing subnormal."""
    rounded = np.float32(value)
    return rounded if abs(rounded) >= _SMALLEST else np.float32(0.0)


def sample_row(logits: Logits, draw: Draw) -> int:
    """Return the id drawn from one row of finite logits [vocab]; 0 if every id is banned or masked."""
    adjusted = flushed(adjust(logits, draw))
    if single(draw.temperature) < GREEDY_BELOW:
        return int(adjusted.argmax())
    tempered = temper(adjusted, draw.temperature)
    if tempered.max() == -np.inf:
        return 0
    kept = keep(tempered, draw)
    scores = tempered[kept] + gumbel(draw.seed, draw.position, kept)
    return int(kept[scores.argmax()])


def flushed(values: Logits) -> Logits:
    """Return the values, subnormal ones as zero and zero without its sign."""
    return np.where(np.abs(values) < _SMALLEST, np.float32(0.0), values)


def adjust(logits: Logits, draw: Draw) -> Logits:
    """Return logits after penalties (repetition: prompt + output; presence, frequency: output), bias and mask."""
    counted = bool(draw.presence_penalty or draw.frequency_penalty)
    if draw.repetition_penalty == 1.0 and not (counted or draw.bias or draw.banned) and draw.mask is None:
        return logits
    out = flushed(logits).astype(np.float64)
    if draw.repetition_penalty != 1.0:
        seen = _ids(list(draw.seen))
        penalty = np.float64(single(draw.repetition_penalty))
        out[seen] = np.where(out[seen] > 0, out[seen] / penalty, out[seen] * penalty)
    if counted:
        ids, counts = _ids(list(draw.counts)), np.asarray(list(draw.counts.values()), dtype=np.float64)
        frequency, presence = np.float64(single(draw.frequency_penalty)), np.float64(single(draw.presence_penalty))
        out[ids] -= frequency * counts + presence
    for token, bias in draw.bias.items():
        out[token] += np.float64(single(bias))
    out[_ids(draw.banned)] = -np.inf
    if draw.mask is not None:
        out[~allowed(draw.mask, len(out))] = -np.inf
    with np.errstate(over="ignore"):
        return out.astype(np.float32)


def allowed(mask: Mask, vocab: int) -> NDArray[np.bool_]:
    """Return for each id of the vocabulary whether the mask lets it through."""
    return np.unpackbits(mask.view(np.uint8), count=vocab, bitorder="little").view(np.bool_)


def temper(adjusted: Logits, temperature: float) -> Logits:
    """Return adjusted logits over the temperature, none of them +∞."""
    with np.errstate(over="ignore"):
        return flushed(np.minimum(adjusted / single(temperature), _LARGEST))


def keep(tempered: Logits, draw: Draw) -> Ids:
    """Return the ids that may be drawn, ascending: top-k first, then top-p over what is left, then min-p.

    Where any of the three is in use, ids without weight (less than 2⁻³⁰ times as likely as the best) are left out.
    """
    top_p, min_p = single(draw.top_p), single(draw.min_p)
    if not 0 < draw.top_k < len(tempered) and top_p >= 1.0 and min_p <= 0.0:
        return np.arange(len(tempered))
    peak = tempered.max()
    near = np.flatnonzero(tempered >= np.float64(peak) - REACH)
    weights = weigh(tempered[near], peak)
    kept, weights = near[weights > 0], weights[weights > 0]
    if 0 < draw.top_k < len(kept):
        best = most_likely(tempered[kept], draw.top_k)
        kept, weights = kept[best], weights[best]
    nucleus = _nucleus(tempered[kept], weights, float(top_p)) if top_p < 1.0 else np.True_
    return kept[nucleus & (weights >= float(min_p) * UNIT)]


def weigh(values: Logits, peak: np.float32) -> Ids:
    """Return the weights ⌊exp(value − peak)·2³⁰⌋ of finite values, at most `peak` and within `REACH` of it."""
    exponents = (values.astype(np.float64) - np.float64(peak)) * _LOG2_E
    whole = np.floor(exponents + 0.5)
    fraction = exponents - whole
    power = np.full_like(fraction, _POWERS_OF_2[-1])
    for coefficient in _POWERS_OF_2[-2::-1]:
        power = power * fraction + coefficient
    return (power * UNIT).astype(np.int64) >> (-whole).astype(np.int64)


def most_likely(values: Logits, count: int) -> Ids:
    """Return exactly `count` ids of the largest values, ascending; among equal values the lowest ids."""
    border = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > border)
    level = np.flatnonzero(values == border)[: count - len(above)]
    return np.sort(np.concatenate((above, level)))


def _nucleus(values: Logits, weights: Ids, top_p: float) -> NDArray[np.bool_]:
    """Mark tokens in the order (value descending, id ascending) until the mass before them is top_p of the total."""
    border = top_p * float(weights.sum())
    near = _holding(values, weights, border)
    order = near[np.argsort(-values[near], kind="stable")]
    before = np.cumsum(weights[order]) - weights[order]
    inside = before < border
    inside[0] = True
    mask = np.zeros(len(values), dtype=np.bool_)
    mask[order[inside]] = True
    return mask


def _holding(values: Logits, weights: Ids, mass: float) -> Ids:
    """Return, ascending, some tokens that are before all others and together have that mass: few are soon sorted."""
    count = FEW
    while count < len(values):
        border = np.partition(values, len(values) - count)[len(values) - count]
        near = np.flatnonzero(values >= border)
        if float(weights[near].sum()) >= mass:
            return near
        count *= FEW
    return np.arange(len(values))


def log_total(logits: Logits) -> float:
    """Return log Σ exp(logits): the number to subtract from a raw logit to have its log-probability."""
    top = logits.max()
    with np.errstate(over="ignore"):
        below = logits - top
    return float(top) + math.log(float(np.exp(below).sum(dtype=np.float64)))


def top_logprobs(logits: Logits, count: int, total: float) -> Top:
    """Return the `count` most likely ids (logit descending, id ascending) with their log-probabilities."""
    count = min(count, len(logits))
    values = flushed(logits)
    ids = most_likely(values, count) if count else np.arange(0)
    ids = ids[np.argsort(-values[ids], kind="stable")]
    return Top(ids.tolist(), (logits[ids].astype(np.float64) - total).tolist())


def _ids(tokens: object) -> Ids:
    return np.asarray(tokens, dtype=np.int64)

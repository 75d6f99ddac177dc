"""The law of the sampler: how often each token is drawn, against what its log-probabilities say."""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from fwd.protocol.client import Client, Event
from fwd.protocol.messages import Tokens
from fwd.protocol.values import MAX_TOP_LOGPROBS, TopLogprobs

LEAST = 1e-4  # a correct sampler has a smaller p once in ten thousand tests
CELL = 5.0  # draws that are expected of a cell at least, as is usual; rarer tokens share one
IN_FLIGHT = 32


Cell = tuple[int, float]  # draws that were, draws that are expected


class Mix(NamedTuple):
    """A way to draw from the likeliest tokens; `top_p` and `min_p` are moved to where no rounding decides."""

    top_k: int
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    bias: float = 0.0  # on the second likeliest


MIXES = (Mix(8), Mix(20, 1.6), Mix(16, 0.7), Mix(20, 1.3, top_p=0.7), Mix(20, 1.0, min_p=0.1), Mix(8, bias=-1.0))


class Law(NamedTuple):
    """What may be drawn, how likely each is, and the options that ask for it."""

    chances: Mapping[int, float]
    options: Mapping[str, Any]


class Tested(NamedTuple):
    """One mix: p is the chance that a correct sampler fits its own law no better."""

    options: Mapping[str, Any]
    draws: int
    tokens: int
    statistic: float
    p: float


def check(daemon: Client, prompts: Iterable[Sequence[int]], draws: int, told: Callable[[str], None]) -> list[Tested]:
    """Draw the token after a prompt with so many seeds for each mix; raises what the daemon answers.

    Of the prompts it is the one after which most is open.
    """
    tops = [(prompt, _likeliest(daemon, prompt)) for prompt in prompts]
    prompt, top = min(tops, key=lambda found: found[1].logprobs[0])
    found = []
    for place, mix in enumerate(MIXES):
        told(f"the sampler, {place + 1} of {len(MIXES)}")
        law = law_of(top, mix)
        counts = Counter(_drawn(daemon, prompt, law.options, range(place * draws, (place + 1) * draws)))
        found.append(Tested(law.options, draws, len(law.chances), *fit(counts, law.chances)))
    return found


def law_of(top: TopLogprobs, mix: Mix) -> Law:
    """The law of a mix over the likeliest tokens of a place: temperature, then top-k, top-p and min-p (DESIGN §4)."""
    bias = {top.ids[1]: mix.bias} if mix.bias and len(top.ids) > 1 else {}
    biased = [(value + bias.get(token, 0.0), token) for token, value in zip(top.ids, top.logprobs, strict=True)]
    order = sorted(biased, key=lambda pair: (-pair[0], pair[1]))[: mix.top_k]
    weights = [math.exp((value - order[0][0]) / mix.temperature) for value, _ in order]
    before = [math.fsum(weights[:place]) / math.fsum(weights) for place in range(len(weights))]
    top_p = _between(before, mix.top_p) if mix.top_p < 1 else 1.0
    min_p = _between(weights, mix.min_p) if mix.min_p > 0 else 0.0
    kept = {
        token: weight
        for (_, token), weight, mass in zip(order, weights, before, strict=True)
        if mass < top_p and weight >= min_p
    }
    total = math.fsum(kept.values())
    options = {"temperature": mix.temperature, "top_k": len(order), "top_p": top_p, "min_p": min_p, "logit_bias": bias}
    return Law({token: weight / total for token, weight in kept.items()}, options)


def fit(counts: Mapping[int, int], chances: Mapping[int, float]) -> tuple[float, float]:
    """Pearson's statistic of what was drawn, and its p; a token that may not be drawn fits nothing."""
    draws = sum(counts.values())
    if set(counts) - set(chances):
        return math.inf, 0.0
    cells = _cells([(counts.get(token, 0), chance * draws) for token, chance in chances.items()])
    statistic = math.fsum((count - expected) ** 2 / expected for count, expected in cells)
    return statistic, exceeds(statistic, len(cells) - 1)


def exceeds(statistic: float, freedom: int) -> float:
    """The chance that a chi-square variable is greater: Q(freedom / 2, statistic / 2).

    From Q(½, y) = erfc √y or Q(1, y) = e^−y by Q(a + 1, y) = Q(a, y) + y^a e^−y / Γ(a + 1) (DLMF 8.4.6, 8.4.8, 8.8.6).
    """
    if freedom == 0 or statistic == 0:
        return 1.0
    y, a = statistic / 2, 0.5 if freedom % 2 else 1.0
    chance = math.erfc(math.sqrt(y)) if freedom % 2 else math.exp(-y)
    while a < freedom / 2:
        chance += math.exp(a * math.log(y) - y - math.lgamma(a + 1))
        a += 1
    return min(1.0, chance)


def _cells(tokens: Sequence[Cell]) -> list[Cell]:
    """Tokens of which enough are expected, and all others together."""
    cells = [cell for cell in tokens if cell[1] >= CELL]
    rare = [cell for cell in tokens if cell[1] < CELL]
    if rare and math.fsum(expected for _, expected in rare) < CELL and cells:
        rare.append(cells.pop())
    return [*cells, (sum(count for count, _ in rare), math.fsum(expected for _, expected in rare))] if rare else cells


def _between(values: Sequence[float], wanted: float) -> float:
    """The middle of the widest gap between neighbours among values, of those that are near `wanted`."""
    ordered = sorted({0.0, *values, 1.0})
    gaps = list(pairwise(ordered))
    near = sorted(gaps, key=lambda gap: abs(sum(gap) / 2 - wanted))[:3]
    low, high = max(near, key=lambda gap: gap[1] - gap[0])
    return (low + high) / 2


def _likeliest(daemon: Client, prompt: Sequence[int]) -> TopLogprobs:
    events = daemon.submit(prompt, max_tokens=1, temperature=0.0, logprobs=MAX_TOP_LOGPROBS, cache=False)
    return next(event.top[0] for event in list(events) if isinstance(event, Tokens))


def _drawn(daemon: Client, prompt: Sequence[int], options: Mapping[str, Any], seeds: range) -> Iterator[int]:
    """The token drawn with each seed."""
    flight: deque[Iterator[Event]] = deque()
    for seed in seeds:
        events = daemon.submit(prompt, max_tokens=1, seed=seed, cache=False, **options)
        next(events)  # `Accepted`: it is on its way
        flight.append(events)
        if len(flight) == IN_FLIGHT:
            yield from _ids(flight.popleft())
    while flight:
        yield from _ids(flight.popleft())


def _ids(events: Iterator[Event]) -> Iterator[int]:
    for event in events:
        if isinstance(event, Tokens):
            yield from event.ids

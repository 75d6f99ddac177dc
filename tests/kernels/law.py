"""The sampler's law: the definition's own text drawing many samples at once, and what it must draw, by enumeration.

Samples are words: the first ids of an answer, as a chain of drafts makes them with the engine's own `Request`, `draw`,
`verified` and `until_end`. A word's probability is the product of the next ids', computed here in another way.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter

import numpy as np
import torch
from msgspec.structs import replace
from mutants import mutant

from fwd.engine import sampler
from fwd.engine.request import Drawn, Request
from fwd.engine.sampler import NO_TOP
from fwd.engine.speculate import verify
from fwd.kernels import sampling
from fwd.kernels.noise import gumbel
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Submit
from fwd.protocol.values import Limits, Sampling

SAMPLES = 200_000
PLAIN, NO_LIMITS = Sampling(), Limits()
BLOCK = 4096  # samples whose noise is made at once
PROMPT = (1, 3, 1)
ALONG_ROWS = ("return int(kept[scores.argmax()])", "return kept[scores.argmax(axis=-1)]")


@dataclass(frozen=True)
class World:
    """A target and a drafter that look at the last id only, a way of drawing, and words of `length` ids."""

    vocab: int = 5
    length: int = 4
    sampling: Sampling = PLAIN
    limits: Limits = NO_LIMITS
    grammar: bool = False  # ids after which some others may not come
    drafts: int = 3
    choosy: bool = False  # a draft is dropped where its drafter thought it unlikely, after its value was seen
    seed: int = 0

    def __str__(self) -> str:
        default, shown = PLAIN, [f"{self.vocab}^{self.length}"]
        for name in Sampling.__struct_fields__:
            value = getattr(self.sampling, name)
            shown += [f"{name}={value}"] if value != getattr(default, name) else []
        shown += ["stops"] * bool(self.limits.stop_ids) + ["grammar"] * self.grammar + ["choosy"] * self.choosy
        return " ".join([*shown, *["alone"] * (self.drafts == 0)])

    @property
    def target(self):
        """float32 [vocab, vocab]: the logits after each id."""
        return np.random.default_rng([self.seed, self.vocab]).normal(0, 1.2, (self.vocab,) * 2).astype(np.float32)

    @property
    def drafter(self):
        """The same, of which the drafter knows a part."""
        off = np.random.default_rng([self.seed, self.vocab, 1]).normal(0, 0.7, (self.vocab,) * 2)
        return (self.target + off).astype(np.float32)

    def allowed(self, last):
        """bool [vocab]: what the grammar lets through after an id."""
        found = np.ones(self.vocab, dtype=np.bool_)
        if self.grammar:
            found[[(last + 1) % self.vocab, (last + 3) % self.vocab]] = False
        return found

    def mask(self, last):
        """The same as the sampler reads it."""
        if not self.grammar:
            return None
        bits = np.zeros(-(-self.vocab // 32) * 32, dtype=np.bool_)
        bits[: self.vocab] = self.allowed(last)
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def request(self, output):
        """The engine's own request that has made `output`."""
        limits = replace(self.limits, max_tokens=self.length)
        emitted = pack_ids(output)
        return Request(
            Submit(prompt=pack_ids(PROMPT), emitted=emitted, sampling=self.sampling, limits=limits, seed=self.seed)
        )


# ---- what must be drawn ----


def probabilities(logits, world: World, output: Sequence[int]):
    """float64 [vocab]: how likely each id comes next, by the words of the documentation."""
    sampling, x = world.sampling, logits.astype(np.float64)
    for token in {*PROMPT, *output}:
        x[token] = x[token] / sampling.repetition_penalty if x[token] > 0 else x[token] * sampling.repetition_penalty
    for token in set(output):
        x[token] -= sampling.presence_penalty + sampling.frequency_penalty * list(output).count(token)
    for token, bias in sampling.logit_bias.items():
        x[token] += bias
    if len(output) < world.limits.min_tokens:
        x[list(world.limits.stop_ids)] = -np.inf
    x[~world.allowed([*PROMPT, *output][-1])] = -np.inf
    order = np.argsort(-x, kind="stable")
    if sampling.temperature < 1e-5:
        return np.eye(world.vocab)[order[0]]
    weights = np.exp((x - x.max()) / sampling.temperature)
    if sampling.top_k:
        weights[order[sampling.top_k :]] = 0
    if sampling.top_p < 1:
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= sampling.top_p * weights.sum()]] = 0
    weights[weights < sampling.min_p * weights.max()] = 0
    return weights / weights.sum()


def law(world: World):
    """The probability of each word that can come."""
    found, open_ = {}, {(): 1.0}
    target = world.target
    while open_:
        word, chance = open_.popitem()
        if len(word) == world.length or set(word[-1:]) & set(world.limits.stop_ids):
            found[word] = chance
            continue
        after = probabilities(target[[*PROMPT, *word][-1]], world, word)
        open_ |= {(*word, token): chance * p for token, p in enumerate(after.tolist()) if p}
    return found


# ---- what is drawn ----


@cache
def _noise(vocab: int, position: int, count: int):
    """float64 [count, vocab], of the seeds 0 … count − 1, by the function itself, a block of seeds at a time."""
    tokens, seeds = np.arange(vocab), np.arange(count, dtype=np.uint64)[:, None]
    return np.concatenate([gumbel(seeds[i : i + BLOCK], position, tokens) for i in range(0, count, BLOCK)])


@dataclass
class Speaker:
    """Draws words of a world. Bugs are changes, as of `mutant`, of the sampler, of `draw` and of the verify rule."""

    world: World
    sampler_bugs: Sequence[str] = ()
    draw_bugs: Sequence[str] = ()
    verify_bugs: Sequence[str] = ()
    lost: bool = False  # planted: what follows drafts that all held is gone on from and never told
    room: Callable[[Request], int] = attrgetter("room")
    count: int = SAMPLES
    shown: list = field(default_factory=list)  # some rows as they were drawn: logits, draw, id

    def __post_init__(self) -> None:
        self.definition = mutant(sampling, *ALONG_ROWS, *self.sampler_bugs)
        self.definition.gumbel = lambda seeds, position, kept: _noise(self.world.vocab, position, self.count)[
            np.ix_(seeds, kept)
        ]
        self.draw = mutant(sampler, *self.draw_bugs).draw
        self.verify = mutant(verify, *self.verify_bugs)
        self.target, self.drafter = self.world.target, self.world.drafter

    def words(self):
        """How often each word came."""
        counts, open_ = defaultdict(int), {((), ()): [np.arange(self.count)]}
        while open_:
            output, told = min(open_, key=lambda words: len(words[0]))
            who = np.concatenate(open_.pop((output, told)))
            request = self.world.request(output)
            for drafts, drawn, some in self._round(request, who):
                for row, those in _by_row(drawn, some):
                    kept = self._kept(request, drafts, row)
                    after = (*output, *kept), (*told, *self._told(drafts, kept))
                    if kept[-1] in request.stop_ids or request.length + len(kept) >= request.limit:
                        counts[after[1]] += len(those)
                    else:
                        open_.setdefault(after, []).append(those)
        return dict(counts)

    def _round(self, request, who):
        """Drafts, what the target drew after none of them, after the first …, and who had these drafts."""
        open_ = [((), [], who)]
        while open_:
            drafts, drawn, who = open_.pop()
            last = [*request.ids, *drafts][-1]
            draw = self.draw(request, request.length, drafts, mask=self.world.mask(last))
            drawn = [*drawn, self._sample(self.target[last], draw, who)]
            if len(drafts) == min(self.world.drafts, self.room(request)):
                yield drafts, np.stack(drawn, axis=1), who
                continue
            guess = self._sample(self.drafter[last], self.draw(request, request.length, drafts), who)
            for token in np.unique(guess).tolist():
                those = guess == token
                left = [each[those] for each in drawn], who[those]
                if self.world.choosy and self._unlikely(last, token):
                    yield drafts, np.stack(left[0], axis=1), left[1]
                else:
                    open_.append(((*drafts, token), *left))

    def _unlikely(self, last, token):
        weights = np.exp(self.drafter[last])
        return weights[token] < 0.2 * weights.sum()

    def _sample(self, logits, draw, who):
        draw.seed = who
        drawn = np.broadcast_to(self.definition.sample_row(logits, draw), who.shape)
        draw.seed = int(who[0])
        self.shown.append((logits, draw, int(drawn[0])))
        return drawn

    def _kept(self, request, drafts, drawn):
        """What one round commits, as the loop does it."""
        found = self.verify.verified(drafts, [Drawn(token, 0.0, NO_TOP, finite=True) for token in drawn])
        return [token.id for token in self.verify.until_end(request, found)]

    def _told(self, drafts, kept):
        return kept[: len(drafts)] if self.lost and drafts else kept


def _by_row(drawn, who):
    rows, which = np.unique(drawn, axis=0, return_inverse=True)
    for index, row in enumerate(rows.tolist()):
        yield row, who[which.ravel() == index]


# ---- the comparison ----


@dataclass(frozen=True)
class Verdict:
    """`p` of the chi-square test, the total variation, mean and spread of that of controls, and impossible words."""

    p: float
    variation: float
    control: float
    spread: float
    impossible: int

    def holds(self, tests: int) -> bool:
        """By Bonferroni for so many tests."""
        return self.variation <= 1.25 * self.control and self.fits(tests)

    def fits(self, tests: int) -> bool:
        """The same of worlds drawn at random: where few words come often, controls too are more than 1.25 × off."""
        likely = self.variation <= max(1.25 * self.control, self.control + 5 * self.spread)
        return self.p * tests > 1e-4 and likely and not self.impossible


def judged(world: World, counts) -> Verdict:
    """Compare how often words came with how often they should; the controls are numpy's own draws, as many."""
    words = law(world)
    chances = np.array(list(words.values()))
    seen = np.array([counts.get(word, 0) for word in words])
    total = sum(counts.values())
    controls = np.random.default_rng(world.seed + 1).multinomial(total, chances / chances.sum(), size=64)
    variations = [_variation(each, total, chances) for each in controls]
    return Verdict(
        _p_value(seen, chances * total),
        _variation(seen, total, chances),
        float(np.mean(variations)),
        float(np.std(variations)),
        total - int(seen.sum()),
    )


def _variation(seen, total, chances):
    return float(np.abs(seen / total - chances).sum() / 2)


def _p_value(seen, expected) -> float:
    """Of Pearson's chi-square; words that are expected less than 20 times count as one."""
    rare = expected < 20
    seen = np.append(seen[~rare], seen[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    seen, expected = seen[expected > 0], expected[expected > 0]
    if len(seen) < 2:
        return 1.0
    statistic = float(((seen - expected) ** 2 / expected).sum())
    half = torch.tensor([(len(seen) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))

"""The sampler's law: what is drawn, by drafts that share its noise or without, comes as often as it should.

Executed are `fwd.kernels.sampling` (its own text, with its last argmax taken along rows), `fwd.kernels.noise`, and the
engine's `draw`, `Request.room`, `verified` and `until_end`; some of the rows are drawn by `Ops.sample` once more.
"""

import numpy as np
import pytest
import torch
from law import SAMPLES, Speaker, World, judged, law, probabilities
from msgspec.structs import replace

from fwd.kernels import sample
from fwd.kernels.ops import Draw
from fwd.kernels.reference import Reference
from fwd.protocol.values import Limits, Sampling

REFERENCE = Reference()
STOPS = Limits(stop_ids=(2, 4), min_tokens=2)
PENALTIES = Sampling(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3)
WORLDS = [
    World(),
    World(drafts=0),
    World(choosy=True),
    World(vocab=8, sampling=Sampling(temperature=0.5), drafts=2),
    World(sampling=Sampling(temperature=2.0), drafts=1),
    World(vocab=8, sampling=Sampling(temperature=0.0, frequency_penalty=1.0)),
    World(vocab=8, sampling=Sampling(top_k=3)),
    World(vocab=16, length=3, sampling=Sampling(top_p=0.8)),
    World(vocab=16, length=3, sampling=Sampling(min_p=0.1), drafts=2),
    World(vocab=8, length=3, sampling=Sampling(repetition_penalty=1.6)),
    World(sampling=Sampling(presence_penalty=1.1)),
    World(sampling=Sampling(frequency_penalty=-0.8)),
    World(vocab=8, length=3, sampling=Sampling(logit_bias={1: 1.5, 6: -100.0})),
    World(limits=STOPS),
    World(vocab=8, length=3, grammar=True),
    World(vocab=32, length=2, sampling=Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02)),
    World(sampling=Sampling(temperature=0.8, top_p=0.92)),  # the case of the research
    World(sampling=Sampling(temperature=0.8, top_p=0.92), drafts=0),
    World(sampling=replace(PENALTIES, temperature=0.8, top_p=0.85)),
    World(sampling=replace(PENALTIES, top_p=0.9, logit_bias={0: 1.0}), limits=STOPS, grammar=True),
]
MASKED_LATE = "(0 if draw.mask is None else np.where(allowed(draw.mask, len(logits))[kept], 0, -np.inf))"
BUGS = {
    "noise of one position for all": {
        "sampler_bugs": ["gumbel(draw.seed, draw.position, kept)", "gumbel(draw.seed, 3, kept)"]
    },
    "temperature after the noise": {
        "world": World(sampling=Sampling(temperature=0.5)),
        "sampler_bugs": [
            *("tempered = temper(adjusted, draw.temperature)", "tempered = adjusted"),
            *("gumbel(draw.seed, draw.position, kept)", "gumbel(draw.seed, draw.position, kept) / draw.temperature"),
        ],
    },
    "no temperature": {
        "world": World(sampling=Sampling(temperature=0.8)),
        "sampler_bugs": ["tempered = temper(adjusted, draw.temperature)", "tempered = adjusted"],
    },
    "mask after thresholds and noise": {
        "world": World(grammar=True, sampling=Sampling(top_k=3)),
        "sampler_bugs": [
            *("out[~allowed(draw.mask, len(out))] = -np.inf", "pass"),
            *("gumbel(draw.seed, draw.position, kept)", f"gumbel(draw.seed, draw.position, kept) + {MASKED_LATE}"),
        ],
    },
    "top-p of logits without penalties": {
        "world": World(sampling=replace(PENALTIES, top_p=0.8)),
        "sampler_bugs": ["kept = keep(tempered, draw)", "kept = keep(temper(logits, draw.temperature), draw)"],
    },
    "position off by one for drafts": {
        "draw_bugs": ["position=length + len(drafts),", "position=length + max(0, len(drafts) - 1),"]
    },
    "noise by row": {"draw_bugs": ["position=length + len(drafts),", "position=request.prompt + len(drafts),"]},
    "drafts do not count for penalties": {
        "world": World(sampling=Sampling(frequency_penalty=0.6)),
        "draw_bugs": ["if wanted and drafts:", "if not drafts and drafts:"],
    },
    "drafts beyond min_tokens, banned as the first row is": {
        "world": World(limits=STOPS),
        "draw_bugs": ["banned=banned(request, length + len(drafts)),", "banned=banned(request, length),"],
        "room": lambda request: request.limit - request.length - 1,
    },
    "drafts are not compared": {"verify_bugs": ["not token.finite or token.id != draft", "not token.finite"]},
    "what follows the last draft is lost": {"lost": True},
}
TESTS = len(WORLDS)


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_words_come_as_often_as_they_should(world):
    speaker = Speaker(world)
    counts = speaker.words()
    verdict = judged(world, counts)

    assert sum(counts.values()) == SAMPLES >= 2e5
    assert verdict.holds(TESTS), verdict
    assert_sampled(speaker)


def assert_sampled(speaker, sample=REFERENCE.sample):
    """Rows that were drawn with thousands of others are those that the op draws."""
    rows = speaker.shown[:: len(speaker.shown) // 200 + 1]
    logits = torch.from_numpy(np.stack([logits for logits, _, _ in rows]))
    assert sample(logits, [draw for _, draw, _ in rows]).ids.tolist() == [token for _, _, token in rows]


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug):
    planted = {"world": World(), **BUGS[bug]}
    verdict = judged(planted["world"], Speaker(**planted).words())

    assert not verdict.holds(TESTS), verdict


def test_the_law_by_hand():
    """Two ids after penalties, of equals the lowest."""
    world = World(vocab=5, length=1, sampling=Sampling(temperature=2.0, top_k=2, presence_penalty=1.0))
    logits = np.array([1.0, 3.0, 2.0, 0.0, -1.0], dtype=np.float32)
    ratio = np.exp((2.0 - 1.0) / 2)

    assert probabilities(logits, world, (1,)) == pytest.approx([0, 0.5, 0.5, 0, 0])
    assert probabilities(logits, world, (1, 2)) == pytest.approx([1 / (1 + ratio), ratio / (1 + ratio), 0, 0, 0])
    assert sum(law(World(limits=STOPS, sampling=PENALTIES)).values()) == pytest.approx(1)


@pytest.mark.parametrize("world", [WORLDS[16], WORLDS[18], WORLDS[19]], ids=str)
def test_kernels_draw_the_same_rows(execution, world):
    """What 2·10⁵ words of the definition are said to be, those of the kernels are, as they draw the same ids."""
    speaker = Speaker(world, count=20_000)
    speaker.words()
    launcher = execution.launcher
    workspace = sample.Workspace.new(launcher, world.vocab)
    assert_sampled(speaker, lambda rows, draws: sample.sample(launcher, workspace, rows.to(launcher.device), draws))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 9))
@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_words_of_other_worlds_come_as_often_as_they_should(world, seed):
    grown = World(**{**{name: getattr(world, name) for name in World.__dataclass_fields__}, "seed": seed})
    verdict = judged(grown, Speaker(grown).words())
    assert verdict.fits(8 * TESTS), (seed, verdict)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "world",
    [World(vocab=64, length=2, sampling=Sampling(temperature=0.9)), World(sampling=WORLDS[16].sampling)],
    ids=str,
)
def test_a_million_and_a_half_words(world):
    verdict = judged(world, Speaker(world, count=1_500_000).words())
    assert verdict.holds(2), verdict


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_two_hundred_thousand_draws_of_kernels(execution):
    """The kernels themselves, 16 rows a launch, with everything on."""
    world = World(vocab=16, length=1, sampling=replace(PENALTIES, temperature=0.8, top_p=0.95, min_p=0.01))
    request, counts = world.request(()), {}
    launcher = execution.launcher
    workspace = sample.Workspace.new(launcher, world.vocab)
    logits = torch.from_numpy(world.target[request.ids[-1]]).repeat(16, 1).to(launcher.device)
    speaker = Speaker(world)
    wanted = speaker.draw(request, request.length)
    for first in range(0, SAMPLES, 16):
        draws = [Draw(**{**_fields(wanted), "seed": first + row}) for row in range(16)]
        for token in sample.sample(launcher, workspace, logits, draws).ids.tolist():
            counts[(token,)] = counts.get((token,), 0) + 1
    verdict = judged(world, counts)
    assert verdict.p > 1e-4, verdict
    assert not verdict.impossible
    assert counts == speaker.words()


def _fields(draw):
    return {name: getattr(draw, name) for name in Draw.__slots__}

"""Promise 1 while drafting: no guess, right or wrong, changes an id, a log-probability or a cell of the cache."""

import random

import pytest
from drafted import SEED, Life, lives
from harness import Cell
from inprocess import alone, load, requests
from kinds import KINDS
from mutants import mutant

from fwd.engine import runner, sampler
from fwd.engine import step as step_module
from fwd.engine.speculate import verify

pytestmark = pytest.mark.usefixtures("one_thread")
CELLS = (
    Cell("llama3-rope", "float32"),
    Cell("qwen3-sliding", "bfloat16", "fp8"),
    Cell("gpt-oss", "bfloat16"),
    Cell("deepseek", "bfloat16", "fp8"),
    Cell("qwen3-moe", "float32", "bfloat16"),
)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_drafts_change_nothing(cell, tmp_path):
    rng = random.Random(f"{SEED} {cell}")
    loaded = load(cell, tmp_path)
    rounds, looked, died = lives(loaded, requests(rng, 5), rng, 10, looks=0.5)

    assert set(range(5)) <= {held for _, held in rounds}
    assert set(range(1, 8)) <= {drafts for drafts, _ in rounds}
    assert len(looked) == len(loaded.plan.groups)
    assert min(looked.values()) > 1000
    assert died > 1


def planted(monkeypatch, bug):
    match bug:
        case "drafts are not compared":
            monkeypatch.setattr(runner, "verified", lambda _, drawn: drawn)
        case "the noise of drafts is that of the row above":
            bug = mutant(sampler, "position=length + len(drafts),", "position=length + max(0, len(drafts) - 1),")
            monkeypatch.setattr(runner, "draw", bug.draw)
        case "drafts do not count for penalties":
            bug = mutant(sampler, "if wanted and drafts:", "if not drafts and drafts:")
            monkeypatch.setattr(runner, "draw", bug.draw)
        case "the last draft writes another cell":
            monkeypatch.setattr(step_module.Step, "_fill_many", leaky(step_module.Step._fill_many))
        case "an answer goes on after its end":
            monkeypatch.setattr("fwd.engine.loop.until_end", lambda _, drawn: drawn)


def leaky(fill):
    def filled(self, row, line, request, positions, drafts=()):
        fill(self, row, line, request, positions, drafts)
        if drafts:
            for slots in self._slots:
                slots[row + len(positions) - 1] = slots[row]

    return filled


BUGS = (
    "drafts are not compared",
    "the noise of drafts is that of the row above",
    "drafts do not count for penalties",
    "the last draft writes another cell",
    "an answer goes on after its end",
)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, tmp_path, monkeypatch):
    rng = random.Random(SEED)
    loaded = load(CELLS[0], tmp_path)
    asked = requests(rng, 8)
    answers = {request.id: alone(loaded, request) for request in asked}
    planted(monkeypatch, bug)
    nature = "fool" if bug == BUGS[0] else "oracle"

    def live():
        for _ in range(4):
            Life(loaded, asked, answers, rng, nature).live()

    with pytest.raises(AssertionError):
        live()


def test_the_verify_rule_by_hand():
    drawn = [verify.Drawn(token, 0.0, sampler.NO_TOP, finite=token != 9) for token in (5, 6, 9, 7)]
    assert [len(verify.verified(drafts, drawn)) for drafts in [(4, 6, 9), (5, 7, 9), (5, 6, 9)]] == [1, 2, 3]
    assert verify.verified((), drawn[:1]) == drawn[:1]


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(40))
def test_drafts_change_nothing_for_any_model(seed, tmp_path):
    """Any kind of model with any weights, 16 requests."""
    rng = random.Random(f"{SEED} {seed}")
    cell = Cell(rng.choice(sorted(KINDS)), rng.choice(["float32", "bfloat16"]), rng.choice(["auto", "bfloat16", "fp8"]))
    print(f"seed {seed}: {cell}")  # noqa: T201
    loaded = load(cell, tmp_path, seed=seed)
    rounds, looked, died = lives(loaded, requests(rng, 16, tokens=60), rng, 30)

    assert set(range(16)) <= {held for _, held in rounds}
    assert len(looked) == len(loaded.plan.groups)
    assert died > 20

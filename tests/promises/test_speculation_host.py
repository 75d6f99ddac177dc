"""Promise 1 while drafting on `host`: the kernels verify drafts, and no guess changes an id, a number or a cell."""

import random

import pytest
from drafted import SEED, lives
from harness import Cell
from inprocess import load, requests
from kinds import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")
CELLS = (
    Cell("qwen3-sliding-64", "bfloat16", "fp8"),
    Cell("glm4-moe-lite", "bfloat16"),
)
TAKEN = ("llama-64", "qwen3-64", "qwen3-sliding-64", "gpt-oss-64", "qwen3-moe-64", "glm4-moe-lite", "deepseek")


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_drafts_change_nothing(cell, tmp_path):
    rng = random.Random(f"{SEED} {cell}")
    loaded = load(cell, tmp_path, "host")
    rounds, looked, died = lives(loaded, requests(rng, 3, tokens=16), rng, 5)

    assert sum(rounds.values()) > 10
    assert len(looked) == len(loaded.plan.groups)
    assert died


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(20))
def test_drafts_change_nothing_for_any_model(seed, tmp_path):
    rng = random.Random(f"{SEED} host {seed}")
    assert set(TAKEN) <= set(KINDS)
    cell = Cell(rng.choice(TAKEN), "bfloat16", rng.choice(["bfloat16", "fp8"]))
    print(f"seed {seed}: {cell}")  # noqa: T201
    loaded = load(cell, tmp_path, "host", seed)
    rounds, looked, _ = lives(loaded, requests(rng, 10, tokens=40), rng, 45)

    assert set(range(13)) <= {held for _, held in rounds}
    assert len(looked) == len(loaded.plan.groups)

"""`fwd selftest`: it passes on a real engine, sees one that breaks its promise, and its mathematics is right."""

import json
import math
import random
import subprocess
from collections import Counter

import numpy as np
import pytest
from apiserver import script
from checkpoints import make
from launch import daemon, launch

from fwd.cli.selftest import law, same
from fwd.kernels import sampling
from fwd.kernels.sampling import Draw
from fwd.protocol.values import Timing, TopLogprobs


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    make("llama", path)
    return path


def test_a_real_engine_passes(fwd, llama):
    result = fwd("selftest", llama, "--quick", "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["ok"]) == (0, True), result.stdout
    assert found["bytes"]["answers"] == 6 * found["bytes"]["ways"]
    assert found["bytes"]["differences"] == []
    assert found["p"] == min(each["p"] for each in found["sampler"])
    assert [each["draws"] for each in found["sampler"]] == [256] * len(law.MIXES)
    if found["engine"]["drafters"]:
        assert 0 < found["bytes"]["accepted"] < found["bytes"]["drafted"]


def test_an_engine_whose_drafts_matter_fails(fwd, folder):
    with daemon(script(drafters=("suffix",), careless="drafts", context=512), folder) as running:
        result = fwd("selftest", "--quick", "--uds", running.uds)
    assert result.exit_code == 6
    heading, compared, first, _, verdict = result.stdout.splitlines()
    assert heading == f"{folder.name} in float32 on cpu (fake), drafters suffix"
    assert compared.startswith("bytes: 42 answers in 7 ways")
    assert "token 5 is id" in first
    assert "drafter auto, 1 at once" in first
    assert verdict.startswith("FAILED: 36 answers are not the same bytes and tokens are not drawn by their law")


def test_an_engine_whose_neighbours_matter_fails(fwd, folder):
    with daemon(script(drafters=("suffix",), careless="neighbours", context=512), folder) as running:
        result = fwd("selftest", "--quick", "--json", "--uds", running.uds)
    differences = json.loads(result.stdout)["bytes"]["differences"]
    assert (result.exit_code, {each["token"] for each in differences}) == (6, {5})
    assert all(each["way"].endswith("6 at once") for each in differences)


def test_an_engine_that_draws_by_another_law_fails():
    """The fake engine draws as if there were no logits."""
    command = launch(script(context=512, vocab=8192), "selftest", "demo", "--quick")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (6, "")
    verdict = done.stdout.splitlines()[-1]
    assert verdict.startswith("FAILED: tokens are not drawn by their law (p ≤ 0.0001)")


def test_a_context_that_holds_nothing(fwd, folder):
    with daemon(script(context=24), folder) as running:
        result = fwd("selftest", "--quick", "--uds", running.uds)
        assert (result.exit_code, result.stderr.count("\n")) == (6, 1)
        assert "too short" in result.stderr


def test_every_way_and_every_case():
    found = same.ways(["suffix", "model"], (1, 4))
    assert len(set(found)) == len(found) == 2 * 6 - 1
    assert same.ALONE not in found
    assert {way.max_draft for way in found if way.drafter == "model"} == {3, 15}
    every = same.cases({"a": [1], "b": [2]}, 2, 9)
    assert len({case.name for case in every}) == len(every) == 2 * 2 * len(same.SAMPLINGS)


@pytest.mark.parametrize("field", ["ids", "logprobs", "top", "reason"])
def test_any_difference_is_seen(field, monkeypatch):
    top = [TopLogprobs(ids=(1, 2), logprobs=(-0.5, -1.0))] * 3
    first = same.Answer([1, 2, 3], [-0.5, -0.25, -1.0], top, "length", Timing())
    other = {
        "ids": [1, 9, 3],
        "logprobs": [-0.5, -0.2500001, -1.0],
        "top": [top[0], TopLogprobs(), top[0]],
        "reason": "stop",
    }
    answers = iter([[first], [first._replace(**{field: other[field]}, timing=Timing(drafted={"x": 5}))]])
    monkeypatch.setattr(same, "_answers", lambda *_: next(answers))
    found = same.compare(None, [same.Case("x", [7], {})], [same.Way("auto", -1, 2)], lambda _: None)
    (difference,) = found.differences
    assert difference.token == (3 if field == "reason" else 1)
    assert (found.answers, found.drafted) == (1, 5)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 10, 19, 40])
def test_the_chance_of_chi_square(freedom):
    """Against the integral of its density, and known quantiles."""
    for statistic in (0.01, 0.5, 1.0, freedom, 2.0 * freedom, 60.0):
        # Substituting x = y² takes away the pole at 0.
        y = np.linspace(math.sqrt(statistic), 40.0, 400_001)
        density = 2 * y ** (freedom - 1) * np.exp(-(y**2) / 2)
        expected = np.trapezoid(density, y) / (2 ** (freedom / 2) * math.gamma(freedom / 2))
        assert law.exceeds(statistic, freedom) == pytest.approx(expected, rel=1e-6)
    assert law.exceeds(0.0, freedom) == 1.0


def test_known_quantiles():
    for statistic, freedom, chance in ((3.841459, 1, 0.05), (18.307038, 10, 0.05), (37.697298, 15, 0.001)):
        assert law.exceeds(statistic, freedom) == pytest.approx(chance, rel=1e-5)
    assert law.exceeds(1e6, 3) == 0.0
    assert law.exceeds(5.0, 0) == 1.0


@pytest.mark.parametrize("mix", law.MIXES)
def test_the_law_is_that_of_the_definition(mix):
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(0, 2, 500).astype(np.float32)
        best = sampling.top_logprobs(logits, 20, sampling.log_total(logits))
        top = TopLogprobs(ids=tuple(best.ids), logprobs=tuple(best.logprobs))
        chances, options = law.law_of(top, mix)
        draw = Draw(
            **{("bias" if name == "logit_bias" else name): value for name, value in options.items()}, seed=0, position=0
        )
        tempered = sampling.temper(sampling.adjust(logits, draw), draw.temperature)
        kept = sampling.keep(tempered, draw)
        weights = sampling.weigh(tempered[kept], tempered.max())
        assert sorted(chances) == kept.tolist()
        expected = weights / weights.sum()
        assert [chances[token] for token in kept.tolist()] == pytest.approx(expected.tolist(), abs=1e-6)


def test_what_fits_and_what_does_not():
    chances = {1: 0.6, 2: 0.3, 3: 0.0999, 4: 0.0001}
    source = random.Random(5)
    drawn = Counter(source.choices(list(chances), list(chances.values()), k=4000))
    assert law.fit(drawn, chances)[1] > 0.001
    assert law.fit(drawn, {1: 0.5, 2: 0.4, 3: 0.0999, 4: 0.0001})[1] < law.LEAST
    assert law.fit(drawn, {1: 0.65, 2: 0.35}) == (math.inf, 0.0)
    assert law.fit(Counter({1: 50}), {1: 1.0})[1] == 1.0
    assert law.fit(Counter({1: 10}), {1: 0.9, 2: 0.1})[1] == 1.0  # too few to tell

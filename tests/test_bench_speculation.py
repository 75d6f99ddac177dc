"""The controller by arithmetic: on each GPU, model and text as good as the best fixed choice, and never worth turning
off. Traces have their seed in the bench, and time is told, not taken."""

import json
import sys

import model
import pytest
import readme
import speculation
import traces
from gpu import shapes


@pytest.fixture(autouse=True)
def no_results(tmp_path, monkeypatch):
    """Constants are those that are assumed, whatever has been measured."""
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    speculation.machine_of.cache_clear()


@pytest.mark.parametrize("drafter", speculation.DRAFTERS)
@pytest.mark.parametrize("gpu", speculation.GPUS)
@pytest.mark.parametrize("name", speculation.MODELS)
def test_the_controller_is_as_good_as_the_best_fixed_choice(name, gpu, drafter):
    for text in speculation.TRACES:
        found = speculation.number(name, gpu, drafter, text)
        assert found["against_fixed"] >= 0.97, found
        assert found["against_off"] >= 0.98, found


def test_where_what_is_written_changes_it_is_better_than_any():
    found = [speculation.number("llama-8b", "h200", drafter, "switching") for drafter in speculation.DRAFTERS]
    assert all(each["against_fixed"] > 1.03 for each in found)


def test_steps_take_what_the_plan_reads_and_the_formula_says():
    known, shape = model.constants("h200"), shapes.spec("llama-8b")
    at = speculation.machine_of("llama-8b", "h200", "eagle")
    size = shape.step_bytes(1, model.CONTEXT, "bfloat16")
    assert at.step(1) == pytest.approx(known.seconds(size, shapes.launches(shape), known.launch))
    assert at.step(8) < 1.01 * at.step(1), "of one sequence the cells are read once"
    mixture = speculation.machine_of("gpt-oss-120b", "h200", "eagle")
    assert mixture.step(4) > 1.5 * mixture.step(1), "each row visits experts of its own"


def test_a_fixed_choice_is_what_the_speculator_does_when_it_is_told_so():
    """So the two sides of the comparison are the same machine."""
    trace, at = speculation.trace_of("code", "eagle")[:1500], speculation.machine_of("llama-8b", "h200", "eagle")
    for name, count in (("suffix", 5), ("eagle", 3)):
        clock = traces.Clock()
        drafters = [
            traces.Guesses(each, {1: trace}, free=each == "suffix", clock=clock, machine=at)
            for each in ("suffix", "eagle")
        ]
        speculator = speculation.JointSpeculator(drafters[:1], drafters[1], ahead=True, clock=clock)
        request = traces.request_of(1, trace, traces.Draft(drafter=name, max_draft=count))
        rate = traces.run(speculator, [request], at, clock)
        assert rate == pytest.approx(traces.fixed(trace, at, free=name == "suffix", count=count), rel=0.02)


def test_texts_are_as_often_right_as_they_say():
    trace = speculation.trace_of("chat", "dflash")
    first, last = speculation.DRAFTERS["dflash"].rates["chat"]
    assert sum(place.neural > 0 for place in trace) / len(trace) == pytest.approx(first, abs=0.03)
    reached = [place.neural for place in trace if place.neural >= 1]
    assert last < sum(held >= 2 for held in reached) / len(reached) < first + 0.02
    edit = speculation.trace_of("edit", "dflash")
    assert sum(place.suffix for place in edit) / len(edit) > 8


def test_the_bench_prints_and_keeps_a_prediction(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speculation.py", "--save", str(tmp_path)])
    monkeypatch.setattr(speculation, "MODELS", ("llama-8b",))
    monkeypatch.setattr(speculation, "numbers", lambda: iter([speculation.number("llama-8b", "b200", "eagle", "chat")]))
    assert speculation.main() == 0
    (path,) = tmp_path.glob("*-speculation.json")
    kept = json.loads(path.read_text())
    assert kept["predicted"]
    assert kept["numbers"][0]["against_off"] > 1
    out = capsys.readouterr().out
    assert out.startswith("a prediction, not a measurement")
    assert f"seed {speculation.SEED}" in out

"""What a step takes by arithmetic: the bytes of the plan, the launches that there are, and whatever was measured."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import model
import pytest
import readme
from gpu import cards, checkpoint, configs, shapes

from fwd.engine.device import GPUS, host
from fwd.engine.device_runner import DeviceRunner
from fwd.engine.plan import plan
from fwd.kernels.host import HostLauncher
from fwd.models.load import load

BENCH = Path(__file__).resolve().parents[1] / "bench"
COMMON = {"versions": {}, "cpu": "a CPU", "cores": 2, "commit": "abc", "when": "2026-11-24T00:00:00", "dry": False}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results that is empty."""
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    return folder


def keep(folder, name, gpu, *numbers):
    run = {**COMMON, "gpu": {"name": gpu, "driver": "580"}, "parts": {"any": {"numbers": numbers}}}
    (folder / f"{name}-abc-gpu.json").write_text(json.dumps(run))


def engine(tokens_per_s, rows=1):
    size = shapes.spec("llama-8b").step_bytes(rows, 4096, "bfloat16")
    named = {"name": f"llama-8b, context 4096, rows {rows}: engine", "way": "engine", "model": "llama-8b"}
    return {**named, "rows": rows, "step_bytes": size, "value": tokens_per_s}


@pytest.mark.parametrize(
    ("name", "tokens_per_s"),  # as research/gpu-decode.md has it for as many launches; 8B within the rounding of bytes
    [("llama-8b", 260), ("llama-8b-fp8", 442), ("llama-8b-nvfp4", 636)],
)
def test_dense_models_are_predicted_as_the_research_does(results, name, tokens_per_s):
    (number, *_) = model.predicted(name, "h200", model.constants("h200"))
    assert number["value"] == pytest.approx(tokens_per_s, rel=0.005)


@pytest.mark.parametrize(("name", "gigabytes"), [("gpt-oss-20b", 3.81), ("gpt-oss-120b", 5.16), ("llama-8b", 15.55)])
def test_the_bytes_are_those_of_the_plan(results, name, gigabytes):
    numbers = model.predicted(name, "b200", model.constants("b200"))
    assert [number["rows"] for number in numbers] == [1, 2, 4, 8]
    for number in numbers:
        assert number["step_bytes"] == shapes.spec(name).step_bytes(number["rows"], 4096, "bfloat16")
        assert number["ceiling"] == pytest.approx(number["rows"] * 8e12 / number["step_bytes"])
        assert number["value"] < number["at_best"] < number["ceiling"]
        seconds = number["step_bytes"] / 6.8e12 + number["launches"] * 2e-6
        assert number["us"] == pytest.approx(seconds * 1e6)
    assert numbers[0]["step_bytes"] == pytest.approx(gigabytes * 1e9, rel=1e-3)


def test_launches_are_counted_by_layer():
    assert shapes.launches(shapes.spec("llama-8b")) == 32 * 5 + 4
    assert shapes.launches(shapes.spec("gpt-oss-120b")) == 36 * 6 + 4
    assert shapes.launches(shapes.spec("glm-4.7-flash")) == 1 * 7 + 46 * 8 + 4


@pytest.mark.parametrize("name", ["tiny", "tiny-gpt-oss-20b", "tiny-qwen3-30b-a3b-fp8", "tiny-glm-4.7-flash"])
def test_a_step_has_as_many_launches(name, tmp_path, monkeypatch):
    checkpoint.write(name, tmp_path, "cpu")
    loaded = load(tmp_path, device="host", dtype="bfloat16", context=64)
    sized, launched = plan(loaded.spec, host(1 << 34), context=64, max_seqs=1), []
    launch = HostLauncher.launch
    monkeypatch.setattr(
        HostLauncher,
        "launch",
        lambda self, kernel, *more, **how: (launched.append(kernel), launch(self, kernel, *more, **how)),
    )
    DeviceRunner(loaded, loaded.ops, sized)  # it runs one step
    assert len(launched) == shapes.launches(loaded.spec)


def test_a_measured_constant_replaces_the_assumed_one(results):
    assert {each.origin for each in model.constants("h200")} == {"assumed"}
    keep(results, "1", "NVIDIA H200", {"name": "read bandwidth, cold", "value": 4000.0}, engine(200), engine(900, 8))
    keep(results, "2", "NVIDIA H200", {"name": "dependent launch, one more kernel in a graph", "value": 0.75})
    keep(results, "3", "NVIDIA GB200", {"name": "read bandwidth, cold", "value": 7000.0})
    known = model.constants("h200")
    assert {each.origin for each in known} == {"measured"}
    assert known.bandwidth.value == 4e12
    assert known.least.value == pytest.approx(0.75e-6)
    found = next(iter(model.predicted("llama-8b", "h200", known)))
    assert found["value"] == pytest.approx(200, rel=1e-3), "the step that was measured comes out"
    assert {each.origin for each in model.constants("b200")} == {"assumed"}, "a GB200 is another"


def test_a_step_that_is_faster_than_its_bytes_costs_no_launch(results):
    keep(results, "1", "NVIDIA H200", {"name": "read bandwidth, cold", "value": 4000.0}, engine(400))
    assert model.constants("h200").launch == (0.0, "measured")


def test_what_does_not_fit_is_left_out_by_name(monkeypatch, capsys):
    found = {"numbers": [], "skipped": []}
    monkeypatch.setattr(model, "GPUS", {"h100": host(1 << 34)})
    model._add(found, "qwen3-30b-a3b", "h100", model.constants("h100"))
    assert [entry["name"] for entry in found["skipped"]] == ["qwen3-30b-a3b on H100"]
    assert "left out: the model does not fit" in capsys.readouterr().out


def test_it_runs_prints_its_formula_and_the_readme_calls_it_a_prediction(tmp_path, results):
    command = [sys.executable, BENCH / "model.py", "--save", results]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "a prediction, not a measurement: seconds of a step = bytes / bandwidth + launches · "
    )
    (path,) = results.glob("*-model.json")
    found = json.loads(path.read_text())
    assert found["predicted"]
    assert {(number["gpu"], number["model"]) for number in found["numbers"]} == {
        (gpu, name) for gpu in GPUS for name in configs.TRUE
    }
    shutil.copy(BENCH / "readme.py", tmp_path)
    table = readme.table()
    assert table.count("| predicted, not measured: tokens/s of one row at 4,096 tokens on H") == 2
    assert "gpt-oss-120b" in table
    assert "- model: no measurement: seconds of a step = bytes / bandwidth" in table


def test_the_key_of_a_card():
    assert cards.key("NVIDIA H100 80GB HBM3") == "H100"
    assert cards.key("NVIDIA H100 NVL") == "H100 NVL"
    assert cards.key("NVIDIA A100") == ""

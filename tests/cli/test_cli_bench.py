"""The benches run and say what they promise; no number decides."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    make("llama", path)
    return path


def test_bench(fwd, llama, tmp_path):
    result = fwd("bench", llama, "--rounds", 1, "--tokens", 32, "--dtype", "float32", "--save", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (saved,) = tmp_path.iterdir()
    assert json.loads(saved.read_text()) == found
    assert saved.name.endswith("-bench.json")
    assert 0 < found["startup"]["accept_s"] < found["startup"]["ready_s"] < found["startup"]["first_token_s"]
    assert found["ceiling"]["gb_per_s"] > 0
    decode = found["decode"]["float32"]
    assert decode["step_bytes"] > 4 * 2 * 64 * 260
    assert all(decode[name] > 0 for name in ("socket", "http", "engine", "transformers", "ratio", "front_us_per_token"))
    assert {"python", "fwd", "torch", "transformers"} <= set(found["versions"])


def test_bench_prints_the_ceiling_before_the_value(fwd, llama):
    result = fwd("bench", llama, "--only", "decode", "--rounds", 1, "--tokens", 32, "--dtype", "bfloat16", "--no-peer")
    assert result.exit_code == 0, result.output
    assert result.stdout.index("memory:") < result.stdout.index("ceiling") < result.stdout.index("socket")
    assert "transformers" not in result.stdout


def test_front_bench(folder, tmp_path):
    command = [sys.executable, ROOT / "bench" / "front.py", "--model", folder, "--tokens", "64", "--rounds", "1"]
    done = subprocess.run([*command, "--save", tmp_path], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("to reach: 25 µs")
    (saved,) = tmp_path.iterdir()
    runs = json.loads(saved.read_text())["runs"]
    assert set(runs) == {"socket-1", "socket-8", "http-1", "http-8"}
    assert all(run["us_per_event"] > 0 and run["pieces"] > 0 for run in runs.values())


def test_the_numbers_of_the_readme_are_those_of_the_results():
    command = [sys.executable, ROOT / "bench" / "readme.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr

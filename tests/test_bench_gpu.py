"""The benches for a GPU run without one on tiny shapes, count the bytes that `fwd plan` counts, and lose nothing."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import readme
import torch
from click.testing import CliRunner
from gpu import cards, checkpoint, configs, report, shapes, streams, timing
from gpu.decoder import Decoder
from transformers import AutoModelForCausalLM

from fwd.cli import main
from fwd.kernels.gpu import probe, usable
from fwd.models.load import load

BENCH = Path(__file__).resolve().parents[1] / "bench"
ABSENT = usable(probe())
NUMBER = {"name", "unit", "against", "ceiling", "value", "share", "quartiles", "range", "samples"}
FACTS = {"what", "dry", "quick", "when", "commit", "cpu", "cores", "versions", "gpu"}


def bench(script, *flags, rc=0):
    done = subprocess.run(
        [sys.executable, BENCH / script, *map(str, flags)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == rc, done.stdout + done.stderr
    return done


def saved(folder, what):
    (path,) = folder.glob(f"*-{what}.json")
    return json.loads(path.read_text())


def check_part(part):
    for number in part["numbers"]:
        assert set(number) >= NUMBER, number
        assert number["range"][0] <= number["quartiles"][0] <= number["value"] <= number["quartiles"][1]
        assert number["quartiles"][1] <= number["range"][1]
        assert (number["ceiling"] is None) == (number["share"] is None)
        assert number["ceiling"] is None or (number["ceiling"] > 0 and number["against"])
    assert all(set(entry) == {"name", "why"} for entry in part["failures"] + part["skipped"])


def check(found):
    """A report of a dry run that went well."""
    assert set(found) >= FACTS
    assert found["dry"]
    assert "without a GPU" in found["note"]
    assert found["gpu"] is None
    assert found["complete"]
    assert found["numbers"]
    assert not found["failures"], found["failures"]
    check_part(found)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    checkpoint.write("tiny", folder, "cpu")
    return folder


@pytest.fixture(scope="session")
def ceilings(tmp_path_factory):
    """What roofline.py would save."""
    path = tmp_path_factory.mktemp("roofline") / "roofline.json"
    numbers = [{"name": "read bandwidth, cold", "value": 10.0}, {"name": "bf16 matrix rate", "value": 0.1}]
    path.write_text(json.dumps({"numbers": numbers}))
    return path


@pytest.mark.parametrize("name", configs.MODELS)
@pytest.mark.parametrize("context", [1, 129, 400])
def test_ops_together_read_what_a_step_must_read(name, context):
    model = shapes.spec(name)
    for rows in (1, 2, 8):
        for kv in ("bfloat16", "fp8"):
            work = shapes.step_work(model, rows, context, kv)
            size = sum(launches * size for launches, size in work.values())
            assert size == pytest.approx(model.step_bytes(rows, context, kv), abs=2 * model.layers if model.moe else 0)


@pytest.mark.parametrize("name", ["llama-1b", "llama-8b"])
def test_the_bytes_are_those_of_fwd_plan(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(configs.MODELS[name]))
    result = CliRunner().invoke(main, ["plan", str(tmp_path), "--gpu", "h200", "--context", "4096", "--json"])
    assert result.exit_code == 0, result.output
    found = {row["rows"]: row["bytes"] for row in json.loads(result.stdout)["ceilings"]}
    for rows, size in found.items():
        work = shapes.step_work(shapes.spec(name), rows, 4096, "bfloat16")
        assert sum(launches * each for launches, each in work.values()) == size


def test_the_true_shapes_are_those_of_the_research():
    assert shapes.spec("llama-8b").kv_bytes(1, "bfloat16") == 131_072
    linear = shapes.spec("llama-8b").step_bytes(0, 0, "bfloat16") / 2 - 128256 * 4096
    assert linear == pytest.approx(6.979e9, rel=1e-3)
    assert shapes.spec("llama-1b").weight_bytes() == pytest.approx(2.47e9, rel=1e-2)


def test_a_checkpoint_is_whole_and_its_weights_keep_sizes(tiny):
    model = load(tiny, device="cpu", dtype="float32")
    assert model.spec == load(tiny, device="cpu", dtype="float32").spec
    weight = model.layers[0].mlp.down.dequantize()
    assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.05)
    assert model.layers[0].mlp.norm.weight.float().mean().item() == pytest.approx(1, abs=0.02)


def test_every_token_of_a_checkpoint_is_a_text_of_its_own(tiny):
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    assert sorted(tokenizer["model"]["vocab"].values()) == list(range(512))


def test_a_number_states_its_ceiling_its_share_and_its_spread(tmp_path, capsys):
    chosen = argparse.Namespace(save=tmp_path, quick=False)
    kept = report.Report("made", chosen, None)
    assert kept.add("rate", "GB/s", [1.0, 3.0, 2.0], ceiling=4.0, against="most") == 2.0
    kept.add("time", "µs", [2.0], ceiling=1.0, against="least")
    kept.add("ratio", "×", [2.0], ceiling=1.0, against="goal", lower=True)
    kept.add("unbounded", "GB/s", [2.0])
    with kept.part("broken"):
        raise ValueError("told")
    kept.skip("absent", "why not")
    before = saved(tmp_path, "made")
    assert not before["complete"], "saved as it goes: who is killed has lost nothing"
    assert kept.finish() == 1
    found = saved(tmp_path, "made")
    assert [number["share"] for number in found["numbers"]] == [0.5, 0.5, 0.5, None]
    assert found["numbers"][0]["quartiles"] == [1.5, 2.5]
    assert found["failures"] == [{"name": "broken", "why": "ValueError: told"}]
    assert found["skipped"] == [{"name": "absent", "why": "why not"}]
    check_part(found)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("rate"))
    assert line.index("most 4") < line.index("2 GB/s (50%)")


def test_the_rate_of_rows_counts_while_all_of_them_decode():
    slow = streams.Row(marks=[(float(at), 1) for at in range(10, 20)], tokens=10)
    early = streams.Row(marks=[(at / 2, 1) for at in range(38)], tokens=76)
    assert streams.Run(0.0, [early, slow]).tokens_per_s == pytest.approx((17 * 2 + 8.5) / 8.5, rel=0.1)


def test_cold_buffers_are_several_times_the_cache():
    for size in (1 << 20, 8 << 20, 1 << 30):
        assert timing.copies(size, 50 << 20) * size >= 4 * (50 << 20)
    assert timing.copies(1 << 30, 50 << 20) == 2


def test_cards_are_known_by_their_names():
    assert cards.sheet("NVIDIA H100 80GB HBM3").bandwidth == 3.35e12
    assert cards.sheet("NVIDIA H200").bandwidth == 4.8e12
    assert cards.sheet("NVIDIA B200").matmul == 2250e12
    assert cards.sheet("NVIDIA A100") is None


def test_the_plain_decoder_computes_the_model(tiny):
    ids = torch.randint(0, 512, (40,), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).eval()(ids[None]).logits[0].argmax(-1)
        ours = Decoder(tiny, 64, "cpu")
        found = torch.cat([ours(token[None], torch.tensor([place]))[0] for place, token in enumerate(ids)])
    assert (found == wanted).float().mean() > 0.9  # bf16 ties may fall the other way


def test_roofline_runs_dry(tmp_path):
    done = bench("roofline.py", "--device", "host", "--tiny", "--save", tmp_path)
    assert done.stdout.startswith("a dry run")
    found = saved(tmp_path, "roofline")
    check(found)
    names = {number["name"] for number in found["numbers"]}
    assert {"read bandwidth, cold", "bf16 matrix rate", "meeting of all blocks in a kernel"} <= names


def test_kernels_run_dry(tmp_path, ceilings):
    bench("kernels.py", "--device", "host", "--tiny", "--roofline", ceilings, "--save", tmp_path)
    found = saved(tmp_path, "kernels")
    check(found)
    timed = {number["name"]: number for number in found["numbers"]}
    assert len(timed) == len(found["numbers"]), "names are unique"
    assert all(number["torch_us"] > 0 for number in timed.values())
    for rows in (1, 2):
        label = f"tiny, rows {rows}, context 64: "
        for name, (_, size) in shapes.step_work(shapes.spec("tiny"), rows, 64, "bfloat16").items():
            assert timed[label + name]["bytes"] == size
            assert timed[label + name]["ceiling"] == pytest.approx(size / 1e10 * 1e6)
        logits = rows * 512 * 4
        floor = (shapes.spec("tiny").step_bytes(rows, 64, "bfloat16") + logits) / 1e10 * 1e6
        assert timed[f"{label}all kernels of a step"]["ceiling"] == pytest.approx(floor)


def test_decode_runs_dry(tmp_path, ceilings):
    bench("decode.py", "--device", "cpu", "--tiny", "--roofline", ceilings, "--save", tmp_path)
    found = saved(tmp_path, "decode-tiny")
    check(found)
    decoded = [number for number in found["numbers"] if "way" in number]
    assert {(number["context"], number["rows"]) for number in decoded} == {(32, 1), (32, 2), (96, 1), (96, 2)}
    assert {number["way"] for number in decoded} == {"socket", "http", "engine"}
    for number in decoded:
        size = shapes.step_bytes(shapes.spec("tiny"), number["rows"], number["context"] + 32)
        assert number["step_bytes"] == size
        assert number["ceiling"] == pytest.approx(number["rows"] * 1e10 / size)
    assert any("prefill" in number["name"] for number in found["numbers"])
    assert found["engine"]["dtype"] == "bfloat16"


def test_peers_run_dry(tmp_path, ceilings):
    bench("peers.py", "--device", "cpu", "--tiny", "--roofline", ceilings, "--save", tmp_path)
    found = saved(tmp_path, "peers-tiny")
    check(found)
    assert {number["who"] for number in found["numbers"] if "who" in number} == {"fwd", "transformers", "torch.compile"}
    assert sum(" over " in number["name"] for number in found["numbers"]) == 2


def script(*flags, rc, **environment):
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    command = ["bash", BENCH / "gpu.sh", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == rc, done.stdout + done.stderr
    return done


def test_the_script_is_bash_and_checks_its_flags():
    subprocess.run(["bash", "-n", BENCH / "gpu.sh"], check=True, timeout=60)
    for flags in (["--slow"], ["--out"], ["--only"], ["--dry", "--only", "nothing"]):
        assert "usage:" in script(*flags, rc=2).stderr


@pytest.mark.skipif(ABSENT is None, reason="a GPU is here")
def test_without_a_gpu_the_script_says_so_in_one_line():
    done = script(rc=6)
    assert done.stderr.startswith("bench/gpu.sh needs a GPU: ")
    assert done.stderr.count("\n") == 1
    assert bench("roofline.py", rc=6).stderr.startswith("no GPU to measure: ")


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase $1 in */decode.py) echo it broke; exit 3;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    flags = ("--dry", "--quick", "--only", "decode-llama-1b", "--only", "roofline", "--out", tmp_path / "out")
    done = script(*flags, rc=1, PYTHON=str(python), FWD_COMMIT="")
    assert done.stderr.endswith("failed: decode-llama-1b\n")
    found = saved(tmp_path / "out", "gpu")
    assert set(found) >= FACTS
    assert found["dry"]
    assert found["failed"] == ["decode-llama-1b"]
    assert list(found["parts"]) == ["roofline", "decode-llama-1b"]
    assert found["parts"]["decode-llama-1b"]["code"] == 3
    assert found["parts"]["decode-llama-1b"]["tail"] == "it broke\n"
    assert found["parts"]["roofline"]["code"] == 0
    check_part(found["parts"]["roofline"])


def test_the_readme_takes_no_figure_from_a_dry_run(tmp_path, monkeypatch):
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    shutil.copy(BENCH / "readme.py", tmp_path)
    number = {"name": "read bandwidth, cold", "unit": "GB/s", "against": "data sheet", "ceiling": 4800.0}
    number |= {"value": 4400.0, "share": 4400 / 4800}
    common = {"versions": {}, "cpu": "a CPU", "cores": 2, "commit": "abc", "when": "2026-11-24T00:00:00"}
    real = {**common, "dry": False, "gpu": {"name": "NVIDIA H200", "driver": "580"}}
    (folder / "1-abc-gpu.json").write_text(json.dumps({**real, "parts": {"roofline": {"numbers": [number]}}}))
    later = {**real, "commit": "def", "parts": {"tests": {"counts": {}}}}
    (folder / "2-def-gpu.json").write_text(json.dumps(later))
    (folder / "3-abc-gpu.json").write_text(json.dumps({**common, "dry": True, "gpu": None, "parts": {}}))
    table = readme.table()
    assert "| GPU: read bandwidth, cold | 4,400 GB/s | 92% of data sheet, 4,800 |" in table
    assert "- gpu: NVIDIA H200, driver 580; a CPU" in table
    assert "commit abc, def;" in table

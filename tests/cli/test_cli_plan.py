"""`fwd plan`: numbers of a model of which only the config is there, and one line for what cannot be."""

import json

import pytest

from fwd.cli.bench import ceiling
from fwd.cli.plan import GPU_NAMES
from fwd.engine import memory
from fwd.engine.device import GPUS, cpu
from fwd.engine.plan import plan
from fwd.models.config import read_spec

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with 8 GB at 10 GB/s, whatever it has."""
    monkeypatch.setattr(memory, "available", lambda: 8_000_000_000)
    monkeypatch.setattr(ceiling, "bandwidth", lambda: {"gb_per_s": 10.0, "how": "said so"})


def document(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(result):
    """The one line on stderr of a usage error."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("fwd: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_the_gpus_are_those_that_are_known():
    assert tuple(GPUS) == GPU_NAMES


@pytest.mark.parametrize("gpu", GPU_NAMES)
def test_a_gpu_that_is_not_here(fwd, model, gpu):
    found = document(fwd("plan", model, "--gpu", gpu, "--context", 32768, "--kv-dtype", "fp8", "--json"))
    planned = plan(read_spec(model), GPUS[gpu], context=32768, kv_dtype="fp8")
    assert found["memory"] == planned.items
    assert (found["total"], found["needed"], found["device"]) == (planned.total, planned.needed, gpu)
    assert found["token"] == 36 * 2 * 8 * (128 + 4)
    assert found["sequence"] == 32768 * found["token"]
    assert [each["rows"] for each in found["ceilings"]] == [1, 2, 4, 8]
    assert all(each["ms"] == pytest.approx(each["bytes"] / GPUS[gpu].bandwidth * 1e3) for each in found["ceilings"])


def test_this_machine(fwd):
    found = document(fwd("plan", "--json"))
    assert (found["device"], found["available"], found["context"]) == ("cpu", 8_000_000_000, 2048)
    assert found["bandwidth"] == 10e9
    assert found["groups"] == [{"kind": "full", "window": 0, "units": 2048}]
    assert document(fwd("plan", "demo", "--max-seqs", 2, "--json"))["groups"][0]["units"] == 256
    assert document(fwd("plan", "demo", "--dtype", "float32", "--json"))["kv_dtype"] == "float32"
    assert document(fwd("plan", "demo", "--kv-bytes", 4 << 20, "--json"))["context"] == 1360


def test_nothing_is_measured_where_that_is_not_wanted(fwd, monkeypatch):
    monkeypatch.setattr(ceiling, "bandwidth", None)
    assert document(fwd("plan", "--no-measure", "--json"))["ceilings"] == []
    assert "ceiling" not in fwd("plan", "--no-measure").stdout


def test_the_table_says_what_the_document_says(fwd, model):
    arguments = ("plan", model, "--gpu", "h200", "--context", 4096)
    found, table = document(fwd(*arguments, "--json")), fwd(*arguments).stdout
    rows = dict(line.rsplit(maxsplit=1) for line in table.splitlines() if line.startswith("  "))
    for kind, size in {**found["memory"], "total": found["total"], "reserve": found["reserve"]}.items():
        assert rows[f"  {kind}"] == f"{size:,}"
    assert f"{found['groups'][0]['units']} pages (full)" in table
    assert "4,800.0 GB/s" in table
    assert table.index("ceiling: ") < table.index("bytes/step") < table.index(f"{found['ceilings'][0]['bytes']:,}")


def test_settings_count_as_they_do_for_serve(fwd, tmp_path, monkeypatch):
    monkeypatch.setenv("FWD_MAX_SEQS", "3")
    assert document(fwd("plan", "--json"))["max_seqs"] == 3
    assert document(fwd("plan", "--max-seqs", 5, "--json"))["max_seqs"] == 5


def test_a_model_that_does_not_fit(fwd, model):
    line = refusal(fwd("plan", model))
    planned = plan(read_spec(model), cpu(1 << 40), context=1)
    assert (
        line == f"fwd: the model does not fit: it needs {planned.needed:,} bytes at least and cpu has 8,000,000,000\n"
    )
    error = json.loads(fwd("plan", model, "--json").stdout)["error"]
    assert f"fwd: {error['message']}\n" == line


def test_a_context_that_does_not_fit_names_the_one_that_does(fwd, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 1 << 20}))
    line = refusal(fwd("plan", tmp_path, "--gpu", "h100", "--context", 1 << 20))
    fits = int(line.split(": ")[-1].split()[0])
    assert document(fwd("plan", tmp_path, "--gpu", "h100", "--context", fits, "--json"))["context"] == fits
    refusal(fwd("plan", tmp_path, "--gpu", "h100", "--context", fits + 16))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--gpu", "a100"), "'a100' is not one of 'h100', 'h200', 'b200'"),
        (("--context", 40961), "context: 40961 is more than the 40960 tokens of the model"),
        (("--context", -1), "context"),
        (("--context", "many"), "--context"),
        (("--kv-dtype", "int4"), "'int4' is not one of"),
        (("--dtype", "float8"), "'float8' is not one of"),
        (("--max-seqs", 17), "max_seqs"),
        (("--gpu", "h200", "--kv-bytes", 1), "kv_bytes: 1 hold 0 tokens; raise it to 2359296 for a context of 1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(fwd, model, arguments, named):
    assert named in refusal(fwd("plan", model, *arguments))


def test_fp8_that_the_heads_cannot_take(fwd, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "head_dim": 72}))
    line = refusal(fwd("plan", tmp_path, "--kv-dtype", "fp8"))
    assert "fp8 needs vectors of a multiple of 16, the model has 72: use bfloat16" in line


def test_a_folder_without_a_config(fwd, tmp_path):
    assert "has no config.json" in refusal(fwd("plan", tmp_path))


GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**CONFIG, "head_dim": 72}, "head_dim is 72: the kernels take one of 64, 128, 256"),
        ({**GPT_OSS, "num_attention_heads": 200, "num_key_value_heads": 2}, "200 heads on 2 kv heads"),
    ],
)
def test_a_model_that_kernels_do_not_take_is_planned_and_not_served(fwd, tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = fwd("plan", tmp_path, "--gpu", "b200")
    assert found.exit_code == 0, found.output
    assert "fits: " in found.stdout
    assert found.stdout.splitlines()[-1].startswith(f"not served there: {words}")
    assert document(fwd("plan", tmp_path, "--gpu", "b200", "--json"))["refused"].startswith(words)
    assert words in refusal(fwd("plan", tmp_path, "--device", "host"))


def test_a_dtype_that_the_kernels_of_a_gpu_do_not_take_is_refused(fwd, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "float32"}))
    words = "runs bfloat16 models, this one is float32: use --dtype bfloat16"
    assert words in refusal(fwd("plan", tmp_path, "--gpu", "b200"))


def test_a_drafter_is_planned_with_its_model(fwd):
    found = document(fwd("plan", "--no-measure", "--json"))
    without = document(fwd("plan", "--no-measure", "--draft-model", "none", "--json"))

    assert (found["drafter"], without["drafter"]) == ("model", "")
    assert (
        set(found["memory"]) - set(without["memory"])
        == {name for name in found["memory"] if "drafter" in name}
        != set()
    )
    assert "drafter_kv" in fwd("plan", "--no-measure").stdout
    assert "has no layers that predict further tokens" in refusal(fwd("plan", "--draft-model", "mtp"))
    assert "/nowhere is no folder" in refusal(fwd("plan", "--draft-model", "/nowhere"))

"""`fwd kernels`: what is built without a GPU, what is listed, and one line for what cannot be."""

import json
from pathlib import Path

import pytest
import structlog

from fwd.errors import KernelError
from fwd.kernels import jit, nvrtc, sources
from fwd.kernels.builds import Bound

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
KERNELS = {
    "gemv.cu": 'extern "C" __global__ void __launch_bounds__(64) {0}(float* x) {{ x[threadIdx.x] *= 2; }}\n',
    "sample.cu": 'extern "C" __global__ void __launch_bounds__(64) {0}(float* x, int n) {{ x[n] += 1; }}\n',
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Two files of one kernel each instead of those of fwd, and a cache."""
    made = tmp_path / "cuda"
    made.mkdir()
    for name, text in KERNELS.items():
        (made / name).write_text(text.format(name.removesuffix(".cu")))
    monkeypatch.setattr(sources, "home", lambda: made)
    monkeypatch.setattr(jit, "BUILDS", {name: {name.removesuffix(".cu"): Bound(32, 48)} for name in KERNELS})
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "cache"))
    yield made
    structlog.reset_defaults()


def document(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(result, code):
    """The one line on stderr."""
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("fwd: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_all_is_built_for_both_architectures(fwd, tmp_path):
    found = document(fwd("kernels", "build", "--json"))
    assert found["cache"] == str(tmp_path / "cache/kernels")
    assert [(each["source"], each["arch"], each["fresh"]) for each in found["builds"]] == [
        ("gemv.cu", "sm_90a", True),
        ("gemv.cu", "sm_100a", True),
        ("sample.cu", "sm_90a", True),
        ("sample.cu", "sm_100a", True),
    ]
    assert {each["compiler"] for each in found["builds"]} == {nvrtc.version()}
    again = document(fwd("kernels", "build", "--json"))["builds"]
    assert [each["path"] for each in again] == [each["path"] for each in found["builds"]]
    assert not any(each["fresh"] for each in again)


def test_one_architecture_and_another_cache(fwd, tmp_path, monkeypatch):
    found = document(fwd("kernels", "build", "--arch", "sm_100a", "--cache", tmp_path / "other", "--json"))
    assert [each["arch"] for each in found["builds"]] == ["sm_100a", "sm_100a"]
    assert document(fwd("kernels", "list", "--json"))["kernels"] == []
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "other"))
    assert len(document(fwd("kernels", "list", "--json"))["kernels"]) == 2


def test_the_lines_say_what_was_done(fwd, tmp_path):
    first, second = fwd("kernels", "build", "--arch", "sm_90a"), fwd("kernels", "build", "--arch", "sm_90a, sm_90a")
    assert first.exit_code == second.exit_code == 0
    assert first.stderr == ""
    assert [line.split()[:2] for line in first.stdout.splitlines()] == [
        ["gemv.cu", "sm_90a"],
        ["sample.cu", "sm_90a"],
        ["2", "files"],
    ]
    assert first.stdout.count("built in") == second.stdout.count("in the cache") == 2
    assert first.stdout.endswith(f"2 files in {tmp_path / 'cache/kernels'}\n")


def test_what_is_listed(fwd, folder):
    fwd("kernels", "build", "--arch", "sm_90a")
    found = document(fwd("kernels", "list", "--json"))
    assert [row["kernel"] for row in found["kernels"]] == ["gemv", "sample"]
    row = found["kernels"][0]
    assert (row["source"], row["arch"], row["spills"], row["stack"], row["shared"]) == ("gemv.cu", "sm_90a", 0, 0, 48)
    assert 0 < row["registers"] <= 32
    assert 0 <= row["age"] < 60
    assert not row["stale"]
    assert found["missing"] == [{"source": name, "arch": "sm_100a"} for name in KERNELS]
    (folder / "gemv.cu").write_text(KERNELS["gemv.cu"].format("another"))
    found = document(fwd("kernels", "list", "--json"))
    assert [(row["kernel"], row["stale"]) for row in found["kernels"]] == [("gemv", True), ("sample", False)]
    assert {"source": "gemv.cu", "arch": "sm_90a"} in found["missing"]


def test_the_table_says_what_the_document_says(fwd, folder):
    fwd("kernels", "build", "--arch", "sm_90a")
    (folder / "gemv.cu").write_text(KERNELS["gemv.cu"].format("another"))
    found, lines = document(fwd("kernels", "list", "--json")), fwd("kernels", "list").stdout.splitlines()
    for row, line in zip(found["kernels"], lines[1:], strict=False):
        assert line.split()[:3] == [row["kernel"], row["arch"], str(row["registers"])]
        assert line.endswith(" stale") == row["stale"]
    assert "gemv.cu is not built for sm_100a: run `fwd kernels build`" in lines
    assert lines[-1].startswith("2 kernels in ")


def test_a_model_that_the_kernels_take(fwd, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for model in ("demo", tmp_path):
        assert len(document(fwd("kernels", "build", model, "--arch", "sm_90a", "--json"))["builds"]) == 2


def test_a_model_that_the_kernels_take_in_the_dtype_it_will_run_in(fwd, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "float32"}))
    assert refusal(fwd("kernels", "build", tmp_path), 2)
    built = document(fwd("kernels", "build", tmp_path, "--dtype", "bfloat16", "--arch", "sm_90a", "--json"))["builds"]
    assert len(built) == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"torch_dtype": "float32"},
            "--device cuda runs bfloat16 models, this one is float32: use --dtype bfloat16",
        ),
        ({"head_dim": 96}, "head_dim"),
        ({"num_attention_heads": 64, "num_key_value_heads": 2}, "64 heads on 2 kv heads"),
        ({"intermediate_size": 12284}, "intermediate_size"),
    ],
    ids=str,
)
def test_a_model_that_the_kernels_do_not_take(fwd, tmp_path, changes, named):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    line = refusal(fwd("kernels", "build", tmp_path), 2)
    assert named in line
    assert "--device cpu" in line
    assert not (tmp_path / "cache").exists()


def test_a_model_that_is_none(fwd, tmp_path):
    assert "has no config.json" in refusal(fwd("kernels", "build", tmp_path), 2)
    assert not (tmp_path / "cache").exists()


def test_an_architecture_that_is_none(fwd):
    assert refusal(fwd("kernels", "build", "--arch", "sm_90a,sm_80"), 2) == (
        "fwd: --arch: 'sm_80' is not one of sm_90a, sm_100a\n"
    )


def test_a_cache_that_cannot_be_written(fwd, tmp_path):
    (tmp_path / "cache").write_text("")
    line = refusal(fwd("kernels", "build", "--arch", "sm_90a"), 6)
    assert f"the kernel cache {tmp_path / 'cache/kernels'} cannot be written" in line
    assert "give another with --cache or CACHE_DIRECTORY" in line
    assert document(fwd("kernels", "list", "--json"))["kernels"] == []


def test_no_compiler(fwd, monkeypatch):
    fwd("kernels", "build", "--arch", "sm_90a")

    def absent():
        raise KernelError("cuda-bindings is not installed, by which kernels are built: run `pip install 'fwd[cuda]'`")

    monkeypatch.setattr(nvrtc, "_nvrtc", absent)
    assert len(document(fwd("kernels", "build", "--arch", "sm_90a", "--json"))["builds"]) == 2
    assert len(document(fwd("kernels", "list", "--json"))["kernels"]) == 2
    result = fwd("kernels", "build", "--json")
    assert json.loads(result.stdout)["error"]["code"] == "no_kernels"
    assert "cuda-bindings is not installed" in refusal(result, 6)


def test_text_that_does_not_compile(fwd, folder):
    (folder / "sample.cu").write_text("nonsense;\n")
    assert "sample.cu does not compile: sample.cu(1): error: " in refusal(
        fwd("kernels", "build", "--arch", "sm_90a"), 6
    )


def test_a_broken_build_is_said_and_built_again(fwd):
    broken, _ = document(fwd("kernels", "build", "--arch", "sm_90a", "--json"))["builds"]
    Path(broken["path"]).write_bytes(Path(broken["path"]).read_bytes()[:100])
    result = fwd("kernels", "build", "--arch", "sm_90a", "--json")
    assert [each["fresh"] for each in document(result)["builds"]] == [True, False]
    (line,) = map(json.loads, result.stderr.splitlines())
    assert (line["event"], line["path"]) == ("kernels_broken", str(Path(broken["path"]).parent))

"""Synthetic checkpoints have the layouts that models are published in, load whole, and keep the size of activations."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import checkpoint, configs, matrices, shapes
from gpu.tensors import tensors

from fwd.models.checkpoint import DTYPES
from fwd.models.config import read_spec
from fwd.models.load import load

BENCH = Path(__file__).resolve().parents[1] / "bench"
TINY = [name for name in configs.MODELS if name not in configs.TRUE]


def header(path):
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_loads_whole_in_the_formats_of_its_config(name, tmp_path):
    written = checkpoint.write(name, tmp_path, "cpu")
    assert (
        sum(math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize for tensor in tensors(shapes.spec(name))) == written
    )
    model = load(tmp_path, device="cpu", dtype="bfloat16")
    said, held = shapes.spec(name), read_spec(tmp_path)
    assert said.weights() == held.weights(), "what the config says is what the files hold"
    assert model.spec.weights() == said.weights()


@pytest.mark.parametrize("name", TINY)
def test_matrices_keep_the_size_of_what_they_multiply(name, tmp_path):
    checkpoint.write(name, tmp_path, "cpu")
    layer = load(tmp_path, device="cpu", dtype="float32").layers[1]
    mixture = getattr(layer, "mixture", None) or layer.mlp
    if hasattr(mixture, "experts"):
        weights = [mixture.experts.gate_up.expert(3), mixture.experts.down.expert(7), mixture.router.weight]
    else:
        weights = [mixture.gate_up, mixture.down]
    for weight in weights:
        values = weight.dequantize()
        assert values.isfinite().all()
        assert values.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.3), (
            weight.format
        )  # a single scale is within a quarter


@pytest.mark.parametrize("name", configs.TRUE)
def test_the_files_have_the_bytes_of_the_plan(name):
    model = shapes.spec(name)
    size = sum(math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize for tensor in tensors(model))
    assert size == pytest.approx(model.weight_bytes(), rel=5e-3)
    assert sum(math.prod(tensor.shape) for tensor in tensors(model)) >= model.parameters() / 2  # two a byte


@pytest.mark.parametrize(
    ("model", "name", "dtype", "shape"),
    [
        ("gpt-oss-120b", "model.layers.35.mlp.experts.gate_up_proj_blocks", "U8", (128, 5760, 90, 16)),
        ("gpt-oss-120b", "model.layers.0.mlp.experts.down_proj_scales", "U8", (128, 2880, 90)),
        ("gpt-oss-20b", "model.layers.23.mlp.router.bias", "BF16", (32,)),
        ("gpt-oss-20b", "model.layers.0.self_attn.q_proj.weight", "BF16", (4096, 2880)),
        ("qwen3-30b-a3b-fp8", "model.layers.47.mlp.experts.127.up_proj.weight_scale_inv", "F32", (6, 16)),
        ("qwen3-30b-a3b", "model.layers.0.mlp.gate.weight", "BF16", (128, 2048)),
        ("glm-4.7-flash", "model.layers.46.self_attn.kv_a_proj_with_mqa.weight", "BF16", (576, 2048)),
        ("glm-4.7-flash", "model.layers.1.mlp.gate.e_score_correction_bias", "F32", (64,)),
        ("llama-8b-fp8", "model.layers.0.mlp.down_proj.weight", "F8_E4M3", (4096, 14336)),
        ("llama-8b-nvfp4", "model.layers.0.mlp.down_proj.weight_scale", "F8_E4M3", (4096, 896)),
        ("llama-8b-nvfp4", "lm_head.weight", "BF16", (128256, 4096)),
    ],
)
def test_tensors_are_those_that_are_published(model, name, dtype, shape):
    (found,) = (tensor for tensor in tensors(shapes.spec(model)) if tensor.name == name)
    assert (found.dtype, found.shape) == (dtype, shape)


def test_a_skewed_router_is_drawn_as_it_is_counted(tmp_path):
    """Of rows that have nothing to do with each other, on the weights that are written."""
    name, rows = "gpt-oss-120b", 8
    router = next(tensor for tensor in tensors(shapes.spec(name), skewed=True) if tensor.name.endswith("router.weight"))
    generator = torch.Generator().manual_seed(1)
    weight = router.draw(math.prod(router.shape), generator).view(router.shape)
    x = torch.randn(300 * rows, router.shape[1], generator=generator)
    chosen = (x @ weight.T).topk(4).indices.view(300, -1)
    distinct = sum(len(set(step)) for step in chosen.tolist()) / 300
    moe = shapes.spec(name).moe
    assert shapes.visited(moe, rows) == pytest.approx(distinct, rel=0.05)
    assert shapes.visited(moe, 1) == moe.top_k
    uniform = 128 * (1 - (1 - 4 / 128) ** rows)
    assert distinct < 0.8 * uniform


def test_a_skewed_step_reads_less_only_where_rows_share_experts():
    model = shapes.spec("gpt-oss-120b")
    for rows in (1, 2, 8):
        plain, skewed = (shapes.step_bytes(model, rows, 4096, skewed=each) for each in (False, True))
        assert plain == model.step_bytes(rows, 4096, "bfloat16")
        assert skewed == pytest.approx(plain, abs=1) if rows == 1 else skewed < plain
    dense = shapes.spec("llama-8b-fp8")
    assert shapes.step_bytes(dense, 8, 4096, skewed=True) == dense.step_bytes(8, 4096, "bfloat16")


@pytest.mark.parametrize("shape", [(48, 96), (3, 48, 96)])
@pytest.mark.parametrize("name", ["llama-8b", "llama-8b-fp8", "llama-8b-nvfp4", "qwen3-30b-a3b-fp8", "gpt-oss-20b"])
def test_a_random_matrix_is_in_its_format(name, shape):
    module = "model.layers.0.mlp.experts" + (".gate_up_proj" if name.startswith("gpt") else ".0.gate_proj")
    stored = shapes.spec(name).quantization.format_of(module)
    found = matrices.matrix(stored, shape, torch.Generator().manual_seed(2))
    assert found.shape == shape
    assert found.format == (stored.format if stored else "bf16")
    assert found.dequantize().std().item() == pytest.approx(96**-0.5, rel=0.3)
    assert torch.equal(found.pack().dequantize(), found.dequantize())


def dry(tmp_path, script, *flags):
    path = tmp_path / "roofline.json"
    path.write_text(json.dumps({"numbers": [{"name": "read bandwidth, cold", "value": 10.0}]}))
    command = [sys.executable, BENCH / script, *flags, "--tiny", "--roofline", path, "--save", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_kernels_of_latents_and_experts_run_dry(tmp_path):
    dry(tmp_path, "kernels.py", "--device", "host", "--model", "glm-4.7-flash")
    (saved,) = (tmp_path / "out").glob("*-kernels-glm-4.7-flash.json")
    found = json.loads(saved.read_text())
    assert not found["failures"], found["failures"]
    timed = {number["name"]: number for number in found["numbers"]}
    for rows in (1, 2):
        for name, (_, size) in shapes.step_work(shapes.spec("tiny-glm-4.7-flash"), rows, 64, "bfloat16").items():
            number = timed[f"tiny-glm-4.7-flash, rows {rows}, context 64: {name}"]
            assert number["bytes"] == size
            assert number["torch_us"] > 0


def test_decode_of_experts_runs_dry(tmp_path):
    done = dry(tmp_path, "decode.py", "gpt-oss-20b", "--device", "cpu", "--skewed")
    (saved,) = (tmp_path / "out").glob("*-decode-tiny-gpt-oss-20b-skewed.json")
    found = json.loads(saved.read_text())
    decoded = [number for number in found["numbers"] if "way" in number]
    assert {(number["context"], number["rows"]) for number in decoded} == {(32, 1), (32, 2), (96, 1), (96, 2)}
    model = shapes.spec("tiny-gpt-oss-20b")
    for number in decoded:
        size = shapes.step_bytes(model, number["rows"], number["context"] + 32, skewed=True)
        assert number["step_bytes"] == size
        label = f"tiny-gpt-oss-20b-skewed, context {number['context']}, rows {number['rows']}"
        assert f"{label}: a step must read {size:,} bytes\n" in done.stdout
    (over,) = (
        number for number in found["numbers"] if number["name"].endswith("context 96: step of 2 rows over step of 1")
    )
    assert over["against"] == "bytes"
    assert 1 < over["ceiling"] < 2

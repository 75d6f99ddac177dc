"""What a spec says that weights take is what a loaded model holds of them, to the byte, in every family and format."""

import checkpoints
import pytest
import quantised
from kinds import KINDS
from reach import held_bytes
from safetensors.torch import load_file

from fwd.kernels.reference import Reference
from fwd.models.config import read_spec, run_spec
from fwd.models.load import load

FORMATS = {
    "fp8-deepseek": "fp8",
    "fp8-tensor": "fp8",
    "fp8-channel": "fp8",
    "nvfp4-modelopt-older": "nvfp4",
    "int4-compressed-zeros": "int4",
    "gptq": "int4",
    "gptq-order": "int4",
    "awq": "int4",
}


def check(folder, dtype):
    """Weights as they come: what oneDNN packs has padding of its own."""
    model, spec = load(folder, dtype=dtype), run_spec(read_spec(folder), dtype)
    assert held_bytes([model.layers, model.embedding, model.last_norm]) == spec.weight_bytes(head=False)
    return spec


@pytest.fixture(autouse=True)
def unpacked(monkeypatch):
    monkeypatch.setattr(Reference, "pack", lambda _, weight: weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_plain_weights(kind, dtype, tmp_path):
    checkpoints.make(kind, tmp_path)
    spec, tensors = check(tmp_path, dtype), load_file(tmp_path / "model.safetensors")
    text = [tensor for name, tensor in tensors.items() if not name.startswith(spec.others)]
    assert spec.parameters() == sum(tensor.numel() for tensor in text)
    assert spec.weights().keys() <= {dtype, "float32"}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("kind", ["qwen3", "llama-bias", "qwen3-moe", "deepseek", "deepseek-yarn", "glm4-moe-lite"])
def test_quantised_weights(kind, layout, tmp_path):
    checkpoints.make(kind, tmp_path / "source")
    quantised.quantise(tmp_path / "source", layout, tmp_path / "quantised", tmp_path / "plain")
    spec = check(tmp_path / "quantised", "bfloat16")
    assert spec.weights().keys() - {"float32"} == {"bfloat16", FORMATS[layout]}
    announced = read_spec(without_weights(tmp_path / "quantised"))
    assert run_spec(announced, "bfloat16").weights() == spec.weights()


def without_weights(folder):
    """A folder before its weights are there."""
    (folder / "model.safetensors").unlink()
    return folder


def test_mxfp4_experts(tmp_path):
    checkpoints.make("gpt-oss", tmp_path / "source")
    quantised.quantise_gpt_oss(tmp_path / "source", tmp_path / "quantised", tmp_path / "plain")
    assert check(tmp_path / "quantised", "bfloat16").weights().keys() == {"bfloat16", "float32", "mxfp4"}

"""Every layout of files on the kernels: each matrix stands in the stream, and takes the bytes, that the spec says."""

import checkpoints
import pytest
from quantised import LAYOUTS, quantise

from fwd.kernels.device import DeviceOps
from fwd.kernels.host import HostLauncher
from fwd.kernels.packing import name_of
from fwd.models import load as loading
from fwd.models.config import read_spec, run_spec
from fwd.models.spec import EMBEDDING
from fwd.models.streamed import fallbacks

ROUNDED = {"fp8-deepseek", "fp8-block", "int4-compressed-zeros", "int4-compressed-order", "gptq-order"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    checkpoints.make("llama-64", folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_matrix_stands_as_the_spec_says(source, tmp_path, monkeypatch, layout):
    monkeypatch.setattr(loading, "select", lambda *_: DeviceOps(HostLauncher()))
    quantise(source, layout, tmp_path / "quantised", tmp_path / "plain")
    spec = run_spec(read_spec(tmp_path / "quantised"), "bfloat16")
    model = loading.load(tmp_path / "quantised", device="host", dtype="bfloat16")
    found = [
        weight
        for layer in model.layers
        for weight in (layer.attention.qkv.weight, layer.attention.output, layer.mlp.gate_up, layer.mlp.down)
    ] + [model.head]
    said = [each for each in spec.streamed if each.stream and each.held.part.module != EMBEDDING]

    assert [(name_of(weight), weight.nbytes) for weight in found] == [(each.stream, each.nbytes) for each in said]
    assert [weight.shape for weight in found] == [(sum(each.held.part.heights), each.held.part.inputs) for each in said]
    assert bool(fallbacks(spec)) == (layout in ROUNDED)

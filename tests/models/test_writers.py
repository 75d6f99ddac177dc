"""Checkpoints of the packages that write them: each matrix is what the package itself reads from its tensors."""

import importlib
import json

import pytest
import quantised
import torch

from fwd.models import formats
from fwd.models.checkpoint import Checkpoint
from fwd.models.quantization import read_from
from fwd.models.schemes import parse_quantization

NAME = "model.layers.0.mlp.up_proj"
SHAPE = (96, 160)
pytestmark = pytest.mark.filterwarnings("ignore")  # of packages that have opinions on others


def package(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: it writes the checkpoints of this test")


def matrix(dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def read(folder, tensors, config):
    """The matrix that a folder with these tensors of a module holds."""
    quantised.write_folder(folder, {NAME + name: each for name, each in tensors.items()}, config)
    with Checkpoint(folder, lambda *_: None) as checkpoint:
        config = json.loads((folder / "config.json").read_text())
        scheme = read_from(parse_quantization(config), checkpoint.entries)
        weight = formats.linear(checkpoint, scheme, [NAME], [SHAPE[0]], SHAPE[1])
    said, held = parse_quantization(config).format_of(NAME), scheme.format_of(NAME)
    assert (said.format, said.zeros) == (held.format, held.zeros)
    return weight.dequantize()


COMPRESSED = {
    "tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "block": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 40]}),
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "int4-channel": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
    "int4-zeros": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
}


def extremes(weight, strategy, args):
    """The least and the largest of what shares a scale."""
    if strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if strategy == "block":
        rows, columns = args.block_structure
        blocks = weight.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.unflatten(1, (-1, args.group_size))
    return groups.amin(-1), groups.amax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors(kind, dtype, tmp_path):
    package("compressed_tensors")
    quantization = importlib.import_module("compressed_tensors.quantization")
    helpers = importlib.import_module("compressed_tensors.quantization.utils.helpers")
    compressor = importlib.import_module("compressed_tensors.compressors.base").BaseCompressor
    form, fields = COMPRESSED[kind]
    args, weight = quantization.QuantizationArgs(**fields), matrix(dtype)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args, format=form)
    low, high = extremes(weight, args.strategy, args)
    state = {"weight": weight}
    if kind == "nvfp4":
        state["weight_global_scale"] = helpers.generate_gparam(weight.amin(), weight.amax())
    scale, zero = helpers.calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
    state["weight_scale"] = scale
    if not args.symmetric:
        state["weight_zero_point"] = zero.to(torch.int8)
    writer = compressor.load_from_registry(form)
    tensors = writer.compress(state, scheme)
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
        "ignore": ["lm_head"],
    }
    found = read(tmp_path, {f".{name}": each for name, each in tensors.items()}, {"quantization_config": config})
    expected = writer.decompress(tensors, scheme)["weight"]
    assert torch.equal(found.to(expected.dtype), expected)
    assert (found - weight.float()).abs().max() < 0.5 * weight.float().abs().max()


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_modelopt(kind, tmp_path):
    package("modelopt")
    qtensor = importlib.import_module("modelopt.torch.quantization.qtensor")
    weight = matrix()
    if kind == "nvfp4":
        made, scale, total = qtensor.NVFP4QTensor.quantize(weight, 16)
        tensors = {".weight": made._quantized_data, ".weight_scale": scale, ".weight_scale_2": total}
        expected = made.dequantize(dtype=torch.float32, scale=scale, double_scale=total, block_sizes={-1: 16})
        config = quantised.modelopt("NVFP4")
    else:
        made, scale = qtensor.MXFP4QTensor.quantize(weight, 32)
        scale = scale.view(SHAPE[0], -1)
        tensors = {".weight_packed": made._quantized_data, ".weight_scale": scale}
        expected = made.dequantize(dtype=torch.float32, scale=scale, block_sizes={-1: 32})
        config = quantised.LAYOUTS["mxfp4-compressed"].config
    assert torch.equal(read(tmp_path, tensors, {"quantization_config": config}), expected)

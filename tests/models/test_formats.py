"""Every public layout of quantised weights is read to the bit, alone, fused and stacked; models compute with it."""

from dataclasses import replace

import checkpoints
import number_writers
import numpy as np
import parity
import pytest
import quantised
import torch
from modules import Files, same
from safetensors.torch import load_file, save_file

from fwd.errors import ModelError
from fwd.kernels import dequantize, qtensor
from fwd.models import formats
from fwd.models.checkpoint import Checkpoint
from fwd.models.load import load
from fwd.models.quantization import read_from
from fwd.models.schemes import parse_quantization

LAYOUTS = sorted(quantised.LAYOUTS)
SHAPES = [(64, 96), (8, 64), (200, 160)]  # outputs in eights, inputs in groups of 32


def read(folder, layout, shapes):
    """The modules of one fused matrix, and what it should be."""
    files = Files(folder, layout, shapes)
    with files.checkpoint:
        return files.linear([outputs for outputs, _ in shapes], shapes[0][1]), torch.cat(files.meant), files


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_matrix_is_read_to_the_bit_and_takes_the_bytes_it_was_said_to(layout, shape, tmp_path):
    weight, meant, files = read(tmp_path, layout, [shape])
    same(weight, meant)
    assert weight.shape == shape
    assert weight.nbytes == files.scheme.format_of(files.names[0]).nbytes(*shape)
    for part in (slice(0, 3), slice(5, shape[0]), slice(7, 8)):
        assert torch.equal(weight.dequantize(part), meant[part])


@pytest.mark.parametrize("heights", [(64, 32, 32), (48, 48), (8, 40, 200)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_matrices_keep_every_bit(layout, heights, tmp_path):
    weight, meant, files = read(tmp_path, layout, [(height, 64) for height in heights])
    same(weight, meant)
    stored = files.scheme.format_of(files.names[0])
    assert weight.nbytes == stored.fused(heights).nbytes(sum(heights), 64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_stacked_with_every_bit(layout, tmp_path):
    files = Files(tmp_path, layout, [(48, 64)] * 6)
    pairs = [files.names[index : index + 2] for index in (0, 2, 4)]
    with files.checkpoint:
        weight = formats.experts(files.checkpoint, files.scheme, pairs, 48, 64)
    assert weight.shape == (3, 96, 64)
    same(weight, torch.stack(files.meant).view(3, 96, 64))
    same(weight.expert(1), torch.cat(files.meant[2:4]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_in_another_order_keep_every_bit(layout, tmp_path):
    weight, meant, _ = read(tmp_path, layout, [(96, 64)])
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    same(weight.rows(order), meant[order])
    halves = torch.arange(96).view(2, 48).flip(0).flatten()  # whole blocks change places
    assert weight.rows(halves).block == ((48, weight.block[1]) if weight.block[0] == 48 else weight.rows(order).block)
    same(weight.rows(halves), meant[halves])


def test_gpt_oss_experts_stand_in_one_tensor_and_in_any_order(tmp_path):
    random = np.random.default_rng(3)
    tensors, meant = number_writers.mxfp4_stack(np.float32(random.standard_normal((5, 48, 64))))
    quantised.write_folder(tmp_path, {"x" + name: each for name, each in tensors.items()}, {})
    order = torch.arange(48).view(-1, 2).t().flatten()
    with Checkpoint(tmp_path, lambda *_: None) as checkpoint:
        scheme = read_from(parse_quantization({}), checkpoint.entries)
        weight = formats.stacked(checkpoint, scheme, "x", (5, 48, 64), order)
    same(weight, torch.from_numpy(meant)[:, order])
    assert weight.nbytes == 5 * scheme.format_of("x").nbytes(48, 64)


PLANTED = {
    "high nibble first": ("nvfp4-modelopt", lambda at: at.setattr(dequantize, "_FLOATS", dequantize._FLOATS.flip(1))),
    "high integer first": ("gptq", lambda at: at.setattr(dequantize, "_INTEGERS", dequantize._INTEGERS.flip(1))),
    "a global scale that multiplies": (
        "nvfp4-compressed",
        lambda at: at.setitem(formats._READERS, "nvfp4_packed", lambda m: replace(_packed(m), divides=False)),
    ),
    "a global scale that divides": (
        "nvfp4-modelopt",
        lambda at: at.setitem(formats._READERS, "nvfp4", lambda m: replace(_modelopt(m), divides=True)),
    ),
    "AWQ in the order of outputs": ("awq", lambda at: at.setattr(formats, "_AWQ_ORDER", list(range(8)))),
    "AWQ's order the other way round": ("awq", lambda at: at.setattr(formats, "_AWQ_ORDER", [0, 2, 4, 6, 1, 3, 5, 7])),
    "zeros of GPTQ as they stand": ("gptq", lambda at: at.setitem(formats._READERS, "gptq", _as_version_2)),
    "zeros of GPTQ 2 plus one": ("gptq-v2", lambda at: at.setitem(formats._READERS, "gptq_v2", _as_version_1)),
    "transposed scales": (
        "fp8-deepseek",
        lambda at: at.setitem(formats._READERS, "fp8_inv", lambda m: _transposed(formats._fp8(m))),
    ),
    "an inverse scale that divides": (
        "fp8-deepseek",
        lambda at: at.setitem(formats._READERS, "fp8_inv", lambda m: _inverse(formats._fp8(m))),
    ),
    "powers of two with another bias": (
        "mxfp4-compressed",
        lambda at: at.setattr(dequantize, "_POWERS", dequantize._POWERS * 2),
    ),
    "zeros that are left out": ("int4-compressed-zeros", lambda at: at.setattr(dequantize, "_zeros", _eights)),
    "groups in order": (
        "gptq-order",
        lambda at: at.setitem(formats._READERS, "gptq", lambda m: replace(_gptq(m), groups=None)),
    ),
    "parts with one scale": (
        "fp8-tensor",
        lambda at: at.setattr(qtensor, "common_rows", lambda _, heights: sum(heights)),
    ),
}
_packed, _modelopt, _gptq = formats._nvfp4_packed, formats._nvfp4, formats._gptq
_zeros = dequantize._zeros


def _eights(weight, start, stop):
    return torch.full_like(_zeros(weight, start, stop), 8)


def _as_version_2(modules):
    return formats._gptq(replace(modules, stored=replace(modules.stored, layout="gptq_v2")))


def _as_version_1(modules):
    return formats._gptq(replace(modules, stored=replace(modules.stored, layout="gptq")))


def _transposed(weight):
    scales = weight.scales
    return replace(weight, scales=scales.transpose(1, 2).contiguous().view_as(scales))


def _inverse(weight):
    return replace(weight, scales=1 / weight.scales)


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug, tmp_path, monkeypatch):
    layout, plant = PLANTED[bug]
    plant(monkeypatch)
    weight, meant, _ = read(tmp_path, layout, [(96, 64), (96, 64)])
    with pytest.raises(AssertionError):
        same(weight, meant)


def logits(folder):
    """Logits after 24 tokens in a chunk and 12 in steps, in float32."""
    ids = parity.tokens(36, seed=1)
    return parity.logits_of(load(folder, dtype="float32"), ids, 24, 4).log_softmax(-1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_quantised_model_is_the_model_of_its_dequantised_weights(layout, tmp_path):
    kind = "qwen3" if "nvfp4" in layout else "llama"
    checkpoints.make(kind, tmp_path / "source")
    quantised.quantise(tmp_path / "source", layout, tmp_path / "quantised", tmp_path / "plain")
    torch.testing.assert_close(logits(tmp_path / "quantised"), logits(tmp_path / "plain"), atol=1e-5, rtol=0)


def test_biases_that_gptq_adds_are_dropped_where_they_are_zero(tmp_path):
    checkpoints.make("llama", tmp_path / "source")
    quantised.quantise(tmp_path / "source", "gptq", tmp_path / "quantised", tmp_path / "plain")
    path = tmp_path / "quantised/model.safetensors"
    tensors, expected = load_file(path), logits(tmp_path / "quantised")
    bias = "model.layers.1.mlp.down_proj.bias"
    save_file(tensors | {bias: torch.zeros(64).half()}, path)
    assert torch.equal(logits(tmp_path / "quantised"), expected)
    save_file(tensors | {bias: torch.ones(64).half()}, path)
    with pytest.raises(ModelError, match=f"{bias} is not zero"):
        load(tmp_path / "quantised", dtype="float32")


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("qwen3-moe", "fp8-deepseek"),
        ("qwen3-moe", "nvfp4-modelopt"),
        ("qwen3-moe", "awq"),
        ("deepseek", "fp8-deepseek"),
        ("deepseek", "int4-compressed-channel"),
    ],
)
def test_quantised_experts_and_latents_are_those_of_their_dequantised_weights(kind, layout, tmp_path):
    checkpoints.make(kind, tmp_path / "source")
    quantised.quantise(tmp_path / "source", layout, tmp_path / "quantised", tmp_path / "plain")
    torch.testing.assert_close(logits(tmp_path / "quantised"), logits(tmp_path / "plain"), atol=1e-5, rtol=0)


def test_gpt_oss_in_mxfp4_is_the_model_of_its_dequantised_weights(tmp_path):
    checkpoints.make("gpt-oss", tmp_path / "source")
    quantised.quantise_gpt_oss(tmp_path / "source", tmp_path / "quantised", tmp_path / "plain")
    torch.testing.assert_close(logits(tmp_path / "quantised"), logits(tmp_path / "plain"), atol=1e-5, rtol=0)

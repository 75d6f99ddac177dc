"""Quantised modules that cannot be what they say are refused, by file, tensor and reason."""

import json

import number_writers
import pytest
import quantised
import torch
from modules import Files, matrices, same
from safetensors.torch import load_file, save_file

from fwd.errors import ModelError
from fwd.models import formats
from fwd.models.checkpoint import Checkpoint
from fwd.models.quantization import read_from
from fwd.models.schemes import parse_quantization


def damaged(folder, layout, suffix, change, shape=(64, 64)):
    """Read a module of which one tensor was changed."""
    name = "model.layers.0.m0_proj"
    own, _ = quantised.LAYOUTS[layout].write(matrices([shape])[0])
    own[suffix] = change(own[suffix])
    tensors = {name + each: tensor for each, tensor in own.items() if tensor is not None}
    quantised.write_folder(folder, tensors, {"quantization_config": quantised.LAYOUTS[layout].config})
    with Checkpoint(folder, lambda *_: None) as checkpoint:
        scheme = read_from(parse_quantization(json.loads((folder / "config.json").read_text())), checkpoint.entries)
        return formats.linear(checkpoint, scheme, [name], [shape[0]], shape[1])


def with_first(value):
    def change(tensor):
        flat = tensor.clone().reshape(-1).contiguous()
        (flat.view(torch.uint8) if isinstance(value, bytes) else flat)[0] = (
            value[0] if isinstance(value, bytes) else value
        )
        return flat.view(tensor.shape)

    return change


NAN = float("nan")


@pytest.mark.parametrize(
    ("layout", "suffix", "change", "reason"),
    [
        ("fp8-deepseek", ".weight_scale_inv", with_first(NAN), "not finite"),
        ("fp8-deepseek", ".weight_scale_inv", with_first(float("inf")), "not finite"),
        ("fp8-deepseek", ".weight_scale_inv", with_first(2e38), "not finite"),
        ("fp8-channel", ".weight_scale", with_first(-1.0), "negative"),
        ("fp8-channel", ".weight_scale", lambda _: None, "no layout"),
        ("fp8-channel", ".weight_scale", lambda t: t.double(), "no layout"),
        ("fp8-channel", ".weight_scale", lambda t: t[:7], "no layout"),
        ("fp8-channel", ".weight", lambda t: t[:60], "no layout"),
        ("fp8-block", ".weight_scale", lambda t: t[:, :0], "no layout"),
        ("fp8-tensor", ".weight", lambda t: t[:60], "expected"),
        ("mxfp4-compressed", ".weight_scale", with_first(b"\xff"), "NaN"),
        ("mxfp4-compressed", ".weight_scale", with_first(b"\xfd"), "infinite"),
        ("mxfp4-compressed", ".weight_scale", lambda t: t[:, :1], "expected"),
        ("mxfp4-compressed", ".weight_packed", lambda t: t[:, :30], "expected"),
        ("nvfp4-modelopt", ".weight_scale", with_first(b"\x7f"), "not finite"),
        ("nvfp4-modelopt", ".weight_scale", with_first(b"\xff"), "not finite"),
        ("nvfp4-modelopt", ".weight_scale", with_first(b"\x88"), "negative"),
        ("nvfp4-modelopt", ".weight_scale_2", lambda _: torch.tensor(0.0), "no scale"),
        ("nvfp4-modelopt", ".weight_scale_2", lambda _: torch.tensor(NAN), "no scale"),
        ("nvfp4-modelopt", ".weight_scale_2", lambda _: torch.tensor(-1.0), "no scale"),
        ("nvfp4-compressed", ".weight_global_scale", lambda _: torch.tensor([0.0]), "no scale"),
        ("nvfp4-compressed", ".weight_global_scale", lambda _: torch.tensor([1e-37]), "no scale"),
        ("nvfp4-compressed", ".weight_global_scale", lambda _: torch.tensor([1.0, 1.0]), "expected"),
        ("int4-compressed", ".weight_shape", lambda _: torch.tensor([64, 60]), "is not [64, 64]"),
        ("int4-compressed", ".weight_scale", with_first(NAN), "not finite"),
        ("int4-compressed-order", ".weight_g_idx", with_first(2), "group"),
        ("int4-compressed-order", ".weight_g_idx", with_first(-1), "group"),
        ("gptq", ".g_idx", with_first(1), "desc_act"),
        ("gptq-order", ".g_idx", with_first(99), "group"),
        ("gptq", ".qzeros", lambda t: t[:1], "expected"),
        ("awq", ".scales", with_first(float("inf")), "not finite"),
        ("awq", ".qweight", lambda t: t[:60], "expected"),
    ],
)
def test_what_cannot_be_is_refused_by_file_and_tensor(layout, suffix, change, reason, tmp_path):
    with pytest.raises(ModelError) as caught:
        damaged(tmp_path, layout, suffix, change)
    message = str(caught.value)
    assert reason in message
    assert "m0_proj" in message
    assert "model.safetensors" in message
    assert "\n" not in message


def test_parts_of_different_formats_are_refused_by_name(tmp_path):
    (a, _), (b, _) = (quantised.LAYOUTS[each].write(matrices([(64, 64)])[0]) for each in ("awq", "fp8-channel"))
    tensors = {"a" + name: each for name, each in a.items()} | {"b" + name: each for name, each in b.items()}
    quantised.write_folder(tmp_path, tensors | {"c.weight": torch.zeros(64, 64)}, {})
    with Checkpoint(tmp_path, lambda *_: None) as checkpoint:
        scheme = read_from(parse_quantization({}), checkpoint.entries)
        for first, second in (("a", "b"), ("b", "c"), ("c", "a")):
            with pytest.raises(ModelError, match=f"{tmp_path}: {first} is .*, {second} .*one format"):
                formats.linear(checkpoint, scheme, [first, second], [64, 64], 64)
        assert formats.linear(checkpoint, scheme, ["c"], [64], 64) is None


@pytest.mark.parametrize("layout", ["nvfp4-modelopt", "mxfp4-compressed", "int4-compressed"])
def test_four_bits_of_an_odd_number_of_inputs_are_refused(layout, tmp_path):
    files = Files(tmp_path, layout, [(64, 64)])
    with files.checkpoint, pytest.raises(ModelError, match=f"{tmp_path}: {files.names[0]} has 63 inputs"):
        files.linear([64], 63)


EXPERTS = {
    "is fp8": (lambda: quantised.LAYOUTS["fp8-channel"].write(matrices([(64, 64)])[0]), 64),
    "has 48 inputs": (lambda: number_writers.mxfp4_stack(matrices([(64, 64)] * 3)), 48),
}


@pytest.mark.parametrize("reason", EXPERTS)
def test_experts_in_one_tensor_are_whole_blocks_of_mxfp4(reason, tmp_path):
    write, inputs = EXPERTS[reason]
    tensors, _ = write()
    quantised.write_folder(tmp_path, {"x" + name: each for name, each in tensors.items()}, {})
    with Checkpoint(tmp_path, lambda *_: None) as checkpoint:
        scheme = read_from(parse_quantization({}), checkpoint.entries)
        with pytest.raises(ModelError, match=f"{tmp_path}: x {reason}"):
            formats.stacked(checkpoint, scheme, "x", (3, 64, inputs), torch.arange(64))


ORDERED = [("gptq-order", ".g_idx"), ("int4-compressed-order", ".weight_g_idx")]


def with_another_order(folder, layout, suffix, heights):
    """Modules of which the last but one orders its inputs in its own way."""
    files, path = Files(folder, layout, [(height, 64) for height in heights]), folder / "model.safetensors"
    name, tensors = files.names[-2] + suffix, load_file(path)
    save_file(tensors | {name: tensors[name].roll(1)}, path)
    return files, Checkpoint(folder, lambda *_: None)


@pytest.mark.parametrize("heights", [(32, 64, 64), (64, 64, 64)], ids=str)
@pytest.mark.parametrize(("layout", "suffix"), ORDERED)
def test_matrices_of_different_orders_of_inputs_are_not_fused(layout, suffix, heights, tmp_path):
    files, checkpoint = with_another_order(tmp_path, layout, suffix, heights)
    with checkpoint, pytest.raises(ModelError, match=r"m1_proj.*g_idx is another order"):
        formats.linear(checkpoint, files.scheme, files.names, heights, 64)


@pytest.mark.parametrize(("layout", "suffix"), ORDERED)
def test_experts_have_one_order_each(layout, suffix, tmp_path):
    files, checkpoint = with_another_order(tmp_path, layout, suffix, [64] * 5)
    pairs = [files.names[:2], files.names[2:4]]
    with checkpoint, pytest.raises(ModelError, match=r"m3_proj.*g_idx is another order"):
        formats.experts(checkpoint, files.scheme, pairs, 64, 64)
    with Checkpoint(tmp_path, lambda *_: None) as again:
        same(formats.experts(again, files.scheme, pairs[:1], 64, 64).expert(0), torch.cat(files.meant[:2]))


@pytest.mark.parametrize("layout", ["nvfp4-modelopt", "nvfp4-compressed"])
def test_the_module_whose_factor_is_none_is_named(layout, tmp_path):
    files, path = Files(tmp_path, layout, [(64, 64)] * 2), tmp_path / "model.safetensors"
    name = files.names[1] + (".weight_scale_2" if layout == "nvfp4-modelopt" else ".weight_global_scale")
    tensors = load_file(path)
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, path)
    with Checkpoint(tmp_path, lambda *_: None) as checkpoint, pytest.raises(ModelError, match=f"{name} is no scale"):
        formats.linear(checkpoint, files.scheme, files.names, [64, 64], 64)

"""gpt-oss: planted bugs are found, its experts stand as the reference has them, in MXFP4 too."""

import json
import shutil
from dataclasses import replace

import checkpoints
import parity
import pytest
import torch
from gpu.configs import TRUE
from parity import tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from fwd.models import gpt_oss
from fwd.models import load as loading
from fwd.models.blocks import Attention
from fwd.models.load import load


def planted_rows_as_they_stand(monkeypatch):
    monkeypatch.setattr(gpt_oss, "gate_then_up", torch.arange)


def planted_up_then_gate(monkeypatch):
    right = gpt_oss.gate_then_up
    monkeypatch.setattr(gpt_oss, "gate_then_up", lambda rows: right(rows).roll(rows // 2))


def planted_no_sinks(monkeypatch):
    right = Attention.take
    monkeypatch.setattr(Attention, "take", lambda weights, prefix: replace(right(weights, prefix), sinks=None))


def planted_ramp_with_round_ends(monkeypatch):
    change_spec(monkeypatch, lambda spec: replace(spec, rope=replace(spec.rope, truncate=True)))


def planted_window_of_one_less(monkeypatch):
    change_spec(monkeypatch, lambda spec: replace(spec, windows=tuple(max(0, window - 1) for window in spec.windows)))


def change_spec(monkeypatch, change):
    right = loading.read_spec
    monkeypatch.setattr(loading, "read_spec", lambda folder: change(right(folder)))


@pytest.mark.parametrize(
    "bug",
    [
        planted_rows_as_they_stand,
        planted_up_then_gate,
        planted_no_sinks,
        planted_ramp_with_round_ends,
        planted_window_of_one_less,
    ],
)
def test_planted_bugs_are_found(bug, tmp_path, monkeypatch):
    folder = parity.pair("gpt-oss", tmp_path)
    bug(monkeypatch)
    with pytest.raises(AssertionError, match="not close"):
        parity.check_logprobs(*folder)


def test_experts_stand_with_their_gates_above_their_ups(tmp_path):
    checkpoints.make("gpt-oss-odd", tmp_path)
    stored, experts = load_file(tmp_path / "model.safetensors"), load(tmp_path).layers[1].mixture.experts
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    gate_up, gate_up_bias, down, down_bias = (stored[f"model.layers.1.mlp.experts.{name}"] for name in names)
    gates, ups = gate_up[..., ::2], gate_up[..., 1::2]  # [experts, hidden, intermediate]
    assert torch.equal(experts.gate_up.dequantize(), torch.cat((gates, ups), dim=2).transpose(1, 2))
    assert torch.equal(experts.gate_up_bias, torch.cat((gate_up_bias[:, ::2], gate_up_bias[:, 1::2]), dim=1))
    assert torch.equal(experts.down.dequantize(), down.transpose(1, 2))
    assert torch.equal(experts.down_bias, down_bias)


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def in_mxfp4(plain, folder):
    """Write a checkpoint's experts anew, as random MXFP4 in `folder` and as the same numbers in `plain`."""
    shutil.copytree(plain, folder)
    tensors, generator = load_file(plain / "model.safetensors"), torch.Generator().manual_seed(11)
    packed = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        many, inputs, outputs = packed.pop(name).shape
        codes = torch.randint(0, 16, (many, outputs, inputs // 32, 32), generator=generator, dtype=torch.uint8)
        scales = torch.randint(119, 124, (many, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        packed[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        packed[f"{name}_scales"] = scales
        numbers = torch.tensor(E2M1)[codes.int()] * 2.0 ** (scales.float() - 127).unsqueeze(3)
        tensors[name] = numbers.view(many, outputs, inputs).transpose(1, 2).contiguous()
    save_file(tensors, plain / "model.safetensors")
    save_file(packed, folder / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": TRUE["gpt-oss-20b"]["quantization_config"]})
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_in_mxfp4_give_the_bits_of_the_numbers_they_stand_for(dtype, tmp_path):
    plain, folder = tmp_path / "plain", tmp_path / "mxfp4"
    checkpoints.make("gpt-oss", plain, seed=9)
    in_mxfp4(plain, folder)
    wide, narrow = load(plain, dtype=dtype), load(folder, dtype=dtype)
    experts = narrow.layers[0].mixture.experts
    assert (experts.gate_up.format, experts.down.format) == ("mxfp4", "mxfp4")
    assert experts.gate_up.nbytes * 32 == experts.gate_up.dequantize().numel() * 17
    for count in (1, 16):
        found, expected = (parity.logits_of(model, tokens(90, seed=10), 64, count) for model in (narrow, wide))
        assert torch.equal(found, expected), count
    parity.check_steps_of_any_width(narrow)
    parity.check_warm_prefill(narrow)


def test_experts_in_mxfp4_agree_with_transformers(tmp_path):
    """Its own reader makes numbers of them, which here are exact in the bfloat16 that it makes."""
    checkpoints.make("gpt-oss", tmp_path / "plain", seed=9)
    in_mxfp4(tmp_path / "plain", tmp_path / "mxfp4")
    quantization = Mxfp4Config(dequantize=True)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "mxfp4", dtype=torch.float32, quantization_config=quantization
    )
    parity.check_logprobs(tmp_path / "mxfp4", reference.eval())

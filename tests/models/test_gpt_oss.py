"""gpt-oss against `transformers` on random checkpoints, its own bits, and its experts in MXFP4."""

from dataclasses import replace

import checkpoints
import parity
import pytest
import torch
from safetensors.torch import load_file

from fwd.models import gpt_oss
from fwd.models import load as loading
from fwd.models.blocks import Attention
from fwd.models.layout import KV_ITEMSIZE
from fwd.models.load import load

ODD = "gpt-oss-odd"


@pytest.fixture(scope="module", params=sorted(checkpoints.GPT_OSS))
def folder(request, tmp_path_factory):
    return parity.pair(request.param, tmp_path_factory.mktemp(request.param))


def test_float32_logprobs_agree_with_transformers(folder):
    parity.check_logprobs(*folder)


def test_greedy_tokens_are_those_of_transformers(folder):
    parity.check_greedy(*folder)


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", sorted(checkpoints.GPT_OSS))
def test_steps_of_any_width_give_the_same_bits(kind, dtype, tmp_path):
    checkpoints.make(kind, tmp_path, seed=4)
    parity.check_steps_of_any_width(load(tmp_path, dtype=dtype))


@pytest.mark.parametrize("kv", KV_ITEMSIZE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prefill_that_begins_behind_a_cached_prefix_gives_the_same_bits(dtype, kv, tmp_path):
    checkpoints.make(ODD, tmp_path, seed=8)
    parity.check_warm_prefill(load(tmp_path, dtype=dtype), kv)


@pytest.mark.parametrize(("dtype", "kv", "bound"), [("bfloat16", "bfloat16", 3e-3), ("bfloat16", "fp8", 2e-2)])
def test_narrow_dtypes_stay_near_float32(folder, dtype, kv, bound):
    parity.check_mostly_near_float32(folder[0], dtype, kv, bound)


def test_experts_stand_with_their_gates_above_their_ups(tmp_path):
    checkpoints.make(ODD, tmp_path)
    stored, experts = load_file(tmp_path / "model.safetensors"), load(tmp_path).layers[1].mixture.experts
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    gate_up, gate_up_bias, down, down_bias = (stored[f"model.layers.1.mlp.experts.{name}"] for name in names)
    gates, ups = gate_up[..., ::2], gate_up[..., 1::2]  # [experts, hidden, intermediate]
    assert torch.equal(experts.gate_up.dequantize(), torch.cat((gates, ups), dim=2).transpose(1, 2))
    assert torch.equal(experts.gate_up_bias, torch.cat((gate_up_bias[:, ::2], gate_up_bias[:, 1::2]), dim=1))
    assert torch.equal(experts.down.dequantize(), down.transpose(1, 2))
    assert torch.equal(experts.down_bias, down_bias)


def test_parameters_are_those_of_the_checkpoint(folder):
    spec = load(folder[0]).spec
    assert spec.parameters() == sum(parameter.numel() for parameter in folder[1].parameters())

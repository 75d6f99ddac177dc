"""Qwen3-MoE against `transformers` on random checkpoints, and its own bits."""

from dataclasses import replace

import checkpoints
import parity
import pytest
import torch
from safetensors.torch import load_file

from fwd.models import moe
from fwd.models.blocks import MLP, Mixture
from fwd.models.layout import KV_ITEMSIZE
from fwd.models.load import load

ODD = "qwen3-moe-odd"


@pytest.fixture(scope="module", params=sorted(checkpoints.MOE))
def folder(request, tmp_path_factory):
    return parity.pair(request.param, tmp_path_factory.mktemp(request.param))


def test_float32_logprobs_agree_with_transformers(folder):
    parity.check_logprobs(*folder)


def test_greedy_tokens_are_those_of_transformers(folder):
    parity.check_greedy(*folder)


def planted(monkeypatch, **router):
    right = moe.mixture

    def wrong(weights, prefix):
        found = right(weights, prefix)
        return Mixture(replace(found.router, **router), found.experts)

    monkeypatch.setattr(moe, "mixture", wrong)


@pytest.mark.parametrize(
    ("kind", "router"),
    [("qwen3-moe", {"normalize": False}), (ODD, {"normalize": True}), ("qwen3-moe-all", {"scoring": "topk_softmax"})],
)
def test_another_router_is_seen(kind, router, tmp_path, monkeypatch):
    folder = parity.pair(kind, tmp_path)
    planted(monkeypatch, **router)
    if kind == "qwen3-moe-all":  # where all experts are visited both softmaxes are one
        parity.check_logprobs(*folder)
    else:
        with pytest.raises(AssertionError, match="not close"):
            parity.check_logprobs(*folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", sorted(checkpoints.MOE))
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


def test_layers_have_experts_where_the_config_says(tmp_path):
    checkpoints.make("qwen3-moe-mixed", tmp_path)
    kinds = [type(layer.mlp) for layer in load(tmp_path).layers]
    assert kinds == [MLP, Mixture, MLP, MLP, MLP, Mixture]


def test_experts_stand_in_their_order_gate_above_up(tmp_path):
    checkpoints.make(ODD, tmp_path)
    stored, layer = load_file(tmp_path / "model.safetensors"), load(tmp_path).layers[1]
    for expert in range(3):
        names = [f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight" for name in ("gate", "up", "down")]
        gate, up, down = (stored[name] for name in names)
        experts = layer.mlp.experts
        assert torch.equal(experts.gate_up.expert(expert).dequantize(), torch.cat((gate, up)))
        assert torch.equal(experts.down.expert(expert).dequantize(), down)


def test_parameters_are_those_of_the_checkpoint(folder):
    spec = load(folder[0]).spec
    assert spec.parameters() == sum(parameter.numel() for parameter in folder[1].parameters())

"""Qwen3-MoE: another router is seen, layers and experts stand where the checkpoint has them."""

from dataclasses import replace

import checkpoints
import parity
import pytest
import torch
from safetensors.torch import load_file

from fwd.models import moe
from fwd.models.blocks import MLP, Mixture
from fwd.models.load import load

ODD = "qwen3-moe-odd"


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

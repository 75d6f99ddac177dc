"""A layer with experts has what the next layer begins with fetched while they are chosen, the last one nothing."""

import checkpoints
import pytest

from fwd.models.load import load


@pytest.mark.parametrize("kind", ["gpt-oss", "qwen3-moe-mixed", "deepseek", "glm4-moe-lite", "llama"])
def test_routers_know_what_the_next_layer_begins_with(kind, tmp_path):
    checkpoints.make(kind, tmp_path)
    layers = load(tmp_path, device="cpu", dtype="float32").layers
    begins = [layer.latents.down if hasattr(layer, "latents") else layer.attention.qkv.weight for layer in layers]
    mixtures = [getattr(layer, "mixture", None) or layer.mlp for layer in layers]
    routed = [(index, mixture.router.ahead) for index, mixture in enumerate(mixtures) if hasattr(mixture, "router")]
    assert bool(routed) == (kind != "llama")
    for index, ahead in routed:
        assert ahead is (None if index == len(layers) - 1 else begins[index + 1])

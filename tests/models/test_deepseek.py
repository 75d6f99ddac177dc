"""DeepSeek-V3, GLM-4.7-Flash and Kimi K2.5: planted bugs are seen, the cache, layers that predict further tokens."""

import itertools
import json
from dataclasses import replace

import checkpoints
import parity
import pytest
import torch
from kinds import DEEPSEEK
from parity import PAGE, logits_of, tokens
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from fwd.errors import ModelError
from fwd.kernels import experts
from fwd.models import deepseek
from fwd.models.blocks import Mixture
from fwd.models.layout import KV_ITEMSIZE, groups
from fwd.models.load import load


def planted_pairing(monkeypatch):
    monkeypatch.setattr(deepseek, "paired", lambda matrix, heads, mla: matrix)


def planted_rotated_part_first(monkeypatch):
    right = deepseek.paired

    def wrong(matrix, heads, mla):
        order = torch.arange(matrix.shape[0]).view(heads, -1)
        return right(matrix, heads, mla).rows(order.roll(mla.rope, 1).flatten() if heads > 1 else order.flatten())

    monkeypatch.setattr(deepseek, "paired", wrong)


def planted_scale_without_m(monkeypatch):
    right = deepseek._mla
    monkeypatch.setattr(deepseek, "_mla", lambda weights: replace(right(weights), scale=weights.spec.head_dim**-0.5))


def planted_keys_for_values(monkeypatch):
    right = deepseek.ups
    monkeypatch.setattr(deepseek, "ups", lambda weights, prefix: right(weights, prefix)[::-1])


def planted_correction_in_weights(monkeypatch):
    def wrong(logits, router):
        chosen = experts._in_best_groups(logits.sigmoid() + router.correction, router)
        return experts._best(chosen, router.top_k)

    monkeypatch.setattr(experts, "_choose", wrong)


def planted_all_groups(monkeypatch):
    monkeypatch.setattr(experts, "_in_best_groups", lambda chosen, router: chosen)


def planted_shared_forgotten(monkeypatch):
    right = deepseek.mixture

    def wrong(weights, prefix):
        found = right(weights, prefix)
        return Mixture(found.router, replace(found.experts, shared_gate_up=None, shared_down=None))

    monkeypatch.setattr(deepseek, "mixture", wrong)


@pytest.mark.parametrize(
    "plant",
    [
        planted_pairing,
        planted_rotated_part_first,
        planted_scale_without_m,
        planted_keys_for_values,
        planted_correction_in_weights,
        planted_all_groups,
        planted_shared_forgotten,
    ],
    ids=lambda plant: plant.__name__,
)
def test_planted_bugs_are_seen(plant, tmp_path, monkeypatch):
    folder = parity.pair("deepseek-yarn", tmp_path)
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        parity.check_logprobs(*folder)


@pytest.mark.parametrize("kv", KV_ITEMSIZE)
@pytest.mark.parametrize("kind", DEEPSEEK)
def test_the_cache_is_as_large_as_planned(kind, kv, pair):
    model = load(pair(kind)[0])
    (plan,) = groups(model.spec.cache)
    cache = model.new_cache([7], PAGE, kv)
    assert [(layer.group, layer.window) for layer in cache.layers] == [(0, 0)] * model.spec.layers
    tensors = [x for each in cache.layers for x in (each.latents, each.keys, each.scales) if x is not None]
    assert sum(x.nbytes for x in tensors) == 7 * plan.unit_bytes(PAGE, kv)
    assert {x.untyped_storage().nbytes() for x in tensors} == {7 * plan.unit_bytes(PAGE, kv)}
    places = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places)), "layers overlap"


def add_mtp(folder, layers, *, announced):
    """Layers that predict further tokens behind the others, as DeepSeek-V3 stores them: each a copy of the last one."""
    config, path = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    text, tensors = config.get("text_config", config), load_file(path)
    text["num_nextn_predict_layers"] = announced
    (folder / "config.json").write_text(json.dumps(config))
    count, hidden = text["num_hidden_layers"], text["hidden_size"]
    (base,) = {name.split("layers.")[0] for name in tensors if ".self_attn.o_proj." in name}
    added = {}
    for index in range(count, count + layers):
        prefix = f"{base}layers.{index}."
        added |= {
            name.replace(f"{base}layers.{count - 1}.", prefix): tensor.clone()
            for name, tensor in tensors.items()
            if name.startswith(f"{base}layers.{count - 1}.")
        }
        added |= {f"{prefix}{name}.weight": torch.rand(hidden) for name in ("enorm", "hnorm", "shared_head.norm")}
        added[f"{prefix}eh_proj.weight"] = torch.rand(hidden, 2 * hidden)
        for name in ("embed_tokens", "shared_head.head"):
            added[f"{prefix}{name}.weight"] = tensors[f"{base}embed_tokens.weight"].clone()
    save_file(tensors | added, path)
    return sum(tensor.nbytes for tensor in added.values())


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["deepseek", "glm4-moe-lite", "kimi-k25"])
def test_layers_that_predict_further_tokens_are_kept_and_change_nothing(kind, layers, tmp_path):
    checkpoints.make(kind, tmp_path, seed=3)
    plain = load(tmp_path)
    size = add_mtp(tmp_path, layers, announced=layers)
    model = load(tmp_path)
    assert model.spec.layers == plain.spec.layers
    assert model.spec.weight_bytes() == plain.spec.weight_bytes()
    assert plain.kept == {}
    assert list(model.kept) == [f"{model.spec.prefix}model.layers.{model.spec.layers + i}." for i in range(layers)]
    assert sum(model.kept.values()) == size
    assert torch.equal(*(logits_of(each, tokens(40, seed=1), 32, 8) for each in (model, plain)))


def test_layers_that_are_announced_and_absent_are_no_error(tmp_path):
    checkpoints.make("deepseek", tmp_path)
    add_mtp(tmp_path, 0, announced=1)
    with capture_logs() as logs:
        assert load(tmp_path).kept == {}
    assert {"event": "mtp_layers_absent", "announced": 1, "found": 0, "log_level": "info"} in logs


def test_layers_that_no_config_announces_are_refused_by_name(tmp_path):
    checkpoints.make("deepseek", tmp_path)
    add_mtp(tmp_path, 1, announced=0)
    with pytest.raises(ModelError, match=r"tensor model\.layers\.3\.eh_proj\.weight.* has no place"):
        load(tmp_path)

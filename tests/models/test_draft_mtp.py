"""Layers that predict further tokens against the decoder layers of `transformers`, in the target's own checkpoint."""

import dataclasses
import json

import checkpoints
import pytest
import quantised
import torch
from drafts import Random, edit, hidden_of, loaded, logits_of, new_cache, passed, read
from parity import tokens
from plain_drafts import rms
from reach import held_bytes
from safetensors.torch import load_file, save_file

from fwd.errors import ModelError
from fwd.kernels.device import DeviceOps
from fwd.kernels.host import HostLauncher
from fwd.kernels.reference import Reference
from fwd.models import load as loading
from fwd.models.draft import mtp as module
from fwd.models.draft.load import load_draft
from fwd.models.load import load

KNOWN, STEPS = 90, 4
KINDS = ["deepseek", "deepseek-yarn", "deepseek-odd", "glm4-moe-lite"]


def write(kind, folder, monkeypatch, *, dense=False, further=0):
    """A checkpoint whose last layer is made one that predicts further tokens; returns the model it is the last of."""
    right = checkpoints.KINDS[kind]

    def longer():
        config = right()
        config.num_hidden_layers += 1
        if kinds := getattr(config, "mlp_layer_types", None):
            config.mlp_layer_types = [*kinds, "dense" if dense else "sparse"]
        elif dense:
            config.first_k_dense_replace = config.num_hidden_layers
        return config

    monkeypatch.setitem(checkpoints.KINDS, kind, longer)
    checkpoints.make(kind, folder, seed=3)
    model = checkpoints.build(kind, seed=3)
    config = json.loads((folder / "config.json").read_text())
    layer = config["num_hidden_layers"] - 1
    config |= {"num_hidden_layers": layer, "num_nextn_predict_layers": 1 + further}
    if config.get("mlp_layer_types"):
        config["mlp_layer_types"] = config["mlp_layer_types"][:layer]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    own = mtp_tensors(tensors, f"model.layers.{layer}.", config["hidden_size"])
    for index in range(layer + 1, layer + 1 + further):
        prefix = f"model.layers.{layer}."
        own |= {
            name.replace(prefix, f"model.layers.{index}."): tensor.clone()
            for name, tensor in (tensors | own).items()
            if name.startswith(prefix)
        }
    save_file(tensors | own, folder / "model.safetensors")
    return model, own


def mtp_tensors(tensors, prefix, width):
    random = Random(5)
    own = {f"{name}.weight": random.norm(width) for name in ("enorm", "hnorm", "shared_head.norm")}
    own["eh_proj.weight"] = random.matrix(width, 2 * width)
    table = tensors["model.embed_tokens.weight"]
    own |= {
        "embed_tokens.weight": table.clone(),
        "shared_head.head.weight": tensors.get("lm_head.weight", table).clone(),
    }
    return {prefix + name: tensor for name, tensor in own.items()}


class Plain:
    """The layer by `transformers`' own class, between what the layout puts around it."""

    def __init__(self, model, own):
        self._model, self._own, self._eps = model, own, model.config.rms_norm_eps
        self._prefix = f"model.layers.{model.config.num_hidden_layers - 1}."

    def fused(self, features):
        """The target's rows, by its last norm."""
        return self._model.model.norm(features)

    def hidden(self, ids, beside):
        inner, positions = self._model.model, torch.arange(len(ids))[None]
        embedded = inner.embed_tokens(ids)
        embedded[0] = 0
        both = torch.cat((self._norm("enorm", embedded), self._norm("hnorm", beside)), dim=1)
        x = (both @ self._own[f"{self._prefix}eh_proj.weight"].T)[None]
        mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)[None, None]
        found = inner.layers[-1](
            x,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=inner.rotary_emb(x, positions),
        )
        return (found[0] if isinstance(found, tuple) else found)[0]

    def logits(self, hidden):
        return self._model.lm_head(self._norm("shared_head.norm", hidden))

    def _norm(self, name, x):
        return rms(x, self._own[f"{self._prefix}{name}.weight"], self._eps)


@torch.inference_mode()
def check(model, own, folder, prompt=70, width=7):
    _, draft = loaded("mtp", folder)
    features = 3 * Random(7).matrix(KNOWN, draft.spec.features) + 0.5
    plain, ids, cache = Plain(model, own), tokens(KNOWN + STEPS, seed=4), new_cache(draft)
    beside = plain.fused(features)
    found, hidden = hidden_of(draft, ids[:KNOWN], features, prompt, width, cache), plain.hidden(ids[:KNOWN], beside)
    torch.testing.assert_close(logits_of(draft, found), plain.logits(hidden), atol=1e-4, rtol=1e-4)
    last = found[-1:]
    for step in range(STEPS):
        beside = torch.cat((beside, hidden[-1:]))
        hidden = plain.hidden(ids[: KNOWN + step + 1], beside)
        last = passed(draft, ids[KNOWN + step : KNOWN + step + 1], last.clone(), KNOWN + step, cache)
        torch.testing.assert_close(logits_of(draft, last), plain.logits(hidden)[-1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_that_of_transformers(kind, tmp_path, monkeypatch):
    check(*write(kind, tmp_path, monkeypatch), tmp_path)


def test_a_layer_may_be_dense(tmp_path, monkeypatch):
    check(*write("deepseek", tmp_path, monkeypatch, dense=True), tmp_path)


@pytest.mark.parametrize(("prompt", "width"), [(0, 1), (0, 16), (64, 16)])
def test_absorbed_in_any_parts(prompt, width, tmp_path, monkeypatch):
    check(*write("glm4-moe-lite", tmp_path, monkeypatch), tmp_path, prompt, width)


def planted_no_position_zero(monkeypatch):
    right = module.Mtp._both

    def wrong(self, ids, hidden, rows):
        return right(self, ids, hidden, dataclasses.replace(rows, positions=rows.positions + 1))

    monkeypatch.setattr(module.Mtp, "_both", wrong)


def planted_features_before_the_last_norm(monkeypatch):
    monkeypatch.setattr(module.Mtp, "fuse", lambda _, features: features)


def planted_halves_turned(monkeypatch):
    right = module.Mtp._both
    monkeypatch.setattr(module.Mtp, "_both", lambda self, *rest: right(self, *rest).roll(self.spec.hidden, dims=1))


def planted_norm_of_the_target(monkeypatch):
    right = module.Mtp.logits

    def wrong(self, hidden):
        self._norm = self._target.last_norm
        return right(self, hidden)

    monkeypatch.setattr(module.Mtp, "logits", wrong)


@pytest.mark.parametrize(
    "plant",
    [
        planted_no_position_zero,
        planted_features_before_the_last_norm,
        planted_halves_turned,
        planted_norm_of_the_target,
    ],
    ids=lambda plant: plant.__name__,
)
def test_planted_bugs_are_seen(plant, tmp_path, monkeypatch):
    model, own = write("deepseek", tmp_path, monkeypatch)
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(model, own, tmp_path)


def test_the_first_of_several_is_fed_again(tmp_path, monkeypatch):
    model, own = write("deepseek", tmp_path, monkeypatch, further=1)
    found = read("mtp", tmp_path)
    assert (found.layer, found.taps, found.shift, found.block) == (3, (2,), 1, 1)
    assert found.notes == ("mtp: the first of 2 layers is fed again",)
    check(model, own, tmp_path)


def test_a_checkpoint_comes_with_its_layer(tmp_path, monkeypatch):
    write("deepseek", tmp_path, monkeypatch)
    assert read("", tmp_path) == read("mtp", tmp_path)
    assert read("none", tmp_path) is None


def test_the_hash_is_the_target_s(tmp_path, monkeypatch):
    write("deepseek", tmp_path, monkeypatch)
    target, draft = loaded("mtp", tmp_path)
    assert draft.weights_hash == target.weights_hash


def test_copies_of_the_target_s_tables_may_be_absent(tmp_path, monkeypatch):
    model, own = write("deepseek", tmp_path, monkeypatch)

    def drop(tensors):
        for name in ("embed_tokens.weight", "shared_head.head.weight"):
            del tensors[f"model.layers.3.{name}"]

    edit(tmp_path, drop)
    check(model, own, tmp_path)


@pytest.mark.parametrize("layout", ["fp8-deepseek", "nvfp4-modelopt-older", "int4-compressed-zeros", "gptq"])
def test_a_quantised_layer_is_what_its_tensors_say(layout, tmp_path, monkeypatch):
    write("deepseek", tmp_path / "source", monkeypatch)
    quantised.quantise(tmp_path / "source", layout, tmp_path / "quantised", tmp_path / "plain")
    monkeypatch.setattr(Reference, "pack", lambda _, weight: weight)
    drafts = [loaded("mtp", tmp_path / name)[1] for name in ("quantised", "plain")]
    ids, features = tokens(40, seed=4), 3 * Random(7).matrix(40, 64)
    found = [logits_of(draft, hidden_of(draft, ids, features, 32, 4, new_cache(draft))) for draft in drafts]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    assert drafts[0].spec.reference.weights < drafts[1].spec.reference.weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["deepseek", "glm4-moe-lite"])
def test_it_takes_what_is_planned(kind, dtype, tmp_path, monkeypatch):
    write(kind, tmp_path, monkeypatch)
    monkeypatch.setattr(Reference, "pack", lambda _, weight: weight)
    _, draft = loaded("mtp", tmp_path, dtype)
    own = [draft._layer, draft._projection, draft._enorm, draft._hnorm, draft._norm]
    assert held_bytes(own) == draft.spec.reference.weights


def test_a_layer_on_kernels_is_that_of_the_reference(tmp_path, monkeypatch):
    write("glm4-moe-lite", tmp_path, monkeypatch)
    right, ops = loading.select, DeviceOps(HostLauncher(optimization=1))
    monkeypatch.setattr(loading, "select", lambda kind, shape: ops if kind == "host" else right(kind, shape))
    spec, exact = read("mtp", tmp_path, "bfloat16"), loaded("mtp", tmp_path)[1]
    target = load(tmp_path, device="host", dtype="bfloat16")
    draft = load_draft(spec, target, 256)
    own = [draft._layer, draft._projection, draft._enorm, draft._hnorm, draft._norm]
    assert held_bytes(own) == spec.kernels.weights
    ids, features = tokens(20, seed=4), Random(7).matrix(20, 64)
    found = [
        logits_of(each, hidden_of(each, ids, features.to(each.dtype), 12, 4, new_cache(each, kv)))
        for each, kv in ((draft, "bfloat16"), (exact, "float32"))
    ]
    errors = sorted(
        float(1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum())) for x, y in zip(*found, strict=True)
    )
    assert errors[len(errors) * 3 // 4] < 3e-3, errors  # of the others a rounding may have chosen another expert


def refusal(wanted, folder):
    with pytest.raises(ModelError) as refused:
        loaded(wanted, folder)
    assert "\n" not in refused.value.message
    return refused.value.message


def test_a_checkpoint_without_such_layers(tmp_path):
    checkpoints.make("deepseek", tmp_path)
    assert read("", tmp_path) is None
    assert "no layers that predict further tokens" in refusal("mtp", tmp_path)


def test_layers_that_are_announced_and_absent(tmp_path):
    checkpoints.make("deepseek", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    assert read("", tmp_path) is None
    assert "no layers that predict further tokens" in refusal("mtp", tmp_path)


@pytest.mark.parametrize("missing", ["eh_proj", "enorm", "hnorm", "shared_head.norm"])
def test_a_layer_that_is_not_whole(missing, tmp_path, monkeypatch):
    write("deepseek", tmp_path, monkeypatch)
    edit(tmp_path, lambda tensors: tensors.pop(f"model.layers.3.{missing}.weight"))
    message = refusal("", tmp_path)
    assert f"model.layers.3.{missing} is missing" in message
    assert "--draft-model none" in message
    assert load(tmp_path).kept


def test_a_tensor_of_its_block_is_missing(tmp_path, monkeypatch):
    write("deepseek", tmp_path, monkeypatch)
    edit(tmp_path, lambda tensors: tensors.pop("model.layers.3.self_attn.o_proj.weight"))
    assert "model.layers.3.self_attn.o_proj.weight is missing" in refusal("mtp", tmp_path)


def test_a_tensor_without_a_place(tmp_path, monkeypatch):
    write("deepseek", tmp_path, monkeypatch)
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.3.third_norm.weight": torch.ones(64)}))
    assert "model.layers.3.third_norm.weight has no place" in refusal("mtp", tmp_path)


def test_a_spec_is_of_one_layer(tmp_path, monkeypatch):
    write("deepseek", tmp_path, monkeypatch)
    found = read("mtp", tmp_path)
    assert [layout.layers for layout in found.cache] == [(0,)]
    assert dataclasses.asdict(found)["features"] == found.hidden == 64

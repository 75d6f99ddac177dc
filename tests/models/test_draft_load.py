"""Draft folders: kinds by what they hold, sizes to the byte, what is not supported or not made for the target."""

import dataclasses
import json

import pytest
import torch
from drafts import (
    TARGET,
    WIDE,
    Random,
    Sizes,
    absorb,
    block_of,
    configure,
    dflash_config,
    dflash_tensors,
    eagle_config,
    eagle_tensors,
    edit,
    hidden_of,
    loaded,
    logits_of,
    new_cache,
    read,
    save,
    speculators_config,
    write_target,
)
from parity import PAGE, tokens
from reach import held_bytes

from fwd.errors import ModelError
from fwd.kernels.device import DeviceOps
from fwd.kernels.host import HostLauncher
from fwd.kernels.reference import Reference
from fwd.models import load as loading
from fwd.models.draft.load import load_draft
from fwd.models.layout import groups

EAGLE = Sizes(layers=1)
DFLASH = Sizes(layers=2, qk_norm=True)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


def eagle(folder, sizes=EAGLE, **options):
    config = {
        key: options.pop(key) for key in list(options) if key not in {"taps", "vocab", "norms", "embedding", "target"}
    }
    save(folder, eagle_config(sizes, vocab=options.get("vocab", 40), **config), eagle_tensors(sizes, **options))
    return folder


def speculators(folder, **config):
    save(folder, speculators_config(EAGLE, **config), eagle_tensors(EAGLE, first="layers.0."))
    return folder


def dflash(folder, **config):
    save(folder, dflash_config(DFLASH, **config), dflash_tensors(DFLASH))
    return folder


def refusal(folder, target):
    """The one line that says why a drafter is refused, before anything is loaded where headers tell."""
    with pytest.raises(ModelError) as refused:
        read(folder, target)
    message = refused.value.message
    assert "\n" not in message
    assert message.startswith("draft_model: ")
    assert str(folder) in message
    return message


# ---- what it takes ----


def keeps(draft, target):
    """Bytes that a drafter holds beside its target's, without its table of rotations."""
    own = dict(vars(draft))
    for name in ("_rope", "_ops", "spec", "_target"):
        own.pop(name, None)
    shared = [target.embedding, target.head]
    return held_bytes([own, shared]) - held_bytes(shared)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "write",
    [
        eagle,
        speculators,
        dflash,
        lambda folder: eagle(folder, embedding=True, norms="input", norm_before_fc=True),
        lambda folder: eagle(folder, norms="each", fc_norm=True, norm_output=True),
        lambda folder: eagle(folder, vocab=0),
    ],
)
def test_weights_are_as_planned_in_the_reference(write, dtype, target, tmp_path, monkeypatch):
    monkeypatch.setattr(Reference, "pack", lambda _, weight: weight)
    write(tmp_path)
    model, draft = loaded(tmp_path, target, dtype)
    assert keeps(draft, model) == draft.spec.reference.weights


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """A target as kernels run it, and its folder."""
    right = loading.select
    ops = DeviceOps(HostLauncher(optimization=1))
    monkeypatch.setattr(loading, "select", lambda kind, shape: ops if kind == "host" else right(kind, shape))
    folder = write_target(tmp_path / "target", WIDE)
    return folder, loading.load(folder, device="host", dtype="bfloat16")


WIDE_EAGLE, WIDE_DFLASH = (dataclasses.replace(WIDE, layers=1), dataclasses.replace(WIDE, layers=2, qk_norm=True))


def wide_eagle(folder):
    config = eagle_config(WIDE_EAGLE, eagle_aux_hidden_state_layer_ids=[1, 2, 4])
    save(folder, config, eagle_tensors(WIDE_EAGLE, target=WIDE, embedding=True))


def wide_dflash(folder):
    save(folder, dflash_config(WIDE_DFLASH, ids=(0, 1, 3)), dflash_tensors(WIDE_DFLASH, target=WIDE))


def language(folder):
    write_target(folder, dataclasses.replace(WIDE, layers=1), seed=9)


@pytest.mark.parametrize("write", [wide_eagle, wide_dflash, language])
def test_weights_are_as_planned_where_there_are_kernels(write, kernels, tmp_path):
    write(tmp_path / "draft")
    folder, target = kernels
    draft = load_draft(read(tmp_path / "draft", folder, "bfloat16"), target, 256)
    found = keeps(draft, target)
    if hasattr(draft, "_model"):
        found = held_bytes([draft._model.layers, draft._model.embedding, draft._model.head, draft._model.last_norm])
    assert found == draft.spec.kernels.weights


@pytest.mark.parametrize("write", [eagle, dflash])
@pytest.mark.parametrize("kv", ["float32", "bfloat16", "fp8"])
def test_the_cache_is_as_planned_and_empty(write, kv, target, tmp_path):
    write(tmp_path)
    _, draft = loaded(tmp_path, target)
    cache = draft.new_cache(7, PAGE, kv)
    planned = sum(7 * group.unit_bytes(PAGE, kv) for group in groups(draft.spec.cache))
    tensors = [x for each in cache.layers for x in (each.keys, each.values, each.key_scales, each.value_scales)]
    assert sum(x.nbytes for x in tensors if x is not None) == planned
    assert not any(x.view(torch.uint8).any() for x in tensors if x is not None)


# ---- on kernels ----


@torch.inference_mode()
def test_a_head_on_kernels_is_that_of_the_reference(kernels, tmp_path):
    wide_eagle(tmp_path / "draft")
    folder, target = kernels
    spec = read(tmp_path / "draft", folder, "bfloat16")
    on_kernels = load_draft(spec, target, 256)
    exact = loaded(tmp_path / "draft", folder)[1]
    ids, features = tokens(20, seed=4), Random(7).matrix(20, spec.features)
    found = logits_of(
        on_kernels, hidden_of(on_kernels, ids, features.bfloat16(), 12, 4, new_cache(on_kernels, "bfloat16"))
    )
    expected = logits_of(exact, hidden_of(exact, ids, features, 0, 4, new_cache(exact)))
    assert off(found, expected) < 1e-3


@torch.inference_mode()
def test_a_block_on_kernels_is_that_of_the_reference(kernels, tmp_path):
    wide_dflash(tmp_path / "draft")
    folder, target = kernels
    spec = read(tmp_path / "draft", folder, "bfloat16")
    on_kernels, exact = load_draft(spec, target, 256), loaded(tmp_path / "draft", folder)[1]
    features, ids = Random(7).matrix(20, spec.features), torch.tensor([5] + [spec.mask] * 7)
    found = []
    for draft, kv in ((on_kernels, "bfloat16"), (exact, "float32")):
        cache = new_cache(draft, kv)
        absorb(draft, features.to(draft.dtype), 0, 8, cache)
        found.append(logits_of(draft, block_of(draft, ids, 20, cache)))
    assert off(*found) < 1e-3


def off(found, expected):
    """1 − 2Σxy/(Σx² + Σy²) of the ids that are known."""
    known = expected > -1e29
    x, y = found[known].double(), expected[known].double()
    return float(1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum()))


def test_a_head_that_kernels_do_not_take(kernels, tmp_path):
    sizes = dataclasses.replace(WIDE_EAGLE, head_dim=24)
    config = eagle_config(sizes, eagle_aux_hidden_state_layer_ids=[1, 2, 4])
    save(tmp_path / "draft", config, eagle_tensors(sizes, target=WIDE))
    folder, target = kernels
    with pytest.raises(ModelError, match="head_dim is 24"):
        load_draft(read(tmp_path / "draft", folder, "bfloat16"), target, 256)


# ---- what it is ----


def test_kinds_are_found_by_what_a_folder_holds(target, tmp_path):
    assert read(eagle(tmp_path / "a"), target).kind == "eagle"
    assert read(eagle(tmp_path / "b", architectures=["LlamaForCausalLM"]), target).kind == "eagle"
    assert read(eagle(tmp_path / "c", vocab=0, architectures=["LlamaForCausalLM"]), target).kind == "eagle"
    assert read(speculators(tmp_path / "d"), target).kind == "eagle"
    assert read(dflash(tmp_path / "e"), target).kind == "dflash"
    assert read(write_target(tmp_path / "f", seed=5), target).kind == "model"


@pytest.mark.parametrize(
    "name",
    [
        "DFlash2DraftModel",
        "LiLiCorrDraftModel",
        "Qwen3DSparkModel",
        "MedusaModel",
        "Gemma4AssistantForCausalLM",
        None,
        7,
    ],
)
def test_other_kinds_are_refused_by_name(name, target, tmp_path):
    message = refusal(dflash(tmp_path, architectures=[name]), target)
    assert repr(name) in message
    assert "supported are plain language models, EAGLE-3" in message


@pytest.mark.parametrize("kind", ["peagle", "dflash", "dspark", "mtp", 3])
def test_other_kinds_of_speculators_are_refused_by_name(kind, target, tmp_path):
    message = refusal(
        speculators(tmp_path, speculators_model_type=kind) if kind == 3 else with_kind(tmp_path, kind), target
    )
    assert f"speculators_model_type {kind!r} is not supported" in message


def with_kind(folder, kind):
    configure(speculators(folder), speculators_model_type=kind)
    return folder


def test_the_first_eagle_is_refused_by_name(target, tmp_path):
    eagle(tmp_path, vocab=0, architectures=["LlamaForCausalLM"])

    def rename(tensors):
        for name in [name for name in tensors if name.startswith("midlayer.")]:
            tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)

    edit(tmp_path, rename)
    assert "EAGLE and EAGLE-2 are not supported" in refusal(tmp_path, target)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"parallel_drafting": True}, "P-EAGLE is not supported"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state = False is not supported"),
        ({"logit_scale": 0.5}, "logit_scale = 0.5 is not supported"),
        ({"norm_before_fc": True, "fc_norm": True}, "exclude each other"),
        ({"norm_before_fc": True}, "input_norm.weight is missing"),
        ({"fc_norm": True}, "fc_norm.0.weight is missing"),
        ({"attention_bias": True}, "q_proj.bias is missing"),
        ({"norm_output": 3}, "norm_output must be true or false"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"vocab_size": 300}, "vocab_size is 300, that of the target 260"),
        ({"target_hidden_size": 96}, "made for rows of 96, hidden_size of the target is 64"),
        ({"draft_vocab_size": 41}, "lm_head.weight has shape [40, 64], expected [41, 64]"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, "names layer 9, the target has 8"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}, "names layer 0"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, "fc.weight has shape [64, 192], expected [64, 128]"),
        ({"eagle_aux_hidden_state_layer_ids": "all"}, "must be a list of layers"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised drafters are not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope type 'longrope' is not supported"),
        ({"num_hidden_layers": 2}, "layers.1.self_attn.q_proj.weight is missing"),
    ],
)
def test_heads_that_are_refused(config, words, target, tmp_path):
    assert words in refusal(eagle(tmp_path, **config), target)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_target_layers": 9}, "num_target_layers is 9, the target has 8"),
        ({"own": {"mask_token_id": 260}}, "mask_token_id must be an integer from 0 to 259"),
        ({"own": {"mask_token_id": None}}, "mask_token_id must be an integer"),
        ({"own": {"target_layer_ids": [1, 8]}}, "names layer 8, the target has 8"),
        ({"own": {"attention_mode": "mla"}}, "attention_mode = 'mla' is not supported"),
        ({"own": {"attention_sink_bias": True}}, "attention_sink_bias is missing"),
        ({"is_neox_style": False}, "is_neox_style = False is not supported"),
        ({"draft_vocab_size": 40}, "draft_vocab_size = 40 is not supported"),
        ({"block": 1}, "block_size must be an integer from 2"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window must be an integer"),
        ({"layer_types": ["sliding_attention"]}, "layer_types names 1 layers"),
        ({"vocab_size": 300}, "vocab_size is 300, that of the target 260"),
    ],
)
def test_block_drafters_that_are_refused(config, words, target, tmp_path):
    assert words in refusal(dflash(tmp_path, **config), target)


def test_drafters_of_another_width(target, tmp_path):
    narrow = Sizes(layers=1, hidden=48, head_dim=16)
    assert "no embedding of its own" in refusal(eagle(tmp_path / "a", narrow), target)
    assert "no head of its own" in refusal(eagle(tmp_path / "b", narrow, vocab=0, embedding=True), target)
    sizes = dataclasses.replace(DFLASH, hidden=48)
    save(tmp_path / "c", dflash_config(sizes), dflash_tensors(sizes))
    assert "hidden_size is 48, that of the target 64" in refusal(tmp_path / "c", target)


def test_heads_of_another_vocabulary(target, tmp_path):
    eagle(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update(t2d=torch.zeros(300, dtype=torch.bool)))
    assert "made for a vocabulary of 300, that of the target has 260" in refusal(tmp_path, target)


def test_a_head_made_for_another_target(target, tmp_path):
    verifier = {"verifier": {"name_or_path": "Qwen/Qwen3-8B", "architectures": ["Qwen3ForCausalLM"]}}
    configure(speculators(tmp_path), speculators_config=verifier)
    message = refusal(tmp_path, target)
    for part in ("another target", "Qwen/Qwen3-8B", "Qwen3ForCausalLM", "LlamaForCausalLM"):
        assert part in message


@pytest.mark.parametrize("write", [eagle, dflash])
@pytest.mark.parametrize("name", ["fc.weight", "norm.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight"])
def test_tensors_that_are_missing_or_of_another_shape(write, name, target, tmp_path):
    write(tmp_path)
    found = []

    def cut(tensors):
        found.append(next(each for each in tensors if each.endswith(name)))
        tensors[found[0]] = tensors[found[0]][:-1]

    edit(tmp_path, cut)
    assert f"{found[0]} has shape" in refusal(tmp_path, target)
    edit(tmp_path, lambda tensors: tensors.pop(found[0]))
    assert f"tensor {found[0]} is missing" in refusal(tmp_path, target)


@pytest.mark.parametrize("write", [eagle, dflash])
def test_tensors_without_a_place(write, target, tmp_path):
    write(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update(mask_hidden=torch.zeros(1, 192)))
    assert "tensor mask_hidden has no place" in refusal(tmp_path, target)


def test_tensors_that_nobody_needs(target, tmp_path):
    eagle(tmp_path)
    unused = {"verifier_norm.weight": torch.ones(64), "midlayer.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit(tmp_path, lambda tensors: tensors.update(unused))
    assert loaded(tmp_path, target)[1].spec.kind == "eagle"


@pytest.mark.parametrize("value", [-1, 300, 0])
def test_a_map_that_leads_nowhere(value, target, tmp_path):
    eagle(tmp_path)
    change = {-1: lambda d2t: d2t - 1000, 300: lambda d2t: d2t + 1000, 0: lambda d2t: -torch.arange(len(d2t))}[value]
    edit(tmp_path, lambda tensors: tensors.update(d2t=change(tensors["d2t"])))
    with pytest.raises(ModelError, match="d2t does not lead to different ids below 260"):
        loaded(tmp_path, target)


def test_no_folder_and_no_files(target, tmp_path):
    assert "no config.json" in refusal(tmp_path / "nothing", target)
    eagle(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refusal(tmp_path, target)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in refusal(tmp_path, target)


def test_the_hash_covers_config_and_weights(target, tmp_path):
    eagle(tmp_path)
    first = loaded(tmp_path, target)[1].weights_hash
    assert len(first) == 64
    configure(tmp_path, comment="x")
    second = loaded(tmp_path, target)[1].weights_hash
    edit(tmp_path, lambda tensors: tensors["fc.weight"].add_(1))
    assert len({first, second, loaded(tmp_path, target)[1].weights_hash}) == 3


def test_configs_that_are_no_objects(target, tmp_path):
    speculators(tmp_path)
    configure(tmp_path, transformer_layer_config=[1])
    assert "transformer_layer_config must be an object" in refusal(tmp_path, target)
    assert json.loads((tmp_path / "config.json").read_text())["speculators_model_type"] == "eagle3"
    assert TARGET.layers == 8

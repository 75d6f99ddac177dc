"""Which drafter a model gets: what it comes with is left out where it cannot be, what was asked for is refused."""

import random
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
from drafts import Sizes, write_target

import fwd
from fwd.engine import drafting
from fwd.engine.device import GPUS, cpu
from fwd.engine.drafting import plan_drafting
from fwd.engine.plan import plan
from fwd.engine.speculate import build
from fwd.errors import ConfigError, ModelError
from fwd.models.config import read_spec, run_spec
from fwd.protocol.messages import Load

DEMO = Path(fwd.__file__).parent / "demo"
ROOMY = cpu(1 << 34)


def planned(folder, wanted="", device=ROOMY, **sizes):
    spec = run_spec(read_spec(folder), "auto")
    return plan_drafting(str(wanted), folder, spec, device, **sizes)


def parts(found):
    """What a drafter takes."""
    return {name for name, size in found.items.items() if name.startswith("drafter") and size}


def test_the_embedded_model_has_its_drafter_and_none_is_none():
    found, without = planned(DEMO / "model"), planned(DEMO / "model", "none")

    assert (found.draft.kind, found.draft.folder, found.draft_notes) == ("model", DEMO / "draft", ())
    assert parts(found) == {f"drafter_{name}" for name in ("weights", "rope", "kv", "passes")}
    assert found.items["drafter_kv"] == found.units[0] * 16 * found.draft.cache[0].token_bytes("bfloat16")
    assert (without.draft, parts(without), without.units) == (None, set(), found.units)


def test_a_gpu_has_graphs_of_its_passes():
    found = planned(DEMO / "model", device=GPUS["h100"])

    assert parts(found) == {f"drafter_{name}" for name in ("weights", "rope", "kv", "passes", "graphs")}
    assert found.items["drafter_graphs"] == 3 * 5 * 20_000_000


def test_what_does_not_fit_beside_the_model_is_left_out_unless_it_was_asked_for():
    least = planned(DEMO / "model", "none", context=2048, max_seqs=1).needed
    small = cpu(least + 1000)
    found = planned(DEMO / "model", device=small, context=2048, max_seqs=1)

    assert (found.draft, found.context) == (None, 2048)
    assert found.draft_notes[0].startswith("no drafter: context: 2048 tokens need ")
    with pytest.raises(ConfigError, match="context: 2048 tokens need"):
        planned(DEMO / "model", DEMO / "draft", device=small, context=2048, max_seqs=1)
    with pytest.raises(ConfigError, match="the model does not fit"):
        planned(DEMO / "model", device=cpu(1000))


def test_a_drafter_that_a_model_came_with_and_is_not_whole_is_left_out(monkeypatch):
    def broken(wanted, *_):
        raise ModelError("draft_model: its layers are gone")

    monkeypatch.setattr(drafting, "read_draft", broken)
    assert planned(DEMO / "model").draft_notes == ("no drafter: draft_model: its layers are gone",)
    with pytest.raises(ModelError, match="its layers are gone"):
        planned(DEMO / "model", "mtp")


def test_one_whose_weights_are_wrong_is_left_out_too_and_users_are_told(monkeypatch):
    def broken(*_):
        raise ModelError("model.safetensors: it is not whole")

    monkeypatch.setattr(build, "load_draft", broken)
    found = planned(DEMO / "model")
    said = (None, ("no drafter: model.safetensors: it is not whole",))
    assert build.neural_of(Load(model=str(DEMO)), found, None, None, None) == said
    with pytest.raises(ModelError, match="it is not whole"):
        build.neural_of(Load(model=str(DEMO), draft_model="mtp"), found, None, None, None)


def test_a_target_without_whole_sequences_has_no_pages_to_share(tmp_path):
    checkpoints.make("mistral-sliding", tmp_path / "target")
    write_target(tmp_path / "draft")
    with pytest.raises(ModelError, match="draft_model: MistralForCausalLM keeps no whole sequences"):
        planned(tmp_path / "target", tmp_path / "draft")


def test_pages_in_fp8_want_vectors_that_the_drafter_must_have_too(tmp_path):
    write_target(tmp_path / "target")
    write_target(tmp_path / "draft", Sizes(layers=1, head_dim=24))
    found = planned(tmp_path / "target", tmp_path / "draft", kv_dtype="bfloat16")

    assert found.items["drafter_kv"] == found.units[0] * 16 * 2 * 2 * 24 * 2
    with pytest.raises(ConfigError, match=r"kv-dtype: fp8 needs vectors of a multiple of 16, the drafter has 24"):
        planned(tmp_path / "target", tmp_path / "draft", kv_dtype="fp8")


def test_a_larger_context_never_takes_less_with_a_drafter():
    """Plans are found by halves, which holds only while more of anything takes more."""
    spec, rng = run_spec(read_spec(DEMO / "model"), "auto"), random.Random(7)
    draft = planned(DEMO / "model").draft
    short = replace(draft, context=100)
    for _ in range(50):
        tokens, seqs = rng.randrange(1, 2048), rng.randrange(1, 17)
        sizes = [plan(spec, ROOMY, context=each, max_seqs=seqs, draft=short).total for each in (tokens, tokens + 1)]
        assert sizes[0] <= sizes[1], (tokens, seqs)

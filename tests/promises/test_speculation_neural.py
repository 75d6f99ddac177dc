"""Promise 1 with draft models of every kind, good and hopeless: nothing they foresee changes an answer or a cell."""

import random
import shutil
from dataclasses import replace

import pytest
from drafted import OWN, SEED, lives
from drafts import WIDE, Sizes, dflash_config, dflash_tensors, eagle_config, eagle_tensors, save, write_target
from inprocess import loaded, requests
from test_draft_mtp import write as write_mtp

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("model", "mtp", "eagle", "dflash")
SMALL = Sizes(layers=1, heads=2, kv_heads=1, head_dim=64)
AUX = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}


def write(kind, folder, patch):
    """A target and a drafter: of kind `model` the target itself, all others random; what `--draft-model` says."""
    target, draft = folder / "target", folder / "draft"
    if kind == "mtp":
        write_mtp("deepseek", target, patch)
        return "mtp"
    write_target(target, WIDE)
    match kind:
        case "model":
            shutil.copytree(target, draft)
        case "eagle":
            save(draft, eagle_config(SMALL, vocab=200, **AUX), eagle_tensors(SMALL, vocab=200, target=WIDE))
        case "dflash":
            normed = replace(SMALL, qk_norm=True)
            save(draft, dflash_config(normed, ids=(0, 2)), dflash_tensors(normed, taps=2, target=WIDE))
    return str(draft)


def drafting(kind, folder, patch, device):
    dtype = {"cpu": "float32", "host": "bfloat16"}[device]
    wanted = write(kind, folder, patch)
    return loaded(folder / "target", device, dtype, wanted=wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_draft_models_change_nothing(kind, tmp_path, monkeypatch):
    rng = random.Random(f"{SEED} {kind}")
    model = drafting(kind, tmp_path, monkeypatch, "cpu")
    rounds, looked, _ = lives(model, requests(rng, 5), rng, 5, looks=0.5, drafters=(OWN,))

    assert len(looked) == len(model.plan.groups)
    assert sum(count for (drafts, _), count in rounds.items() if drafts) > 20
    if kind == "model":
        assert max(held for _, held in rounds) > 5


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("device", ["cpu", "host"])
@pytest.mark.parametrize("kind", KINDS)
def test_draft_models_change_nothing_in_many_lives(kind, device, tmp_path, monkeypatch):
    if (kind, device) == ("mtp", "host"):
        pytest.skip("no tiny model with such layers is one that kernels take")
    rng = random.Random(f"{SEED} {kind} {device}")
    model = drafting(kind, tmp_path, monkeypatch, device)
    asked = requests(rng, {"cpu": 16, "host": 8}[device])
    rounds, _, died = lives(model, asked, rng, {"cpu": 60, "host": 15}[device], drafters=(OWN,))

    assert sum(rounds.values()) > 200
    assert died

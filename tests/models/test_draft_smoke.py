"""Drafters tried at load: what foresees nothing is told of, what foresees something is not, and each row is right."""

import dataclasses

import checkpoints
import pytest
import torch
from drafts import (
    CONTEXT,
    Sizes,
    dflash_config,
    dflash_tensors,
    eagle_config,
    eagle_tensors,
    loaded,
    save,
    write_target,
)
from parity import new_cache, rows
from structlog.testing import capture_logs

from fwd.demo import MODEL
from fwd.models.draft import smoke
from fwd.models.draft.load import load_draft
from fwd.models.draft.smoke import LEAST, PROMPT, Trial, notes, trial
from fwd.models.load import load
from fwd.models.taps import Taps

LENGTH = 20


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


def random_eagle(folder):
    sizes = Sizes(layers=1)
    save(folder, eagle_config(sizes), eagle_tensors(sizes))


def random_dflash(folder):
    sizes = Sizes(layers=2, qk_norm=True)
    save(folder, dflash_config(sizes), dflash_tensors(sizes))


def random_model(folder):
    write_target(folder, Sizes(layers=2), seed=8)


@pytest.mark.parametrize("write", [random_eagle, random_dflash, random_model])
def test_random_weights_are_told_of(write, target, tmp_path):
    write(tmp_path)
    model, draft = loaded(tmp_path, target)
    with capture_logs() as logs:
        found = notes(model, draft, CONTEXT)
    (line,) = found
    assert line.startswith(f"{draft.spec.kind}: ")
    assert "\n" not in line
    (entry,) = logs
    assert (entry["event"], entry["log_level"]) == ("drafter_useless", "warning")
    assert entry["drafter"] == draft.spec.kind


def test_the_embedded_drafter_is_not():
    model, draft = loaded("", MODEL, "bfloat16")
    with capture_logs() as logs:
        assert notes(model, draft, CONTEXT) == ()
    assert logs == []
    found = trial(model, draft, LENGTH)
    assert found.right > found.places / 3


def test_a_model_foresees_all_of_itself(target):
    model, draft = loaded(target, target)
    found = trial(model, draft, LENGTH)
    assert LEAST <= found.places == found.right <= 4 * (LENGTH - PROMPT)
    assert found.vocab == 260
    assert 0 < found.frequent <= found.right


def test_it_is_the_same_trial_on_kernels():
    model, draft = loaded("", MODEL, "bfloat16")
    kernels = load(MODEL, device="host")
    own = load_draft(draft.spec, kernels, CONTEXT)
    assert trial(kernels, own, PROMPT + 3) == trial(model, draft, PROMPT + 3)
    assert notes(kernels, own, CONTEXT) == ()


def test_a_short_context_is_not_tried(target, tmp_path):
    random_eagle(tmp_path)
    assert notes(*loaded(tmp_path, target), PROMPT + 4) == ()


class Watched:
    """A drafter that keeps what it is given, by place, and says what its target says once it is given that."""

    def __init__(self, draft, target):
        self._draft, self._target, self.seen = draft, target, {}
        self.spec, self.dtype, self.ops, self.new_cache = draft.spec, draft.dtype, draft.ops, draft.new_cache

    def fuse(self, features):
        return features.clone()

    def forward(self, ids, hidden, rows, cache):
        for row in range(len(ids)):
            self.seen[int(rows.sequences[row]), int(rows.positions[row])] = (int(ids[row]), hidden[row])
        return hidden

    absorb = forward

    def draft(self, ids, ends, rows, cache):
        first = int(rows.positions[0])
        assert ids[1:].tolist() == [self.spec.mask] * (self.spec.block - 1)
        assert ends.tolist() == [first + self.spec.block - 1] * self.spec.block
        text = int(rows.sequences[0])
        assert max(place for own, place in self.seen if own == text) == first - 1, "all before it is absorbed"
        return torch.stack([self.seen[text, first - 1][1]] * len(ids))

    def logits(self, hidden):
        return self._target.logits(hidden[:, -self._target.spec.hidden :].contiguous())


@pytest.mark.parametrize("write", [random_eagle, random_dflash])
def test_rows_have_the_ids_and_features_of_their_places(write, target, tmp_path):
    write(tmp_path)
    model, draft = loaded(tmp_path, target)
    watched = Watched(draft, model)
    watched.spec = dataclasses.replace(draft.spec, taps=(2, 7), features=2 * 64)
    texts, features = smoke._spoken(model, watched, LENGTH)
    trial(model, watched, LENGTH)
    shift = 0 if draft.spec.kind == "dflash" else 1
    assert {place for _, place in watched.seen} == set(range(LENGTH - 1 - shift))
    for (text, place), (id_, feature) in watched.seen.items():
        assert id_ == texts[text, place + shift]
        torch.testing.assert_close(feature, features[text, place])
    again = torch.zeros(LENGTH, 2 * 64)
    plain_features(model, texts[1], again)
    torch.testing.assert_close(features[1, :-1], again[:-1], atol=1e-4, rtol=1e-4)


def plain_features(model, ids, into):
    """Features of a whole text, one row a step, in pages of its own."""
    cache = new_cache(model)
    for place in range(len(ids)):
        buffer = torch.zeros(4, into.shape[1])
        model.forward(ids[place : place + 1], rows(place, place + 1), cache, Taps((2, 7), buffer))
        into[place] = buffer[0]


def test_targets_with_windows_are_tried(tmp_path):
    checkpoints.make("qwen3-sliding", tmp_path)
    model = load(tmp_path, dtype="float32")
    _, draft = loaded(tmp_path, tmp_path)
    found = trial(model, draft, 40)
    assert found.right == found.places


@pytest.mark.parametrize(
    ("right", "frequent", "useless"),
    [(0, 3, True), (2, 3, True), (3, 3, False), (48, 48, False), (1, 1, False), (0, 1, True)],
)
def test_what_is_useless(right, frequent, useless):
    assert Trial(48, right, frequent, 260).useless == useless


def test_chance_in_a_small_vocabulary():
    assert Trial(48, 3, 1, 16).useless
    assert not Trial(48, 4, 1, 16).useless


def test_of_few_places_nothing_is_said():
    assert not Trial(LEAST - 1, 0, 2, 260).useless
    assert Trial(LEAST, 0, 2, 260).useless


def test_texts_that_go_round_in_circles_count_once(target, monkeypatch):
    """A drafter that misses the one id that all texts fall into, and foresees the others, is no worse than chance."""
    model, draft = loaded(target, target)
    texts = torch.arange(4 * LENGTH).view(4, LENGTH)
    texts[:, PROMPT + 6 :] = 5
    monkeypatch.setattr(smoke, "_spoken", lambda *_: (texts, torch.zeros(4, LENGTH, 0)))
    said = {(text, place): int(texts[text, place]) for text in range(4) for place in range(PROMPT + 6)}
    said |= {(text, place): 7 for text in range(4) for place in range(PROMPT + 6, LENGTH)}
    monkeypatch.setattr(smoke, "_ids", lambda *_: said)
    found = trial(model, draft, LENGTH)
    assert (found.places, found.right) == (24 + 4 + 1, 24)
    assert not found.useless

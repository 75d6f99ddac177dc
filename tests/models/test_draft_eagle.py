"""EAGLE-3 heads in both layouts and with all flags against plain torch; shifts, maps of vocabularies, planted bugs."""

import dataclasses

import pytest
import torch
from drafts import (
    TARGET,
    Random,
    Sizes,
    eagle_config,
    eagle_tensors,
    hidden_of,
    loaded,
    logits_of,
    new_cache,
    passed,
    read,
    save,
    speculators_config,
    write_target,
)
from parity import tokens
from plain_drafts import Eagle

from fwd.models.draft import eagle as module
from fwd.models.draft.model import ABSENT

ONE = Sizes(layers=1, heads=4, kv_heads=2, head_dim=24)
KNOWN, STEPS = 90, 6


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


@dataclasses.dataclass
class Case:
    """A head as it is written."""

    sizes: Sizes = ONE
    speculators: bool = False
    taps: int = 3
    vocab: int = 40
    norms: str = ""
    embedding: bool = False
    windows: list | None = None
    flags: dict = dataclasses.field(default_factory=dict)  # in the config
    config: dict = dataclasses.field(default_factory=dict)
    layer: dict = dataclasses.field(default_factory=dict)  # speculators: of transformer_layer_config

    def write(self, folder):
        first = "layers.0." if self.speculators else "midlayer."
        tensors = eagle_tensors(
            self.sizes, taps=self.taps, vocab=self.vocab, first=first, norms=self.norms, embedding=self.embedding
        )
        if self.speculators:
            config = speculators_config(self.sizes, vocab=self.vocab, layer=self.layer, **self.flags, **self.config)
        else:
            config = eagle_config(self.sizes, vocab=self.vocab, **self.flags, **self.layer, **self.config)
        return save(folder, config, tensors)

    def plain(self, tensors, model):
        first = "layers.0." if self.speculators else "midlayer."
        flags = {"norm_before_residual": self.speculators} | self.flags
        embedding, head = model.embedding.dequantize(), model.head.dequantize()
        return Eagle(tensors, self.sizes, embedding, head, first=first, windows=self.windows, **flags)


CASES = {
    "original": Case(),
    "own-embedding": Case(embedding=True),
    "narrow": Case(Sizes(layers=1, hidden=48, heads=2, kv_heads=1, head_dim=24), embedding=True),
    "target-head": Case(vocab=0),
    "bias": Case(Sizes(layers=1, bias=True)),
    "norm-before-residual": Case(flags={"norm_before_residual": True}),
    "norm-before-fc": Case(norms="input", flags={"norm_before_fc": True}),
    "fc-norm": Case(norms="each", flags={"fc_norm": True}),
    "norm-output": Case(flags={"norm_output": True}),
    "five-taps": Case(taps=5, config={"eagle_aux_hidden_state_layer_ids": [1, 2, 4, 5, 7]}),
    "sliding": Case(
        windows=[17], layer={"layer_types": ["sliding_attention"], "sliding_window": 17, "use_sliding_window": True}
    ),
    "speculators": Case(speculators=True),
    "speculators-after": Case(speculators=True, flags={"norm_before_residual": False, "norm_output": True}),
    "speculators-qwen3": Case(
        Sizes(layers=1, qk_norm=True), speculators=True, norms="input", flags={"norm_before_fc": True}
    ),
    "speculators-deep": Case(
        Sizes(layers=2),
        speculators=True,
        windows=[0, 20],
        layer={"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 20},
    ),
}


def features(taps, count=KNOWN):
    return 3 * Random(7).matrix(count, taps * TARGET.hidden) + 0.5


def check(case, target, folder, prompt=70, width=7):
    """Logits at every known position, then of drafts that are fed with the drafter's own hidden."""
    tensors = case.write(folder)
    model, draft = loaded(folder, target)
    plain, ids, cache = case.plain(tensors, model), tokens(KNOWN + STEPS, seed=4), new_cache(draft)
    fused = plain.fused(features(case.taps))
    found = hidden_of(draft, ids[:KNOWN], features(case.taps), prompt, width, cache)
    hidden = plain.hidden(ids[:KNOWN], fused)
    compare(draft, tensors, found, plain.logits(hidden))
    beside, last = fused, found[-1:]
    for step in range(STEPS):  # each row has what came out of the one before
        beside = torch.cat((beside, plain.fed(hidden)[-1:]))
        hidden = plain.hidden(ids[: KNOWN + step + 1], beside)
        last = passed(draft, ids[KNOWN + step : KNOWN + step + 1], last.clone(), KNOWN + step, cache)
        compare(draft, tensors, last, plain.logits(hidden)[-1:])


def compare(draft, tensors, hidden, expected):
    found = logits_of(draft, hidden)
    assert found.shape == (len(hidden), TARGET.vocab)
    if "d2t" in tensors:
        known = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
        assert tensors["t2d"].nonzero().flatten().tolist() == known.tolist()
        others = torch.ones(TARGET.vocab, dtype=torch.bool).index_fill_(0, known, value=False)
        assert (found[:, others] == ABSENT).all()
        found = found[:, known]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_head_is_that_of_plain_torch(name, target, tmp_path):
    check(CASES[name], target, tmp_path)


@pytest.mark.parametrize(("prompt", "width"), [(0, 1), (0, 16), (64, 16), (89, 1)])
def test_absorbed_in_any_parts(prompt, width, target, tmp_path):
    check(CASES["speculators"], target, tmp_path, prompt, width)


def planted_rope(monkeypatch):
    right = module.rope_table
    wrong = lambda rope, dim, count: right(dataclasses.replace(rope, theta=2e4), dim, count)  # noqa: E731
    monkeypatch.setattr(module, "rope_table", wrong)


def planted_halves_turned(monkeypatch):
    right = module.joined
    monkeypatch.setattr(module, "joined", lambda embedded, hidden, eps: right(hidden, embedded, eps))


def planted_one_norm(monkeypatch):
    def wrong(embedded, hidden, eps):
        both = torch.cat((embedded, hidden), dim=1)
        return torch.nn.functional.pad(both * torch.rsqrt(both.square().mean(1, keepdim=True) + eps), (0, 8))

    monkeypatch.setattr(module, "joined", wrong)


def planted_residual_embedding(monkeypatch):
    right = module.Eagle._attend

    def wrong(self, attention, x, residual, rows, kv):
        return right(self, attention, x, x[:, : residual.shape[1]].clone(), rows, kv)

    monkeypatch.setattr(module.Eagle, "_attend", wrong)


def planted_flag(name):
    def plant(monkeypatch):
        right = module.Eagle.__init__

        def wrong(self, spec, target, context):
            right(self, dataclasses.replace(spec, **{name: not getattr(spec, name)}), target, context)

        monkeypatch.setattr(module.Eagle, "__init__", wrong)

    plant.__name__ = f"planted_{name}"
    return plant


def planted_ids_not_mapped(monkeypatch):
    monkeypatch.setattr(module, "_targets", lambda checkpoint, spec, *_: torch.arange(len(checkpoint.raw("d2t"))))


def planted_features_turned(monkeypatch):
    right = module.Eagle.fuse
    monkeypatch.setattr(module.Eagle, "fuse", lambda self, x: right(self, x.roll(TARGET.hidden, dims=1)))


PLANTS = [
    planted_rope,
    planted_halves_turned,
    planted_one_norm,
    planted_residual_embedding,
    planted_flag("norm_before_residual"),
    planted_flag("norm_output"),
    planted_ids_not_mapped,
    planted_features_turned,
]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_planted_bugs_are_seen(plant, target, tmp_path, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(CASES["original"], target, tmp_path)


IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.mark.parametrize(
    ("config", "taps"),
    [
        ({}, (1, 3, 4)),  # what goes into blocks 2, n/2 and n − 3 of 8
        ({IDS: [1, 4, 8]}, (0, 3, 7)),
        ({"eagle_config": {"layer_ids": [2, 3, 6]}}, (1, 2, 5)),
        ({"eagle_config": {IDS: [1, 3, 7]}}, (1, 3, 7)),  # SpecForge: what comes out
        ({IDS: [3, 4, 5], "eagle_config": {IDS: [0, 1, 2]}}, (2, 3, 4)),
        ({IDS: [], "eagle_config": {IDS: None}}, (1, 3, 4)),
    ],
)
def test_features_are_taken_where_the_config_says(config, taps, target, tmp_path):
    Case(config=config).write(tmp_path)
    found = read(tmp_path, target)
    assert found.taps == taps
    assert any("no eagle_aux_hidden_state_layer_ids" in note for note in found.notes) == (taps == (1, 3, 4))


def test_flags_may_stand_in_eagle_config(target, tmp_path):
    Case(norms="input", config={"eagle_config": {"norm_before_fc": True}}).write(tmp_path)
    assert read(tmp_path, target).norm_before_fc


def test_a_short_context_is_that_of_the_target(target, tmp_path):
    Case(layer={"max_position_embeddings": 128}).write(tmp_path)
    found = read(tmp_path, target)
    assert found.context == 512
    assert any("max_position_embeddings is 128" in note for note in found.notes)


def test_what_is_said_of_a_head(target, tmp_path):
    Case(config={IDS: [2, 4, 6]}).write(tmp_path)
    found = read(tmp_path, target)
    assert (found.kind, found.shift, found.block, found.features, found.hidden) == ("eagle", 1, 1, 192, 64)
    assert found.notes == ()

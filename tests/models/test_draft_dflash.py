"""DFlash drafters against plain torch: whole blocks over contexts of features, in each attention mode; planted bugs."""

import dataclasses

import pytest
import torch
from drafts import (
    TARGET,
    Random,
    Sizes,
    absorb,
    block_of,
    by_steps,
    dflash_config,
    dflash_tensors,
    loaded,
    logits_of,
    new_cache,
    passed,
    read,
    save,
    write_target,
)
from parity import PAGE, rows, tokens
from plain_drafts import DFlash

from fwd.kernels.rows import Cells
from fwd.models.draft import dflash as module

LAYERS = 3
SIZES = Sizes(layers=LAYERS, head_dim=24, qk_norm=True, theta=1e6)
KNOWN, BLOCK, MASK = 90, 8, 259
SPARE = 23  # a page of no sequence
FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = [SLIDING, FULL, SLIDING]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


@dataclasses.dataclass
class Case:
    """A drafter as it is written, and what its config means."""

    sizes: Sizes = SIZES
    taps: int = 3
    sinks: bool = False
    config: dict = dataclasses.field(default_factory=dict)
    own: dict = dataclasses.field(default_factory=dict)  # in dflash_config
    causal: tuple = (False,) * LAYERS
    windows: tuple = (0,) * LAYERS

    def write(self, folder):
        ids = {3: (1, 3, 5), 2: (0, 7)}[self.taps]
        config = dflash_config(self.sizes, ids=ids, block=BLOCK, own=self.own, **self.config)
        return save(folder, config, dflash_tensors(self.sizes, taps=self.taps, sinks=self.sinks))

    def plain(self, tensors, model):
        embedding, head = model.embedding.dequantize(), model.head.dequantize()
        return DFlash(
            tensors,
            self.sizes,
            embedding,
            head,
            causal=self.causal,
            windows=self.windows,
            block=BLOCK,
            sinks=self.sinks,
        )


CASES = {
    "whole": Case(),
    "two-taps": Case(taps=2),
    "bias": Case(dataclasses.replace(SIZES, bias=True)),
    "causal": Case(own={"causal": True}, causal=(True,) * LAYERS),
    "is-causal": Case(config={"is_causal": True}, own={"causal": False}, causal=(True,) * LAYERS),
    "sliding-is-causal": Case(
        config={"layer_types": MIXED, "sliding_window": 20}, causal=(True, False, True), windows=(20, 0, 20)
    ),
    "sliding-is-not": Case(
        config={"layer_types": MIXED, "sliding_window": 20, "is_causal": False}, windows=(20, 0, 20)
    ),
    "all-slide": Case(own={"use_swa": True, "swa_window_size": 33}, windows=(33,) * LAYERS),
    "sinks": Case(sinks=True, own={"attention_sink_bias": True}),
}


@torch.inference_mode()
def check(case, target, folder, prompt=70, width=7):
    """Blocks of several lengths, and a block once some of the one before are known."""
    tensors = case.write(folder)
    model, draft = loaded(folder, target)
    plain, cache = case.plain(tensors, model), new_cache(draft)
    features = 3 * Random(7).matrix(KNOWN + 20, draft.spec.features) + 0.5
    absorb(draft, features[:KNOWN], prompt, width, cache)
    anchors = tokens(4, seed=4)
    for anchor, length in zip(anchors[:3], (BLOCK, 3, 1), strict=True):
        compare(draft, plain, anchor, length, features[:KNOWN], cache)
    fused = by_steps(draft.fuse, features[KNOWN : KNOWN + 5])
    passed(draft, torch.zeros(5, dtype=torch.int64), fused, KNOWN, cache, run="absorb")
    compare(draft, plain, anchors[3], BLOCK, features[: KNOWN + 5], cache)


def compare(draft, plain, anchor, length, features, cache):
    ids = torch.tensor([int(anchor)] + [draft.spec.mask] * (length - 1))
    found = logits_of(draft, block_of(draft, ids, len(features), cache))
    torch.testing.assert_close(found, plain.logits(ids, features), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_block_is_that_of_plain_torch(name, target, tmp_path):
    check(CASES[name], target, tmp_path)


@pytest.mark.parametrize(("prompt", "width"), [(0, 1), (0, 16), (64, 16), (90, 1)])
def test_absorbed_in_any_parts(prompt, width, target, tmp_path):
    check(CASES["sliding-is-causal"], target, tmp_path, prompt, width)


@torch.inference_mode()
def test_blocks_of_two_sequences_see_their_own(target, tmp_path):
    CASES["whole"].write(tmp_path)
    _, draft = loaded(tmp_path, target)
    cache, known = new_cache(draft), 12
    absorb(draft, 3 * Random(7).matrix(known, draft.spec.features), 0, 16, cache)
    blocks = torch.tensor([[5, MASK, MASK, MASK], [77, MASK, MASK, MASK]])
    alone = [block_of(draft, ids, known, cache) for ids in blocks]
    one = rows(known, known + 4)
    for layer in cache.layers:
        layer.copy(int(one.cells[layer.group].tables[0, 0]), SPARE)
    both = dataclasses.replace(
        one,
        positions=one.positions.repeat(2),
        sequences=torch.tensor([0] * 4 + [1] * 4),
        parents=one.parents.repeat(2),
        cells=tuple(map(with_second, one.cells)),
    )
    found = draft.draft(blocks.flatten(), torch.full((8,), known + 3), both, cache)
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-5)


def with_second(cells):
    """The same with a second sequence, whose first page is another."""
    tables = cells.tables.repeat(2, 1)
    tables[1, 0] = SPARE
    return Cells(torch.cat((cells.slots, SPARE * PAGE + cells.slots % PAGE)), tables)


def planted_window_from_the_row(monkeypatch):
    right = module.replace

    def wrong(thing, **fields):
        return thing if set(fields) == {"window"} else right(thing, **fields)

    monkeypatch.setattr(module, "replace", wrong)


def planted_causal(monkeypatch):
    right = module.DFlash.__init__

    def wrong(self, spec, target, context):
        right(self, dataclasses.replace(spec, causal=tuple(not each for each in spec.causal)), target, context)

    monkeypatch.setattr(module.DFlash, "__init__", wrong)


def planted_rope(monkeypatch):
    right = module.rope_table
    wrong = lambda rope, dim, count: right(dataclasses.replace(rope, theta=1e4), dim, count)  # noqa: E731
    monkeypatch.setattr(module, "rope_table", wrong)


def planted_context_by_the_layers_norm(monkeypatch):
    right = module.DFlash._take

    def wrong(self, weights):
        right(self, weights)
        self._layers = [dataclasses.replace(layer, context=layer.attention.qkv) for layer in self._layers]

    monkeypatch.setattr(module.DFlash, "_take", wrong)


def planted_no_sinks(monkeypatch):
    right = module.take_attention
    wrong = lambda weights, prefix: dataclasses.replace(right(weights, prefix), sinks=None)  # noqa: E731
    monkeypatch.setattr(module, "take_attention", wrong)


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (planted_window_from_the_row, "all-slide"),
        (planted_causal, "whole"),
        (planted_causal, "sliding-is-causal"),
        (planted_rope, "whole"),
        (planted_context_by_the_layers_norm, "whole"),
        (planted_no_sinks, "sinks"),
    ],
    ids=lambda each: each if isinstance(each, str) else each.__name__,
)
def test_planted_bugs_are_seen(plant, name, target, tmp_path, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(CASES[name], target, tmp_path)


@pytest.mark.parametrize(
    ("layers", "taps"),
    [(1, (4,)), (2, (1, 5)), (3, (1, 3, 5)), (5, (1, 2, 3, 4, 5))],
)
def test_features_are_taken_evenly_where_no_config_says(layers, taps, target, tmp_path):
    sizes = dataclasses.replace(SIZES, layers=layers)
    config = dflash_config(sizes)
    del config["dflash_config"]["target_layer_ids"]
    save(tmp_path, config, dflash_tensors(sizes, taps=len(taps)))
    assert read(tmp_path, target).taps == taps


def test_a_block_no_step_holds_is_cut(target, tmp_path):
    save(tmp_path, dflash_config(SIZES, block=32), dflash_tensors(SIZES))
    found = read(tmp_path, target)
    assert found.block == 16
    assert any("block_size is 32" in note for note in found.notes)


def test_what_is_said_of_a_drafter(target, tmp_path):
    CASES["sliding-is-causal"].write(tmp_path)
    found = read(tmp_path, target)
    assert (found.kind, found.shift, found.block, found.mask) == ("dflash", 1, BLOCK, MASK)
    assert (found.features, found.hidden, found.context) == (3 * TARGET.hidden, TARGET.hidden, 512)
    assert [(layout.layers, layout.window) for layout in found.cache] == [((0, 2), 20), ((1,), 0)]
    assert found.notes == ()

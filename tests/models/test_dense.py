"""The dense family against `transformers` on random checkpoints: prefill on the chunk grid, then decode steps."""

import itertools
from pathlib import Path

import checkpoints
import parity
import pytest
import torch
from parity import PAGE, PROMPT, TOTAL, logits_of, tokens

from fwd.kernels import attention
from fwd.models.layout import KV_ITEMSIZE, groups
from fwd.models.load import load

MIXED = ("qwen2-sliding", "qwen3-sliding", "long")  # full and sliding layers


@pytest.fixture(scope="module", params=sorted(checkpoints.DENSE))
def folder(request, tmp_path_factory):
    return parity.pair(request.param, tmp_path_factory.mktemp(request.param))


def test_float32_logprobs_agree_with_transformers(folder):
    parity.check_logprobs(*folder)


def test_greedy_tokens_are_those_of_transformers(folder):
    parity.check_greedy(*folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", *MIXED])
def test_steps_of_any_width_give_the_same_bits(kind, dtype, tmp_path):
    checkpoints.make(kind, tmp_path, seed=4)
    parity.check_steps_of_any_width(load(tmp_path, dtype=dtype))


def test_pieces_of_a_context_agree_with_the_whole(folder, monkeypatch):
    path, _ = folder
    model = load(path, dtype="float32")
    ids = tokens(TOTAL, seed=7)
    whole = logits_of(model, ids, PROMPT, 16).log_softmax(-1)
    monkeypatch.setattr(attention, "PIECE", 16)
    torch.testing.assert_close(logits_of(model, ids, PROMPT, 16).log_softmax(-1), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kv", KV_ITEMSIZE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", *MIXED])
def test_a_prefill_that_begins_behind_a_cached_prefix_gives_the_same_bits(kind, dtype, kv, tmp_path):
    checkpoints.make(kind, tmp_path, seed=8)
    parity.check_warm_prefill(load(tmp_path, dtype=dtype), kv)


@pytest.mark.parametrize(
    ("dtype", "kv", "bound"), [("bfloat16", "bfloat16", 1e-3), ("float32", "bfloat16", 1e-4), ("bfloat16", "fp8", 1e-2)]
)
def test_narrow_dtypes_stay_near_float32(folder, dtype, kv, bound):
    parity.check_near_float32(folder[0], dtype, kv, bound)


def test_weight_bytes_are_those_of_the_checkpoint(folder):
    path, reference = folder
    spec = load(path, dtype="bfloat16").spec
    assert spec.weight_bytes() == 2 * sum(parameter.numel() for parameter in reference.parameters())
    assert spec.step_bytes(1, 0, "fp8") - spec.step_bytes(0, 0, "fp8") == 2 * spec.hidden
    keys = sum(min(100, window or 100) for window in spec.windows)
    for kv, head in (("float32", 4 * spec.head_dim), ("bfloat16", 2 * spec.head_dim), ("fp8", spec.head_dim + 4)):
        assert spec.kv_bytes(100, kv) == keys * 2 * spec.kv_heads * head
        assert spec.step_bytes(2, 100, kv) - spec.step_bytes(2, 0, kv) == 2 * spec.kv_bytes(100, kv)


@pytest.mark.parametrize("kv", KV_ITEMSIZE)
def test_the_cache_is_as_large_as_planned(folder, kv):
    spec, model = load(folder[0]).spec, load(folder[0])
    plan = groups(spec.cache)
    units = [7, 3][: len(plan)]
    cache = model.new_cache(units, PAGE, kv)
    tensors = [x for each in cache.layers for x in (each.keys, each.values, each.key_scales, each.value_scales)]
    tensors = [x for x in tensors if x is not None]
    planned = sum(count * group.unit_bytes(PAGE, kv) for count, group in zip(units, plan, strict=True))
    assert sum(x.nbytes for x in tensors) == planned
    arenas = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert sum(arenas.values()) == planned
    places = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places)), "layers overlap"


def test_every_layer_finds_its_group(folder):
    model = load(folder[0])
    plan = groups(model.spec.cache)
    cache = model.new_cache(range(5, 5 + len(plan)), PAGE, "bfloat16")
    assert [kv.window for kv in cache.layers] == list(model.spec.windows)
    for index, kv in enumerate(cache.layers):
        assert any(index in layout.layers for layout in plan[kv.group].layouts)
        assert kv.keys.shape == ((5 + kv.group) * PAGE, model.spec.kv_heads, model.spec.head_dim)


def test_the_cache_takes_no_memory_before_it_is_written(tmp_path):
    checkpoints.make("llama", tmp_path)
    model = load(tmp_path, dtype="float32")
    before = resident_bytes()
    cache = model.new_cache([1 << 16], PAGE, "float32")
    size = sum(kv.keys.nbytes + kv.values.nbytes for kv in cache.layers)
    assert size == model.spec.kv_bytes(2**20, "float32")
    assert resident_bytes() - before < size / 10


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

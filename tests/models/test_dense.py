"""The cache of the dense family: as large as planned, every layer in its group, no memory before it is written."""

import itertools
from pathlib import Path

import checkpoints
import pytest
from kinds import DENSE
from parity import PAGE

from fwd.models.layout import KV_ITEMSIZE, groups
from fwd.models.load import load


@pytest.mark.parametrize("kv", KV_ITEMSIZE)
@pytest.mark.parametrize("kind", DENSE)
def test_the_cache_is_as_large_as_planned(kind, kv, pair):
    model = load(pair(kind)[0])
    plan = groups(model.spec.cache)
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


@pytest.mark.parametrize("kind", DENSE)
def test_every_layer_finds_its_group(kind, pair):
    model = load(pair(kind)[0])
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

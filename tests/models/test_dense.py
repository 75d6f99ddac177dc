"""The dense family against `transformers` on random checkpoints: prefill on the chunk grid, then decode steps."""

import itertools
from pathlib import Path

import checkpoints
import pytest
import torch

from fwd.kernels import attention
from fwd.kernels.ops import Draw
from fwd.kernels.rows import Cells, Rows
from fwd.models.layout import KV_ITEMSIZE, groups
from fwd.models.load import load

CHUNK, PAGE = 32, 16
PAGES = [5, 6, 7, 3, 9, 1, 2, 20, 21, 14]
PROMPT, TOTAL = 75, 140
MIXED = ("qwen2-sliding", "qwen3-sliding", "long")  # full and sliding layers


@pytest.fixture(scope="module", params=sorted(checkpoints.KINDS))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    checkpoints.make(request.param, path, seed=3)
    return path, checkpoints.build(request.param, seed=3)


def rows(start, end, *, chunk=-1, first=0, valid=TOTAL):
    """Rows at positions start…end−1; those before `first` and from `valid` on are padding. Groups differ in pages."""
    positions = torch.arange(start, end)
    live = (positions >= first) & (positions < valid)
    cells = []
    for pages in (PAGES, PAGES[::-1]):
        table = torch.tensor([pages])
        slots = torch.where(live, table[0][positions // PAGE] * PAGE + positions % PAGE, -1)
        cells.append(Cells(slots, table.int()))
    parents = torch.full_like(positions, -1)
    return Rows(positions, torch.where(live, 0, -1), parents, tuple(cells), chunk=chunk)


def new_cache(model, kv="float32"):
    return model.new_cache([24] * len(groups(model.spec.cache)), PAGE, kv)


def prefill(model, ids, cache):
    """Hidden states of all prompt tokens, chunk by chunk."""
    parts = []
    for index in range(-(-len(ids) // CHUNK)):
        part = ids[index * CHUNK : (index + 1) * CHUNK]
        padded = torch.nn.functional.pad(part, (0, CHUNK - len(part)))
        hidden = model.forward(padded, rows(index * CHUNK, (index + 1) * CHUNK, chunk=index, valid=len(ids)), cache)
        parts.append(hidden[: len(part)])
    return torch.cat(parts)


def logits_of(model, ids, prompt, width, kv="float32"):
    """Logits after every token: the prompt in chunks, the rest `width` rows a step."""
    cache = new_cache(model, kv)
    parts = [prefill(model, ids[:prompt], cache)]
    for start in range(prompt, len(ids), width):
        part = ids[start : start + width]
        parts.append(model.forward(part, rows(start, start + len(part)), cache))
    return torch.cat([model.logits(part) for part in torch.cat(parts).split(16)])


def test_float32_logprobs_agree_with_transformers(folder):
    path, reference = folder
    model = load(path, dtype="float32")
    ids = torch.randint(0, 256, (TOTAL,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0].log_softmax(-1)
    for width in (1, 16):
        found = logits_of(model, ids, PROMPT, width).log_softmax(-1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_greedy_tokens_are_those_of_transformers(folder):
    path, reference = folder
    model = load(path, dtype="float32")
    prompt = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(2))
    expected = reference.generate(
        prompt[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=60,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0]
    cache = new_cache(model)
    hidden, ids = prefill(model, prompt, cache)[-1:], prompt.tolist()
    while len(ids) < 100:
        ids += model.ops.sample(model.logits(hidden), [Draw(temperature=0.0)]).ids.tolist()
        hidden = model.forward(torch.tensor(ids[-1:]), rows(len(ids) - 1, len(ids)), cache)
    assert ids == expected.tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", *MIXED])
def test_steps_of_any_width_give_the_same_bits(kind, dtype, tmp_path):
    checkpoints.make(kind, tmp_path, seed=4)
    model = load(tmp_path, dtype=dtype)
    ids = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(5))
    single = logits_of(model, ids, 64, 1)
    assert single.dtype == torch.float32
    for width in (3, 7, 16):
        assert torch.equal(logits_of(model, ids, 64, width), single), width


def test_pieces_of_a_context_agree_with_the_whole(folder, monkeypatch):
    path, _ = folder
    model = load(path, dtype="float32")
    ids = torch.randint(0, 256, (TOTAL,), generator=torch.Generator().manual_seed(7))
    whole = logits_of(model, ids, PROMPT, 16).log_softmax(-1)
    monkeypatch.setattr(attention, "PIECE", 16)
    torch.testing.assert_close(logits_of(model, ids, PROMPT, 16).log_softmax(-1), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kv", KV_ITEMSIZE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", *MIXED])
def test_a_prefill_that_begins_behind_a_cached_prefix_gives_the_same_bits(kind, dtype, kv, tmp_path):
    checkpoints.make(kind, tmp_path, seed=8)
    model, ids = load(tmp_path, dtype=dtype), torch.arange(3 * CHUNK) * 7 % 250
    cache = new_cache(model, kv)
    cold = prefill(model, ids, cache)[-CHUNK:]
    for first in (2 * CHUNK, 2 * CHUNK + 5, 3 * CHUNK - 1):
        part = torch.where(torch.arange(2 * CHUNK, 3 * CHUNK) >= first, ids[-CHUNK:], 0)
        warm = model.forward(part, rows(2 * CHUNK, 3 * CHUNK, chunk=2, first=first), cache)
        assert torch.equal(warm[first - 2 * CHUNK :], cold[first - 2 * CHUNK :]), first


@pytest.mark.parametrize(
    ("dtype", "kv", "bound"), [("bfloat16", "bfloat16", 1e-3), ("float32", "bfloat16", 1e-4), ("bfloat16", "fp8", 1e-2)]
)
def test_narrow_dtypes_stay_near_float32(folder, dtype, kv, bound):
    path, _ = folder
    ids = torch.randint(0, 256, (80,), generator=torch.Generator().manual_seed(6))
    exact = logits_of(load(path, dtype="float32"), ids, 64, 16)
    rounded = logits_of(load(path, dtype=dtype), ids, 64, 16, kv)
    error = 1 - 2 * (exact * rounded).sum() / (exact.square().sum() + rounded.square().sum())
    assert error < bound, error


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

"""The dense family against `transformers` on random checkpoints: prefill on the chunk grid, then decode steps."""

from pathlib import Path

import checkpoints
import pytest
import torch

from fwd.kernels.ops import Draw, Rows
from fwd.models.load import load

CHUNK, PAGE = 32, 16
PAGES = [5, 6, 7, 3, 9, 1, 2, 20, 21, 14]
PROMPT, TOTAL = 75, 140


@pytest.fixture(scope="module", params=sorted(checkpoints.KINDS))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    checkpoints.make(request.param, path, seed=3)
    return path, checkpoints.build(request.param, seed=3)


def rows(start, end, *, chunk=-1, valid=TOTAL):
    positions, table = torch.arange(start, end), torch.tensor([PAGES])
    cells = table[0][positions // PAGE] * PAGE + positions % PAGE
    slots = torch.where(positions < valid, cells, -1)
    return Rows(positions, slots, torch.zeros_like(positions), table, torch.full_like(positions, -1), chunk)


def prefill(model, ids, cache):
    """Hidden states of all prompt tokens, chunk by chunk."""
    parts = []
    for index in range(-(-len(ids) // CHUNK)):
        part = ids[index * CHUNK : (index + 1) * CHUNK]
        padded = torch.nn.functional.pad(part, (0, CHUNK - len(part)))
        hidden = model.forward(padded, rows(index * CHUNK, (index + 1) * CHUNK, chunk=index, valid=len(ids)), cache)
        parts.append(hidden[: len(part)])
    return torch.cat(parts)


def logits_of(model, ids, prompt, width):
    """Logits after every token: the prompt in chunks, the rest `width` rows a step."""
    cache = model.new_cache(24, PAGE)
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
    model, cache = load(path, dtype="float32"), None
    prompt = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(2))
    expected = reference.generate(
        prompt[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=60,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0]
    cache = model.new_cache(24, PAGE)
    hidden, ids = prefill(model, prompt, cache)[-1:], prompt.tolist()
    while len(ids) < 100:
        ids += model.ops.sample(model.logits(hidden), [Draw(temperature=0.0)]).ids.tolist()
        hidden = model.forward(torch.tensor(ids[-1:]), rows(len(ids) - 1, len(ids)), cache)
    assert ids == expected.tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_steps_of_any_width_give_the_same_bits(kind, dtype, tmp_path):
    checkpoints.make(kind, tmp_path, seed=4)
    model = load(tmp_path, dtype=dtype)
    ids = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(5))
    single = logits_of(model, ids, 64, 1)
    assert single.dtype == torch.float32
    for width in (3, 7, 16):
        assert torch.equal(logits_of(model, ids, 64, width), single), width


def test_bfloat16_stays_near_float32(folder):
    path, _ = folder
    ids = torch.randint(0, 256, (80,), generator=torch.Generator().manual_seed(6))
    exact, rounded = (logits_of(load(path, dtype=dtype), ids, 64, 16) for dtype in ("float32", "bfloat16"))
    error = 1 - 2 * (exact * rounded).sum() / (exact.square().sum() + rounded.square().sum())
    assert error < 1e-3, error


def test_weight_bytes_are_those_of_the_checkpoint(folder):
    path, reference = folder
    spec = load(path, dtype="bfloat16").spec
    assert spec.weight_bytes() == 2 * sum(parameter.numel() for parameter in reference.parameters())
    assert spec.kv_bytes_per_token() == 2 * 2 * 2 * 2 * spec.head_dim
    assert spec.step_bytes(1, 0) - spec.step_bytes(0, 0) == 2 * spec.hidden
    assert spec.step_bytes(2, 100) - spec.step_bytes(2, 0) == 200 * spec.kv_bytes_per_token()


def test_the_cache_takes_no_memory_before_it_is_written(tmp_path):
    checkpoints.make("llama", tmp_path)
    model = load(tmp_path, dtype="float32")
    before = resident_bytes()
    cache = model.new_cache(1 << 16, PAGE)
    size = sum(kv.keys.nbytes + kv.values.nbytes for kv in cache.layers)
    assert size == 2**20 * model.spec.kv_bytes_per_token()
    assert resident_bytes() - before < size / 10


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

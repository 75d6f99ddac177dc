"""A model against `transformers` in float32, and against itself: prefill on the chunk grid, then decode steps."""

import checkpoints
import torch

from fwd.kernels.ops import Draw
from fwd.kernels.rows import Cells, Rows
from fwd.models.layout import groups
from fwd.models.load import load

CHUNK, PAGE = 32, 16
PAGES = [5, 6, 7, 3, 9, 1, 2, 20, 21, 14]
PROMPT, TOTAL = 75, 140


def pair(kind, folder, seed=3):
    """The folder of a random checkpoint of `kind`, and the model of `transformers` that it holds."""
    checkpoints.make(kind, folder, seed=seed)
    return folder, checkpoints.build(kind, seed=seed)


def tokens(count, seed):
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


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
    parts = [prefill(model, ids[:prompt], cache)] if prompt else []
    for start in range(prompt, len(ids), width):
        part = ids[start : start + width]
        parts.append(model.forward(part, rows(start, start + len(part)), cache))
    return torch.cat([model.logits(part) for part in torch.cat(parts).split(16)])


def check_logprobs(folder, reference):
    """Log-probabilities at every position agree: chunks then single rows, chunks then 16 rows, single rows alone."""
    model, ids = load(folder, dtype="float32"), tokens(TOTAL, seed=1)
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0].float().log_softmax(-1)
    for prompt, width in ((PROMPT, 1), (PROMPT, 16), (0, 1)):
        found = logits_of(model, ids, prompt, width).log_softmax(-1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def check_greedy(folder, reference):
    """60 greedy tokens after a prompt of 40 are the same ones."""
    model, prompt = load(folder, dtype="float32"), tokens(40, seed=2)
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


def check_steps_of_any_width(model):
    """Decode steps of 1, 3, 7 and 16 rows give the same bits."""
    ids = tokens(100, seed=5)
    single = logits_of(model, ids, 64, 1)
    assert single.dtype == torch.float32
    for width in (3, 7, 16):
        assert torch.equal(logits_of(model, ids, 64, width), single), width


def check_warm_prefill(model, kv="float32"):
    """A prefill that begins behind a cached prefix gives the bits of a cold one."""
    ids, cache = torch.arange(3 * CHUNK) * 7 % 250, new_cache(model, kv)
    cold = prefill(model, ids, cache)[-CHUNK:]
    for first in (2 * CHUNK, 2 * CHUNK + 5, 3 * CHUNK - 1):
        part = torch.where(torch.arange(2 * CHUNK, 3 * CHUNK) >= first, ids[-CHUNK:], 0)
        warm = model.forward(part, rows(2 * CHUNK, 3 * CHUNK, chunk=2, first=first), cache)
        assert torch.equal(warm[first - 2 * CHUNK :], cold[first - 2 * CHUNK :]), first


def check_near_float32(folder, dtype, kv, bound):
    """Logits of a narrower dtype stay near: 1 − 2Σxy/(Σx² + Σy²) is below the bound."""
    assert off(*in_two_dtypes(folder, dtype, kv)) < bound


def check_mostly_near_float32(folder, dtype, kv, bound, *, share):
    """The same of a share of the rows: where experts are chosen a rounding may choose another one."""
    errors = [off(*rows) for rows in zip(*in_two_dtypes(folder, dtype, kv), strict=True)]
    assert sorted(errors)[int(share * len(errors))] < bound, errors


def in_two_dtypes(folder, dtype, kv):
    ids = tokens(80, seed=6)
    exact = logits_of(load(folder, dtype="float32"), ids, 64, 16)
    return exact, logits_of(load(folder, dtype=dtype), ids, 64, 16, kv)


def off(exact, rounded):
    return float(1 - 2 * (exact * rounded).sum() / (exact.square().sum() + rounded.square().sum()))

"""Attention by the reference, over any window, cache and pieces: the right numbers, and the same bits every time."""

import math
import random

import pytest
import torch
from blocks import DTYPES, KV_DTYPES, PAGE, SHAPES, Block, chunk_rows, decode_rows, same_bits, scattered_tables

from fwd.kernels import attention, paged

WINDOWS = (0, 1, 5, 33)
FEW = (SHAPES[1], SHAPES[3])  # odd, wide
CHUNK, END = 24, 68  # a chunk begins at no page's multiple of anything; the last one is cut


@pytest.fixture(params=["one", "many", "longer"])
def pieces(request, monkeypatch):
    """One piece, pieces of 8 keys, or at most three pieces of growing length."""
    if request.param != "one":
        monkeypatch.setattr(attention, "PIECE", 8)
    if request.param == "longer":
        monkeypatch.setattr(attention, "PIECES", 3)
        monkeypatch.setattr(attention, "GRAIN", 4)
    return request.param


def seen(position, window):
    return range(max(0, position + 1 - window) if window else 0, position + 1)


def forget(table, first):
    """A line of a block table whose pages before position `first` were given back: anything may stand there."""
    out = table.clone()
    out[:, : first // PAGE] = -1
    return out


def stored(kv, cells):
    """Keys and values of cells in float64."""
    keys, values = kv.keys[cells].double(), kv.values[cells].double()
    if kv.key_scales is None:
        return keys, values
    return keys * kv.key_scales[cells].double()[..., None], values * kv.value_scales[cells].double()[..., None]


def expected(q, kv, table, position, sinks=None):
    """The definition, in float64, of one row's attention: q [heads, head_dim]."""
    places = torch.tensor(list(seen(position, kv.window)))
    keys, values = stored(kv, table[places // PAGE] * PAGE + places % PAGE)  # [cells, kv_heads, head_dim]
    grouped = q.double().view(keys.shape[1], -1, q.shape[-1])
    scores = torch.einsum("hgd,chd->hgc", grouped, keys) / q.shape[-1] ** 0.5
    if sinks is not None:  # as keys without a value
        scores = torch.cat((scores, sinks.double().view(*scores.shape[:2], 1)), dim=-1)
    weights = scores.softmax(-1)[..., : len(places)]
    return torch.einsum("hgc,chd->hgd", weights, values).reshape(-1)


def filled(block, table, kv, count):
    """Write positions 0…count−1 of sequence 0 by decode steps."""
    for start in range(0, count, 16):
        places = [(0, p) for p in range(start, min(start + 16, count))]
        block.run(block.random(len(places), block.shape[0]), decode_rows(places, table), kv)


def worst_error(shape, dtype, kv_dtype, window):
    """The largest difference of decode and prefill rows from the definition, over its largest number."""
    block, table = Block(shape, dtype, seed=21), scattered_tables(1, 20, seed=22)
    kv = block.cache(20, kv=kv_dtype, window=window)
    filled(block, table, kv, 2 * CHUNK)
    rows = chunk_rows(2, CHUNK, END, table)
    block.ops.qkv(block.random(CHUNK, shape[0]), block.layer, block.rope, rows, kv)
    q, live = block.random(CHUNK, shape[1], shape[3]), END - 2 * CHUNK
    chunk = block.ops.prefill_attention(q, rows, kv)[:live]
    steps = decode_rows([(0, 2 * CHUNK + row) for row in range(live)], table)
    block.ops._enter(steps, block.rope)
    decoded = block.ops.decode_attention(q[:live], steps, kv)
    truth = torch.stack([expected(q[row], kv, table[0], 2 * CHUNK + row) for row in range(live)])
    return max(((found - truth).abs().max() / truth.abs().max()).item() for found in (chunk, decoded))


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_rows_attend_to_their_window_of_what_is_stored(shape, dtype, kv_dtype, window, pieces):
    assert worst_error(shape, dtype, kv_dtype, window) < TOLERANCE[dtype]


def test_a_window_off_by_one_is_seen(monkeypatch, pieces):
    right = attention._first_seen
    monkeypatch.setattr(attention, "_first_seen", lambda position, window: right(position, window and window + 1))
    assert worst_error(FEW[0], torch.float32, "float32", 5) > TOLERANCE[torch.float32]


def test_a_mask_off_by_one_is_seen(monkeypatch, pieces):
    right = attention._mask
    monkeypatch.setattr(attention, "_mask", lambda q, k, window, dtype: right(q, k, window + 1, dtype))
    assert worst_error(FEW[0], torch.float32, "float32", 5) > TOLERANCE[torch.float32]


def test_the_scale_of_a_neighbour_is_seen(monkeypatch, pieces):
    right = paged._gather

    def wrong(cache, page_size, span):
        found = right(cache, page_size, span)
        return found.roll(1, 0) if cache.dim() == 2 else found

    monkeypatch.setattr(paged, "_gather", wrong)
    assert worst_error(FEW[0], torch.float32, "fp8", 0) > TOLERANCE[torch.float32]


def company_disagrees(shape, dtype, kv_dtype, window, seed):
    """The first (rows, row) that has other bits than alone, or None. Cells and pages that no row sees are poisoned."""
    block, chance = Block(shape, dtype, seed), random.Random(seed + 1)
    contexts = [chance.choice((0, 3, 4, 7, 8, 15, 31, 40, 62)) for _ in range(16)]
    whole, kv = scattered_tables(16, 16, seed + 2), block.cache(16 * 16, kv=kv_dtype, window=window)
    written = [(sequence, p) for sequence, context in enumerate(contexts) for p in range(context)]
    for start in range(0, len(written), 16):
        places = written[start : start + 16]
        block.run(block.random(len(places), shape[0]), decode_rows(places, whole), kv)
    tables = torch.cat([forget(whole[i : i + 1], seen(context, window)[0]) for i, context in enumerate(contexts)])
    hidden = block.random(16, shape[0])
    alone = [block.run(hidden[i : i + 1], decode_rows([(i, contexts[i])], tables), kv) for i in range(16)]
    assert all(row.isfinite().all() for row in alone)
    for count in (2, 3, 5, 8, 16, 16):
        order = chance.sample(range(16), count)
        together = block.run(hidden[order], decode_rows([(i, contexts[i]) for i in order], tables), kv)
        for row, index in enumerate(order):
            if not same_bits(together[row : row + 1], alone[index]):
                return count, row
    return None


@pytest.mark.parametrize("seed", [31], ids="seed{}".format)
@pytest.mark.parametrize("window", [0, 5, 33])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_a_decode_row_has_the_same_bits_alone_and_in_any_company(shape, dtype, kv_dtype, window, pieces, seed):
    assert company_disagrees(shape, dtype, kv_dtype, window, seed) is None


def test_pieces_in_order_of_arrival_are_seen(monkeypatch):
    monkeypatch.setattr(attention, "PIECE", 8)
    right, arrival = attention._attend_split, random.Random(5)

    def hasty(q, kv, pieces, sinks):
        return right(q, kv, arrival.sample(pieces, len(pieces)), sinks)

    monkeypatch.setattr(attention, "_attend_split", hasty)
    assert company_disagrees(FEW[0], torch.float32, "float32", 0, seed=31) is not None


PARENTS = (-1, 0, 0, 1, 1, 2, 5, 3)  # a tree below row 0
DEPTHS = (0, 1, 1, 2, 2, 2, 3, 3)
BRANCHES = ([0, 1, 4], [0, 2, 5, 6], [0, 1, 3, 7])


def drafted(block, kv, table, base):
    """The rows of a tree after `base` tokens; drafts stand in cells that the block table does not name there."""
    rows = decode_rows([(0, base + depth) for depth in DEPTHS], table)
    rows.parents[:] = torch.tensor(PARENTS)
    rows.cells[0].slots[1:] = torch.arange(len(kv.keys) - len(DEPTHS), len(kv.keys))[1:]
    return rows


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("base", [0, 3, 29])
@pytest.mark.parametrize("kv_dtype", ["float32", "fp8"])
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_an_accepted_branch_has_the_bits_of_the_plain_chain(shape, kv_dtype, base, window, pieces):
    block, table = Block(shape, torch.float32, seed=91), scattered_tables(1, 12, seed=92)
    plain, grown = (block.cache(16, kv=kv_dtype, window=window) for _ in range(2))
    for kv in (plain, grown):
        block.generator.manual_seed(93)
        filled(block, table, kv, base)
    hidden = block.random(len(DEPTHS), shape[0])
    tree = block.run(hidden, drafted(block, grown, table, base), grown)
    for branch in BRANCHES:
        chain = decode_rows([(0, base + depth) for depth in range(len(branch))], table)
        assert same_bits(block.run(hidden[branch], chain, plain), tree[branch]), branch


def test_a_sibling_that_is_seen_is_caught(monkeypatch):
    right = attention._branch
    monkeypatch.setattr(attention, "_branch", lambda parents, row: [max(0, x - 1) for x in right(parents, row)])
    with pytest.raises(AssertionError, match=r"\[0, 1, 4\]"):
        test_an_accepted_branch_has_the_bits_of_the_plain_chain(FEW[0], "float32", 3, 0, "one")


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_sinks_take_their_share_of_each_heads_softmax(shape, dtype, window, pieces):
    block, table = Block(shape, dtype, seed=94), scattered_tables(1, 20, seed=95)
    kv, heads = block.cache(20, window=window), shape[1]
    filled(block, table, kv, 2 * CHUNK)
    sinks = torch.linspace(-3, 4, heads)
    before = sinks.clone()
    rows = chunk_rows(1, CHUNK, 2 * CHUNK, table)
    q = block.random(CHUNK, heads, shape[3])
    steps = decode_rows([(0, CHUNK + row) for row in range(CHUNK)], table)
    for each, attend in ((rows, block.ops.prefill_attention), (steps, block.ops.decode_attention)):
        block.ops._enter(each, block.rope)
        found = attend(q, each, kv, sinks)
        truth = torch.stack([expected(q[row], kv, table[0], CHUNK + row, sinks) for row in range(CHUNK)])
        assert ((found - truth).abs().max() / truth.abs().max()).item() < TOLERANCE[dtype]
    assert torch.equal(sinks, before)


@pytest.mark.parametrize("seed", [41], ids="seed{}".format)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_a_prefill_has_the_same_bits_wherever_it_begins(shape, dtype, kv_dtype, window, pieces, seed):
    assert prefill_disagrees(shape, dtype, kv_dtype, window, seed) is None


def prefill_disagrees(shape, dtype, kv_dtype, window, seed):
    """The first row from which a prefill has other bits than one from 0, or None; what it must not read is poisoned."""
    block, table = Block(shape, dtype, seed), scattered_tables(1, 18, seed + 1)
    cold, hidden = block.cache(18, kv=kv_dtype, window=window), block.random(3 * CHUNK, shape[0])
    whole = [block.run(part, chunk_rows(i, CHUNK, END, table), cold) for i, part in enumerate(hidden.split(CHUNK))]
    for first in (1, 4, 23, 24, 25, 40, 47, 48, 60, END - 1):
        kept = [p for p in seen(first, window) if p < first]
        warm, line = behind_poison(block, cold, kv_dtype, table, kept), forget(table, seen(first, window)[0])
        for index in range(first // CHUNK, 3):
            rows = chunk_rows(index, CHUNK, END, line, first=first)
            live = rows.sequences >= 0
            part = torch.where(live[:, None], hidden[index * CHUNK : (index + 1) * CHUNK], math.nan)
            if not same_bits(block.run(part, rows, warm)[live], whole[index][live]):
                return first
    return None


def behind_poison(block, source, kv_dtype, table, kept):
    """A cache that holds the cells of positions `kept` and NaN everywhere else."""
    kv, places = block.cache(18, kv=kv_dtype, window=source.window), torch.tensor(kept, dtype=torch.int64)
    cells = table[0][places // PAGE] * PAGE + places % PAGE
    for name in ("keys", "values", "key_scales", "value_scales"):
        if (to := getattr(kv, name)) is not None:
            to[cells] = getattr(source, name)[cells]
    return kv


def test_a_cell_that_is_read_behind_the_window_is_seen(monkeypatch):
    right = attention.locate_within

    def greedy(table, page_size, wanted, known):
        return right(table, page_size, wanted, range(max(0, known.start - 1), known.stop))

    monkeypatch.setattr(attention, "locate_within", greedy)
    assert prefill_disagrees(FEW[0], torch.float32, "float32", 5, seed=41) is not None


@pytest.mark.parametrize("extent", ["start", "end"])
def test_keys_left_out_at_an_end_are_seen(monkeypatch, extent):
    right = attention.split

    def cut(start, stop):
        return right(start + 2, stop) if extent == "start" else right(start, stop - 2)

    whole = worst_error(FEW[0], torch.float32, "float32", 16)
    monkeypatch.setattr(attention, "split", cut)
    assert whole < TOLERANCE[torch.float32] < worst_error(FEW[0], torch.float32, "float32", 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_one_step_have_pages_and_windows_of_their_own(dtype, pieces):
    block, windows = Block(SHAPES[0], dtype, seed=51), (0, 7, 20)
    tables = [scattered_tables(2, 18, seed=52 + group) for group in range(3)]
    layers = [0, 1, 2, 1, 0]  # each layer's group
    hidden = block.random(2 * CHUNK, SHAPES[0][0])

    def outputs(tables, group_of):
        kvs = [block.cache(36, window=windows[group], group=group_of[group]) for group in layers]
        chunk = block.run(hidden[:CHUNK], chunk_rows(0, CHUNK, CHUNK, *tables), *kvs)
        places = [(0, CHUNK + p) for p in range(16)]
        return torch.cat((chunk, block.run(hidden[CHUNK : CHUNK + 16], decode_rows(places, *tables), *kvs)))

    apart = outputs(tables, (0, 1, 2))
    assert apart.isfinite().all()
    assert same_bits(apart, outputs([tables[2], tables[0], tables[1]], (1, 2, 0))), "groups are only names"
    assert same_bits(apart, outputs(tables[:1], (0, 0, 0))), "layers of any windows may share pages"


def test_chains_of_rows_see_what_their_step_writes(pieces):
    block, table = Block(SHAPES[0], torch.bfloat16, seed=61), scattered_tables(1, 8, seed=62)
    hidden, single, chained = block.random(16, SHAPES[0][0]), *(block.cache(8, kv="fp8", window=5) for _ in range(2))
    steps = [block.run(hidden[p : p + 1], decode_rows([(0, p)], table), single) for p in range(16)]
    assert same_bits(block.run(hidden, decode_rows([(0, p) for p in range(16)], table), chained), torch.cat(steps))

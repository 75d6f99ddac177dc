"""Attention over latents: the right numbers in both forms, and the same bits in any company, from any beginning."""

import math
import random

import pytest
import torch
from blocks import DTYPES, KV_DTYPES, PAGE, chunk_rows, decode_rows, same_bits, scattered_tables
from latents import SHAPES, WIDE, Block, expected

from fwd.kernels import attention, latent, paged
from fwd.kernels.kv import LATENT_BLOCK, KVCache

CHUNK, END = 24, 68
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=["one", "many"])
def pieces(request, monkeypatch):
    """One piece, or pieces of 8 keys."""
    if request.param == "many":
        monkeypatch.setattr(attention, "PIECE", 8)
    return request.param


def filled(block, table, kv, count):
    """Write positions 0…count−1 of sequence 0 by decode steps."""
    for start in range(0, count, 16):
        places = [(0, p) for p in range(start, min(start + 16, count))]
        block.run(block.random(len(places), block.shape[0]), decode_rows(places, table), kv)


def both_forms(shape, dtype, kv_dtype):
    """Rows of a cut chunk in the expanded form, in the absorbed form, and by the definition."""
    block, table = Block(shape, dtype, seed=21), scattered_tables(1, 20, seed=22)
    kv = block.cache(20, kv=kv_dtype)
    filled(block, table, kv, 2 * CHUNK)
    rows = chunk_rows(2, CHUNK, END, table)
    block.ops.latent_qkv(block.random(CHUNK, shape[0]), block.layer, block.rope, rows, kv)
    q, live = block.random(CHUNK, shape[1], shape[4] + shape[5]), END - 2 * CHUNK
    chunk = block.ops.prefill_latent_attention(q, block.layer, rows, kv)[:live]
    steps = decode_rows([(0, 2 * CHUNK + row) for row in range(live)], table)
    block.ops._enter(steps, block.rope)
    decoded = block.ops.decode_latent_attention(q[:live], block.layer, steps, kv)
    truth = torch.stack([expected(q[row], block.layer, kv, table[0], 2 * CHUNK + row) for row in range(live)])
    return chunk, decoded, truth


def worst(found, truth):
    return ((found - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_forms_are_softmax_attention_over_what_is_stored(shape, dtype, kv_dtype, pieces):
    chunk, decoded, truth = both_forms(shape, dtype, kv_dtype)
    assert worst(chunk, truth) < TOLERANCE[dtype]
    assert worst(decoded, truth) < TOLERANCE[dtype]
    assert worst(chunk.double(), decoded.double()) < TOLERANCE[dtype], "absorbed and expanded disagree"


def planted_unscaled(monkeypatch):
    right = latent._absorb
    monkeypatch.setattr(latent, "_absorb", lambda q, up, scale: right(q, up, scale / 1.7))


def planted_mask(monkeypatch):
    right = attention._mask
    monkeypatch.setattr(
        attention, "_mask", lambda q, k, window, dtype: right(range(q.start + 1, q.stop + 1), k, 0, dtype)
    )


def planted_scale_of_the_next_block(monkeypatch):
    right = paged._spread
    monkeypatch.setattr(paged, "_spread", lambda scales, numbers: right(scales.roll(1, -1), numbers))


def planted_head(monkeypatch):
    right = latent._expanded
    monkeypatch.setattr(latent, "_expanded", lambda up, *others: right(up.roll(1, 0), *others))


@pytest.mark.parametrize(
    "plant", [planted_unscaled, planted_mask, planted_scale_of_the_next_block, planted_head], ids=lambda f: f.__name__
)
def test_planted_bugs_are_seen(plant, monkeypatch):
    plant(monkeypatch)
    chunk, decoded, truth = both_forms(SHAPES[2], torch.float32, "fp8")
    assert max(worst(chunk, truth), worst(decoded, truth)) > 10 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_decode_row_has_the_same_bits_alone_and_in_any_company(shape, dtype, kv_dtype, pieces):
    block, chance = Block(shape, dtype, seed=31), random.Random(32)
    contexts = [chance.choice((0, 3, 4, 7, 8, 15, 31, 40)) for _ in range(16)]
    tables, kv = scattered_tables(16, 12, seed=33), block.cache(16 * 12, kv=kv_dtype)
    written = [(sequence, p) for sequence, context in enumerate(contexts) for p in range(context)]
    for start in range(0, len(written), 16):
        places = written[start : start + 16]
        block.run(block.random(len(places), shape[0]), decode_rows(places, tables), kv)
    hidden = block.random(16, shape[0])
    alone = [block.run(hidden[i : i + 1], decode_rows([(i, contexts[i])], tables), kv) for i in range(16)]
    assert all(row.isfinite().all() for row in alone)
    for count in range(2, 17):
        order = chance.sample(range(16), count)
        together = block.run(hidden[order], decode_rows([(i, contexts[i]) for i in order], tables), kv)
        for row, index in enumerate(order):
            assert same_bits(together[row : row + 1], alone[index]), (count, row, index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_torch_divides_among_threads_keep_their_bits(dtype):
    block, table, chance = Block(WIDE, dtype, seed=35), scattered_tables(16, 4, seed=36), random.Random(37)
    hidden, kv = block.random(16, WIDE[0]), block.cache(64)
    together = block.run(hidden, decode_rows([(i, 0) for i in range(16)], table), kv)
    for count in (1, 3, 7):
        order = chance.sample(range(16), count)
        assert same_bits(block.run(hidden[order], decode_rows([(i, 0) for i in order], table), kv), together[order])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_nan_and_padding_between_disturb_no_other_row(dtype):
    block, tables = Block(SHAPES[1], dtype, seed=41), scattered_tables(8, 2, seed=42)
    hidden, places = block.random(8, SHAPES[1][0]), [(sequence, 0) for sequence in range(8)]
    healthy, kv = block.run(hidden, decode_rows(places, tables), block.cache(16)), block.cache(16, stale=7.0)
    hidden[3, 5], hidden[6] = math.nan, math.inf
    rows = decode_rows(places, tables)
    rows.sequences[6] = rows.cells[0].slots[6] = -1
    ill = block.run(hidden, rows, kv)
    others = [0, 1, 2, 4, 5, 7]
    assert same_bits(ill[others], healthy[others])
    assert not ill[3].isfinite().any()
    touched = (kv.keys != 7.0).any(dim=1).nonzero().flatten().tolist()
    assert touched == sorted(rows.cells[0].slots[[0, 1, 2, 3, 4, 5, 7]].tolist())


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_chunk_that_begins_in_the_middle_has_the_bits_of_a_whole_one(shape, dtype, kv_dtype, pieces):
    block, tables = Block(shape, dtype, seed=51), (scattered_tables(1, 20, seed=52), torch.arange(20).view(1, 20))
    hidden, caches = block.random(3 * CHUNK, shape[0]), [block.cache(20, kv=kv_dtype) for _ in tables]
    for kv, table in zip(caches, tables, strict=True):
        for index in range(2):
            block.run(hidden[index * CHUNK : (index + 1) * CHUNK], chunk_rows(index, CHUNK, END, table), kv)
    cold = block.run(hidden[2 * CHUNK :], chunk_rows(2, CHUNK, 3 * CHUNK, tables[0]), caches[0])
    for first, valid in ((2 * CHUNK, END), (2 * CHUNK + 5, 3 * CHUNK), (END - 1, END)):
        part = hidden[2 * CHUNK :].clone()
        part[: first - 2 * CHUNK] = math.nan  # rows of cached tokens are padding, whatever they hold
        warm = block.run(part, chunk_rows(2, CHUNK, valid, tables[1], first=first), caches[1])
        assert same_bits(warm[first - 2 * CHUNK : valid - 2 * CHUNK], cold[first - 2 * CHUNK : valid - 2 * CHUNK])
        if first == 2 * CHUNK:  # what a later beginning finds cached
            block.run(hidden[2 * CHUNK :], chunk_rows(2, CHUNK, 3 * CHUNK, tables[1]), caches[1])


PARENTS = (-1, 0, 0, 1, 1, 2, 5, 3)  # a tree below row 0
DEPTHS = (0, 1, 1, 2, 2, 2, 3, 3)
BRANCHES = ([0, 1, 4], [0, 2, 5, 6], [0, 1, 3, 7])


@pytest.mark.parametrize("base", [0, 3, 29])
@pytest.mark.parametrize("kv_dtype", ["float32", "fp8"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_an_accepted_branch_has_the_bits_of_the_plain_chain(shape, kv_dtype, base, pieces):
    block, table = Block(shape, torch.float32, seed=91), scattered_tables(1, 12, seed=92)
    plain, grown = (block.cache(16, kv=kv_dtype) for _ in range(2))
    for kv in (plain, grown):
        block.generator.manual_seed(93)
        filled(block, table, kv, base)
    hidden = block.random(len(DEPTHS), shape[0])
    rows = decode_rows([(0, base + depth) for depth in DEPTHS], table)
    rows.parents[:] = torch.tensor(PARENTS)
    rows.cells[0].slots[1:] = torch.arange(16 * PAGE - len(DEPTHS), 16 * PAGE)[1:]
    tree = block.run(hidden, rows, grown)
    for branch in BRANCHES:
        chain = decode_rows([(0, base + depth) for depth in range(len(branch))], table)
        assert same_bits(block.run(hidden[branch], chain, plain), tree[branch]), branch


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_what_is_written_is_rounded_once_from_the_models_dtype(shape, kv_dtype):
    block, table = Block(shape, torch.float32, seed=71), scattered_tables(1, 4, seed=72)
    exact, kv = block.cache(4), block.cache(4, kv=kv_dtype)
    rows, hidden = decode_rows([(0, p) for p in range(12)], table), block.random(12, shape[0])
    for cache in (exact, kv):
        block.ops.latent_qkv(hidden, block.layer, block.rope, rows, cache)
    cells = rows.cells[0].slots
    assert torch.equal(kv.keys[cells], exact.keys[cells].to(kv.keys.dtype))
    if kv_dtype != "fp8":
        assert torch.equal(kv.latents[cells], exact.latents[cells].to(kv.latents.dtype))
        return
    for block_number, numbers in enumerate(exact.latents[cells].split(LATENT_BLOCK, dim=1)):
        scale = numbers.abs().amax(dim=1) / 448
        start = block_number * LATENT_BLOCK
        found = kv.latents[cells, start : start + numbers.shape[1]].float()
        assert torch.equal(kv.scales[cells, block_number], scale)
        assert torch.equal(found, (numbers / scale[:, None]).to(torch.float8_e4m3fn).float())


def test_a_latent_of_zeros_has_scale_1_and_reads_as_zeros():
    numbers, scales = paged.quantize_latents(torch.zeros(3, 130))
    assert scales.tolist() == [[1.0, 1.0]] * 3
    assert not numbers.float().any()


def test_a_page_is_copied_whole():
    block = Block(SHAPES[2], torch.float32, seed=81)
    kv = block.cache(4, stale=0.0, kv="fp8")
    filled(block, torch.tensor([[2]]), kv, PAGE)
    KVCache((kv,)).copy([(0, 2, 1)])
    for tensor in (kv.latents, kv.keys, kv.scales):
        numbers = tensor.float()
        assert numbers[2 * PAGE : 3 * PAGE].any()
        assert torch.equal(numbers[PAGE : 2 * PAGE], numbers[2 * PAGE : 3 * PAGE])
        assert not numbers[:PAGE].any()
        assert not numbers[3 * PAGE :].any()

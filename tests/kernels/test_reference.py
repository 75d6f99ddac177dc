"""Promise 1 at its root: a row's bits depend neither on the rows beside it, nor on its index, nor on stale cells."""

import math
import random

import pytest
import torch
from blocks import DTYPES, SHAPES, Block, chunk_rows, decode_rows, same_bits, scattered_tables

from fwd.kernels.device import Shape
from fwd.kernels.select import select


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_decode_row_has_the_same_bits_alone_and_in_any_company(shape, dtype):
    block, chance = Block(shape, dtype, seed=1), random.Random(2)
    tables = scattered_tables(16, 8, seed=3)
    kv = block.cache(16 * 8)
    contexts = [chance.randint(0, 30) for _ in range(16)]
    filled = [(sequence, p) for sequence, context in enumerate(contexts) for p in range(context)]
    for start in range(0, len(filled), 16):
        places = filled[start : start + 16]
        block.run(block.random(len(places), shape[0]), decode_rows(places, tables), kv)
    hidden = block.random(16, shape[0])
    alone = [block.run(hidden[i : i + 1], decode_rows([(i, contexts[i])], tables), kv) for i in range(16)]
    assert all(row.isfinite().all() for row in alone)
    for count in (2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 16):
        order = chance.sample(range(16), count)
        together = block.run(hidden[order], decode_rows([(i, contexts[i]) for i in order], tables), kv)
        for row, index in enumerate(order):
            assert same_bits(together[row : row + 1], alone[index]), (shape, dtype, count, row, index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_chain_of_rows_of_one_sequence_has_the_bits_of_single_steps(dtype):
    block = Block(SHAPES[0], dtype, seed=4)
    tables, hidden = scattered_tables(2, 8, seed=5), block.random(16, SHAPES[0][0])
    single, chained = block.cache(16), block.cache(16)
    steps = [block.run(hidden[p : p + 1], decode_rows([(1, p)], tables), single) for p in range(16)]
    assert same_bits(block.run(hidden, decode_rows([(1, p) for p in range(16)], tables), chained), torch.cat(steps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_pages_in_order_and_scattered_give_the_same_bits(shape, dtype):
    block = Block(shape, dtype, seed=6)
    results = []
    for tables in (torch.arange(8).view(1, 8), torch.arange(3, 11).view(1, 8), scattered_tables(1, 8, seed=7)):
        kv = block.cache(11)
        hidden = torch.sin(torch.arange(30.0 * shape[0])).view(30, shape[0]).to(dtype)
        rows = [block.run(hidden[p : p + 1], decode_rows([(0, p)], tables), kv) for p in range(30)]
        results.append(torch.cat(rows))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_nan_disturbs_no_other_row(dtype):
    block = Block(SHAPES[0], dtype, seed=8)
    tables, hidden = scattered_tables(8, 2, seed=9), block.random(8, SHAPES[0][0])
    places = [(sequence, 0) for sequence in range(8)]
    healthy = block.run(hidden, decode_rows(places, tables), block.cache(16))
    hidden[3, 5], hidden[6, 0] = math.nan, math.inf
    ill = block.run(hidden, decode_rows(places, tables), block.cache(16))
    others = [0, 1, 2, 4, 5, 7]
    assert same_bits(ill[others], healthy[others])
    assert not ill[3].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stale", [math.nan, math.inf, 0.0])
def test_a_prefill_chunk_does_not_see_stale_cells_nor_the_rows_after_it(dtype, stale):
    block, size = Block(SHAPES[0], dtype, seed=10), 24
    hidden, table = block.random(48, SHAPES[0][0]), scattered_tables(1, 10, seed=11)
    whole, cut = block.cache(12, stale=0.5), block.cache(12, stale=stale)
    first = [block.run(hidden[:size], chunk_rows(0, size, 48, table), kv) for kv in (whole, cut)]
    assert same_bits(*first)
    full = block.run(hidden[size:], chunk_rows(1, size, 40, table), whole)
    part = block.run(hidden[size:], chunk_rows(1, size, 33, table), cut)
    assert same_bits(full[:9], part[:9])
    assert part[:9].isfinite().all()


def test_a_chunk_that_continues_a_cached_prefix_has_the_bits_of_a_cold_one():
    block, size = Block(SHAPES[0], torch.bfloat16, seed=12), 24
    hidden, table, kv = block.random(size, SHAPES[0][0]), scattered_tables(1, 6, seed=13), block.cache(6)
    cold = block.run(hidden, chunk_rows(0, size, size, table), kv)
    hidden[:16] = math.nan  # rows of cached tokens are padding, whatever they hold
    warm = block.run(hidden, chunk_rows(0, size, size, table, first=16), kv)
    assert same_bits(warm[16:], cold[16:])


def test_padding_rows_write_nothing():
    block = Block(SHAPES[0], torch.float32, seed=14)
    kv = block.cache(4, stale=7.0)
    rows = decode_rows([(0, 0), (1, 0), (0, 1)], scattered_tables(2, 2, seed=15))
    slots = rows.cells[0].slots
    rows.sequences[1] = slots[1] = -1
    block.run(block.random(3, SHAPES[0][0]), rows, kv)
    touched = (kv.keys != 7.0).flatten(1).any(dim=1)
    assert touched.nonzero().flatten().tolist() == sorted(slots[[0, 2]].tolist())


def test_attention_is_softmax_attention():
    block = Block((64, 4, 2, 16, 96, False), torch.float32, seed=16)
    table, hidden = torch.arange(8).view(1, 8), block.random(24, 64)
    chunk, decode = block.cache(8), block.cache(8)
    prefilled = block.run(hidden, chunk_rows(0, 24, 24, table), chunk)
    decoded = torch.cat([block.run(hidden[p : p + 1], decode_rows([(0, p)], table), decode) for p in range(24)])
    torch.testing.assert_close(prefilled, decoded, atol=1e-4, rtol=1e-4)
    q = block.random(4, 4, 16)
    rows = decode_rows([(0, p) for p in range(20, 24)], table).padded(4)
    block.ops.qkv(hidden[20:], block.layer, block.rope, rows, decode)
    found = block.ops.decode_attention(q, rows, decode).view(4, 4, 16)
    for row, head in ((0, 0), (1, 2), (3, 3)):
        keys, values = decode.keys[: 21 + row, head // 2], decode.values[: 21 + row, head // 2]
        expected = (keys @ q[row, head] / 4).softmax(0) @ values
        torch.testing.assert_close(found[row, head], expected, atol=1e-5, rtol=1e-5)


def test_unpadded_rows_are_a_programming_error():
    block = Block(SHAPES[0], torch.float32, seed=17)
    with pytest.raises(AssertionError, match=r"Rows\.padded"):
        block.ops.head(block.random(3, 64), block.last_norm, block.head)


def test_the_reference_serves_the_cpu():
    shape = Shape("bfloat16", hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocab=301)
    assert select("cpu", shape).name == "reference"

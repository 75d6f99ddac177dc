"""The pieces that the reference takes a context in: they cover it, and a context of any length takes one at a time."""

import itertools

import pytest
import torch
from blocks import SHAPES, Block
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fwd.kernels import attention
from fwd.kernels.kv import KV
from fwd.kernels.rows import Cells, Rows


@given(st.integers(0, 1 << 24), st.integers(1, 1 << 24))
def test_pieces_cover_a_row_in_order_and_are_at_most_256(start, count):
    pieces = list(attention.split(start, start + count))
    assert pieces[0].start == start
    assert pieces[-1].stop == start + count
    assert all(left.stop == right.start for left, right in itertools.pairwise(pieces))
    assert len(pieces) <= 256
    assert [len(piece) for piece in pieces] == [len(piece) for piece in attention.split(0, count)]
    assert len({len(piece) for piece in pieces[:-1]}) <= 1


def test_a_context_of_a_page_is_one_piece_and_a_million_tokens_are_256():
    assert len(list(attention.split(0, 4096))) == 1
    assert [len(piece) for piece in attention.split(0, 1 << 20)] == [4096] * 256


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is computed."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.size = max(self.size, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("chunk", [-1, (1 << 14) - 1])
def test_a_million_tokens_take_the_working_memory_of_one_piece(chunk):
    block, context, page = Block(SHAPES[0], torch.float32, seed=81), 1 << 20, 16
    generator = torch.Generator().manual_seed(82)
    kv = KV(*(torch.randn(context, 2, 16, generator=generator) for _ in range(2)), page)
    table = torch.randperm(context // page, generator=generator)[None]
    rows = far_rows(chunk, context, page, table)
    q = block.random(len(rows.positions), 4, 16)
    block.ops._enter(rows, block.rope)
    with Largest() as largest:
        attend = block.ops.decode_attention if chunk < 0 else block.ops.prefill_attention
        found = attend(q, rows, kv)
    assert largest.size <= 4096 * 4 * max(2 * 16, 4 * len(q)), "a piece of keys, or a piece of scores"
    cells = (table[0][:, None] * page + torch.arange(page)).flatten()
    keys, values = kv.keys[cells].double(), kv.values[cells].double()
    scores = torch.einsum("hgd,chd->hgc", q[-1].double().view(2, 2, 16), keys) / 4
    truth = torch.einsum("hgc,chd->hgd", scores.softmax(-1), values)
    torch.testing.assert_close(found[-1].double(), truth.flatten(), atol=1e-5, rtol=1e-4)


def far_rows(chunk, context, page, table):
    """The last row of a context as a decode row, or its last chunk of 64."""
    positions = torch.arange(context - 64 if chunk >= 0 else context - 4, context)
    slots = table[0][positions // page] * page + positions % page
    cells = (Cells(slots, table.int()),)
    return Rows(positions, torch.zeros_like(positions), torch.full_like(positions, -1), cells, chunk=chunk)

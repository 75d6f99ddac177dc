"""How matrices stand for the kernels, and how their work is cut: pure functions."""

import pytest
import torch
from agreement import same_bits
from layers import Chance

from fwd.errors import ModelError
from fwd.kernels import gemv, packing
from fwd.kernels.host import HostLauncher
from fwd.kernels.qtensor import QTensor
from fwd.kernels.sizes import projection_bytes


@pytest.mark.parametrize("shape", [(8, 8), (24, 40), (48, 2880), (50, 72)], ids=str)
def test_every_weight_stands_where_the_layout_says_and_comes_back(shape):
    outputs, inputs = shape
    data = Chance(1)(*shape)
    weight = QTensor.plain(data).pack()
    flat, blocks = weight.data.flatten(), -(-inputs // 32)
    o, i = torch.meshgrid(torch.arange(outputs), torch.arange(inputs), indexing="ij")
    at = o // 8 * blocks * 512 + i // 32 * 512 + o % 8 * 64 + i % 32 * 2
    assert same_bits(flat[at // 2], data)
    assert flat.count_nonzero() == data.count_nonzero(), "the rest is 0"
    assert same_bits(weight.dequantize(), data.float())


def test_a_slab_of_outputs_is_unpacked_into_scratch():
    data = Chance(2)(56, 40)
    weight, scratch = QTensor.plain(data).pack(), torch.empty(4096, dtype=torch.bfloat16)
    for outputs in (slice(0, 8), slice(16, 43), slice(40, 56), slice(8, 99)):
        slab = packing.unpack(weight, outputs, scratch)
        assert same_bits(slab, data[outputs])
        assert slab.data_ptr() == scratch.data_ptr()


def test_rows_are_cut_where_shared_memory_ends():
    limit = 227 * 1024
    assert list(gemv.parts(16, 4096, limit)) == [slice(0, 16)]
    assert list(gemv.parts(16, 8192, limit)) == [slice(0, 8), slice(8, 16)]
    assert list(gemv.parts(13, 8192, limit)) == [slice(0, 8), slice(8, 13)]
    assert list(gemv.parts(8, 16384, limit)) == [slice(0, 4), slice(4, 8)]
    for rows in range(1, 17):
        for hidden in range(8, 30_000, 1016):
            cut = list(gemv.parts(rows, hidden, limit))
            assert [row for part in cut for row in range(rows)[part]] == list(range(rows))
            assert all(gemv.staged_bytes(part.stop - part.start, hidden) <= limit for part in cut)


def test_a_grid_is_what_runs_at_once():
    launcher = HostLauncher(multiprocessors=132)
    assert gemv.blocks(256, launcher, gemv.staged_bytes(1, 4096)) == 256
    assert gemv.blocks(8016, launcher, gemv.staged_bytes(1, 4096)) == 264
    assert gemv.blocks(8016, launcher, gemv.staged_bytes(16, 4096)) == 132
    assert gemv.blocks(8016, launcher, 1024, resident=1) == 132


@pytest.mark.parametrize(
    ("outputs", "rows", "multiprocessors", "tiles"),
    [
        (4096, 8, 132, 2),
        (4096, 1, 132, 1),
        (4096, 8, 148, 1),
        (2048, 16, 132, 1),
        (8192, 16, 148, 2),
        (8208, 16, 132, 1),
    ],
)
def test_two_tiles_are_taken_at_once_where_blocks_are_many(outputs, rows, multiprocessors, tiles):
    assert gemv.tiles_at_once(outputs, rows, multiprocessors) == tiles


def test_bytes_are_those_of_the_weights_and_a_little():
    weights = 4096 * 6144 * 2
    assert gemv.qkv_bytes(1, 4096, 32, 8, 128) == weights + 2 * (4096 + 4096 + 6144)
    assert gemv.linear_bytes(2, 14336, 4096) == 14336 * 4096 * 2 + 2 * 2 * (14336 + 2 * 4096)
    assert gemv.gate_up_bytes(1, 4096, 14336) == 2 * 4096 * 14336 * 2 + 2 * (2 * 4096 + 14336)
    assert gemv.head_bytes(1, 4096, 128256) == 4096 * 128256 * 2 + 2 * 2 * 4096 + 4 * 128256
    assert gemv.embed_bytes(3, 4096) == 3 * (8 + 4 * 4096)
    space = gemv.Workspace.of(torch.device("cpu"), 48, 128)
    assert space.projected.nbytes + space.counters.nbytes == projection_bytes(48, 128)


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        ((1003, 4096, 64), r"^hidden_size is 1003: the kernels take multiples of 8; use --device cpu$"),
        ((1024, 4100, 64), r"^intermediate_size is 4100: the kernels take multiples of 8; use --device cpu$"),
        ((1024, 4096, 96), r"^head_dim is 96: the kernels take one of 64, 128, 256; use --device cpu$"),
    ],
)
def test_a_model_the_kernels_do_not_take_is_refused_by_field_and_value(shape, line):
    hidden, intermediate, head_dim = shape
    with pytest.raises(ModelError, match=line):
        gemv.check_model(hidden=hidden, intermediate=intermediate, head_dim=head_dim)

"""The kernels over latents: the reference's numbers, and a row's bits from nothing but the row."""

import random
from dataclasses import replace

import pytest
import torch
from agreement import difference, same_bits
from contexts import on
from latent_contexts import (
    BOUND,
    EXACT,
    SHAPES,
    Context,
    Layer,
    Shape,
    attend,
    cache_on,
    hidden_of,
    reference,
    tree,
    written,
)
from layers import Chance
from trees import PARENTS, branch
from weights import quantised

from fwd.kernels import gemv, packing
from fwd.kernels import latent_kernels as latents
from fwd.kernels.builds import shared_bound
from fwd.kernels.host import HostLauncher
from fwd.kernels.qtensor import QTensor
from fwd.kernels.sizes import latent_bytes

CODES = {"bf16": EXACT, "fp8": 5e-5}  # of cells: the last bit of a number may give the next code
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 261)
SHORT = (1, 65)  # of layers that are wide
SMALL = SHAPES[0]
FEW = [SHAPES[0], SHAPES[1], SHAPES[6]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_agree_with_the_reference(execution, shape):
    lengths = SHORT if shape.heads * shape.latent > 2000 else LENGTHS
    layer, context = Layer(shape), Context(shape, lengths)
    hidden, rows = hidden_of(shape, len(lengths)), context.last_rows()
    q, out, *cells = execution.everywhere(lambda launcher: attend(launcher, layer, hidden, rows, context.kv))
    wanted_q, wanted, *wanted_cells = reference(layer, hidden, rows, context.kv)
    assert difference(q, wanted_q) < EXACT
    apart = [difference(*pair) for pair in zip(cells, wanted_cells, strict=True)]
    assert max(apart) < CODES[shape.kv], apart
    assert difference(out, wanted) < BOUND, shape


@pytest.mark.parametrize("form", ["fp8", "mxfp4", "nvfp4", "int4", "int4-128"])
def test_weights_of_any_format_agree_with_the_reference(execution, form):
    shape = Shape("bf16", 256, 3, 128, 48, 24, 16, 24)
    layer, context = Layer(shape), Context(shape, (3, 70))
    block = {"fp8": (8, 128), "int4-128": (1, 128)}.get(form)
    plain = layer.plain
    down, query = (matrix(form, *weight.shape, block) for weight in (plain.down, plain.query))
    layer.plain = replace(plain, down=down, query=query)
    hidden, rows = hidden_of(shape, 2), context.last_rows()
    q, out, *cells = execution.everywhere(lambda launcher: attend(launcher, layer, hidden, rows, context.kv))
    down, query = (QTensor.plain(packing.restore(weight.pack()).dequantize()) for weight in (down, query))
    layer.plain = replace(plain, down=down, query=query)
    wanted = reference(layer, hidden, rows, context.kv)
    for found, other in zip((q, *cells), (wanted[0], *wanted[2:]), strict=True):
        assert difference(found, other) < EXACT, form
    assert difference(out, wanted[1]) < BOUND


def matrix(form, outputs, inputs, block):
    """A weight of about unit gain."""
    if form != "int4-128":
        return quantised(form, outputs, inputs, block=block)
    weight = quantised("int4", outputs, inputs)
    return replace(weight, block=(1, 128), scales=weight.scales[:, ::4].contiguous())


@pytest.mark.parametrize("shape", FEW, ids=str)
def test_a_row_has_the_same_bits_in_any_company_at_any_place(execution, shape):
    chance, lengths = random.Random(11), [random.Random(10).choice((1, 3, 66, 140, 300, 517)) for _ in range(16)]
    layer = Layer(shape)
    here, there = (Context(shape, lengths, places=places) for places in (3, 4))
    hidden = hidden_of(shape, 16)
    whole = attend(execution.launcher, layer, hidden, here.last_rows(), here.kv)
    for count, context in ((1, there), (2, here), (5, there), (9, here), (16, there)):
        order = chance.sample(range(16), count)
        rows = context.rows([(line, lengths[line] - 1) for line in order])
        part = attend(execution.launcher, layer, hidden[order], rows, context.kv)
        for found, all_of_it in zip(part, whole, strict=True):
            assert same_bits(found, all_of_it[order]), (shape, count, order)


def test_the_number_of_blocks_does_not_matter():
    shape, lengths = SHAPES[5], (1, 300, 64, 130)
    layer, context = Layer(shape), Context(shape, lengths)
    hidden, rows = hidden_of(shape, 4), context.last_rows()
    one, *others = (
        attend(HostLauncher(7, multiprocessors=count), layer, hidden, rows, context.kv) for count in (1, 3, 64)
    )
    assert all(same_bits(*pair) for other in others for pair in zip(one, other, strict=True))


def test_padding_rows_are_zero_write_nothing_and_a_row_of_nan_disturbs_no_other(execution):
    shape = SHAPES[1]
    layer, context = Layer(shape), Context(shape, (5, 90, 200))
    rows = context.rows([(-1, 7), (0, 4), (1, 89), (-1, 0), (2, 199)])
    hidden = hidden_of(shape, 5)
    _, healthy, *cells = attend(execution.launcher, layer, hidden, rows, context.kv)
    assert not healthy[[0, 3]].any()
    hidden[2, 3] = torch.nan
    _, ill, *others = attend(execution.launcher, layer, hidden, rows, context.kv)
    assert same_bits(ill[[0, 1, 3, 4]], healthy[[0, 1, 3, 4]])
    assert ill[2].isnan().all()
    assert all(same_bits(a[[0, 2]], b[[0, 2]]) for a, b in zip(cells, others, strict=True))


@pytest.mark.parametrize("form", ["bf16", "mxfp4"])
def test_rows_that_do_not_fit_at_once_have_the_same_bits(form):
    shape, lengths = Shape("bf16", 1024, 3, 128, 48, 24, 16, 24), range(1, 14)
    layer, context = Layer(shape), Context(shape, lengths)
    if form != "bf16":
        plain = layer.plain
        down, query = (matrix(form, *weight.shape, None) for weight in (plain.down, plain.query))
        layer.plain = replace(plain, down=down, query=query)
    hidden, rows, small = hidden_of(shape, 13), context.last_rows(), HostLauncher(3)
    small.shared_limit = 36000
    whole, parts = (attend(launcher, layer, hidden, rows, context.kv) for launcher in (HostLauncher(2), small))
    assert all(map(same_bits, whole, parts))


def test_layers_whose_launches_overlap_give_the_same_bits():
    """What a layer leaves in the workspace is there for its own launches, and the next layer's come after them."""
    shape = Shape("bf16", 96, 5, 24, 48, 16, 8, 24)
    layers, context = [Layer(shape, seed=seed) for seed in (3, 4)], Context(shape, (3, 70, 130))
    outputs = [Chance(seed).matrix(96, 120).pack() for seed in (5, 6)]

    def run(launcher):
        rows, hidden, found = context.last_rows(), hidden_of(shape, 3), []
        workspace = latents.Workspace.new(launcher, layers[0].plain)
        for layer, output in zip(layers, outputs, strict=True):
            packed, kv = layer.packed("cpu"), cache_on("cpu", context.kv)
            q = latents.latent_qkv(launcher, workspace, hidden, packed, layer.rope, rows=rows, kv=kv)
            mixed = latents.decode_latent_attention(launcher, workspace, q, packed, rows=rows, kv=kv)
            hidden = gemv.linear(launcher, mixed, output, hidden)
            found += [*written(kv, rows), mixed, hidden.clone()]
        return found

    one, *others = [run(HostLauncher(seed, 0x3F + 0xC0 * (seed % 2), dependent=seed > 1)) for seed in (1, 2, 3)]
    assert all(all(map(same_bits, one, other)) for other in others)


@pytest.mark.parametrize("kv", ["bf16", "fp8"])
def test_a_context_of_thousands(execution, kv):
    shape = replace(SMALL, kv=kv, page=16)
    layer, context = Layer(shape, positions=5000), Context(shape, (4500,))
    assert latents.piece_count(4500) == 36
    hidden, rows = hidden_of(shape, 2), context.rows([(0, 4499), (0, 4095)])
    _, found, *_ = execution.everywhere(lambda launcher: attend(launcher, layer, hidden, rows, context.kv), count=2)
    assert difference(found, reference(layer, hidden, rows, context.kv)[1]) < BOUND


# ---- pieces ----


def test_pieces_cover_any_context():
    for length in [*range(1, 5000), 32767, 32768, 32769, 131072, 1 << 20, (1 << 20) + 1, (1 << 27) - 1]:
        piece, count = latents.piece_length(length), latents.piece_count(length)
        assert piece % 64 == 0
        assert (count - 1) * piece < length <= count * piece
        assert count <= (64 if length <= 16384 else 128)
    assert [latents.piece_length(x) for x in (1, 4096, 4097, 8193, 16385, 32768, 32769)] == [
        *(64, 64, 128, 192, 256, 256, 320)
    ]


@pytest.mark.parametrize("length", [1, 64, 65, 1000, 4097, 8300, 16500, 33000])
def test_the_kernel_cuts_a_context_as_stated(execution, length):
    """Where all scores are 0, the total of a piece is the number of its keys."""
    shape = Shape("bf16", 64, 1, 0, 16, 8, 8, 16, page=64)
    layer, context, launcher = Layer(shape, positions=length), Context(shape, (length,)), execution.launcher
    packed, device = layer.packed(launcher.device), launcher.device
    workspace = latents.Workspace.new(launcher, packed)
    rows, kv, rope = on(device, context.last_rows()), cache_on(device, context.kv), on(device, layer.rope)
    hidden = torch.zeros(1, 64, dtype=torch.bfloat16, device=device)
    q = latents.latent_qkv(launcher, workspace, hidden, packed, rope, rows=rows, kv=kv)
    latents.decode_latent_attention(launcher, workspace, q, packed, rows=rows, kv=kv)
    piece, count = latents.piece_length(length), latents.piece_count(length)
    totals = [min(piece, length - start) for start in range(0, length, piece)]
    assert workspace.marks[0, 0, :count, 1].tolist() == totals


# ---- trees ----


@pytest.mark.parametrize("base", [0, 13, 62, 126])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[6]], ids=str)
def test_drafts_of_a_tree_agree_with_the_reference(execution, shape, base):
    layer, (context, rows) = Layer(shape), tree(shape, base)
    hidden = hidden_of(shape, len(PARENTS))
    _, found, *_ = execution.everywhere(lambda launcher: attend(launcher, layer, hidden, rows, context.kv), count=2)
    assert difference(found, reference(layer, hidden, rows, context.kv)[1]) < BOUND, (shape, base)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[6]], ids=str)
def test_an_accepted_branch_had_the_bits_of_the_plain_chain(execution, shape):
    base, layer = 62, Layer(shape)
    context, rows = tree(shape, base)
    hidden = hidden_of(shape, len(PARENTS))
    drafted = attend(execution.launcher, layer, hidden, rows, context.kv)[1]
    for leaf in (4, 6, 7):
        chain = branch(leaf)
        plain = Context(shape, (base + len(chain), 30), spare=12)
        steps = plain.rows([(0, base + depth) for depth in range(len(chain))])
        found = attend(execution.launcher, layer, hidden[chain], steps, plain.kv)[1]
        assert same_bits(found, drafted[chain]), leaf


# ---- what is taken ----


def test_what_is_not_taken_is_said():
    assert latents.supports(20, 768, 512, 192, 64) is None
    assert latents.supports(128, 0, 512, 128, 64) is None
    assert "129 heads" in latents.supports(129, 0, 512, 128, 64)
    assert "kv_lora_rank 520" in latents.supports(8, 0, 520, 128, 64)
    assert "kv_lora_rank 40" in latents.supports(8, 0, 40, 128, 64)
    assert "qk_rope_head_dim 12" in latents.supports(8, 0, 64, 128, 12)
    assert "qk_nope_head_dim 20" in latents.supports(8, 0, 64, 20, 8)
    assert "q_lora_rank 20" in latents.supports(8, 20, 64, 16, 8)


@pytest.mark.parametrize("shape", FEW, ids=str)
def test_a_workspace_takes_what_is_said(shape):
    workspace = latents.Workspace.new(HostLauncher(), Layer(shape).plain)
    tensors = (getattr(workspace, name) for name in workspace.__slots__)
    expected = latent_bytes(shape.heads, shape.rank, shape.latent, shape.nope, shape.rope)
    assert sum(tensor.nbytes for tensor in tensors) == expected


def test_the_table_says_what_blocks_take():
    for kv, size in (("bf16", 2), ("fp8", 1)):
        for sixteens in (1, 2):
            name = f"latent_attention_{kv}_{16 * sixteens}"
            assert shared_bound("latent_attention.cu", name) == latents.shared_bytes(sixteens, size)
    assert shared_bound("latent_value.cu", "latent_value") == latents.VALUE_SHARED


def test_rows_of_a_block_fill_the_device():
    assert [latents.rows_at_once(rows, 40, 132) for rows in (1, 3, 4, 8, 16)] == [1, 1, 2, 4, 8]
    assert latents.rows_at_once(16, 256, 132) == 8

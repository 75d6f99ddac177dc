"""The matrix-vector kernels: they agree with the reference, and a row's bits are its own."""

import random

import pytest
import torch
from agreement import difference, same_bits
from torch.nn import functional

from fwd.errors import KernelError, ModelError
from fwd.kernels import gemv, packing
from fwd.kernels.host import HostLauncher
from fwd.kernels.ops import KV, QKV, Cells, Norm, Rows
from fwd.kernels.paged import quantize
from fwd.kernels.qtensor import QTensor
from fwd.kernels.reference import Reference

BOUND = 1e-5  # of `difference`: a sum in another order now and then rounds to the other bf16 neighbour (2⁻⁹ apart)
POSITIONS = 64
CELLS = 40
STALE = 7.0
# inputs, outputs: ordinary, odd groups of 8, odd blocks of 32, less than one of either, gpt-oss's, more than a round
SHAPES = [(256, 64), (128, 24), (2056, 48), (8, 8), (2880, 32), (4384, 80), (64, 272)]
# hidden, heads, kv_heads, head_dim, bias, qk-norm, fp8 cells
LAYERS = [
    (256, 4, 2, 64, False, False, False),
    (2880, 2, 1, 64, True, False, False),
    (72, 16, 1, 16, True, False, False),
    (128, 3, 3, 128, False, False, False),
    (64, 2, 1, 256, True, False, True),
    (136, 6, 2, 64, False, True, False),
    (64, 2, 2, 80, True, True, True),
    (96, 2, 1, 128, False, True, True),
]


class Chance:
    """Random tensors on a device, the same ones on each."""

    def __init__(self, seed, device="cpu"):
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def __call__(self, *shape, scale=1.0, dtype=torch.bfloat16):
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype).to(self.device)

    def matrix(self, outputs, inputs):
        return QTensor.plain(self(outputs, inputs, scale=inputs**-0.5))

    def norm(self, width):
        return Norm(self(width, scale=0.3) + 1, 1e-5)


class Layer:
    """A random attention input on a device, its reference, and where `count` rows go."""

    def __init__(self, shape, count, seed, device="cpu"):
        chance = Chance(seed, device)
        hidden, self.heads, kv_heads, dim, biased, normed, self.fp8 = shape
        width = (self.heads + 2 * kv_heads) * dim
        self.hidden = chance(count, hidden)
        self.plain = QKV(
            chance.norm(hidden),
            chance.matrix(width, hidden),
            chance(width) if biased else None,
            chance.norm(dim) if normed else None,
            chance.norm(dim) if normed else None,
            kv_heads,
            dim,
        )
        self.rope = torch.stack(angles(dim), dim=1).to(device)
        order = random.Random(seed)
        self.positions = torch.tensor(order.sample(range(POSITIONS), count), device=device)
        self.slots = torch.tensor(order.sample(range(CELLS), count), device=device)

    def rows(self):
        count = len(self.hidden)
        sequences = torch.where(self.slots < 0, -1, 0)
        tables = torch.zeros(1, 1, dtype=torch.int32, device=self.slots.device)
        parents = torch.full_like(self.positions, -1)
        return Rows(self.positions[:count], sequences[:count], parents[:count], (Cells(self.slots[:count], tables),))

    def cache(self):
        shape = (CELLS, self.plain.kv_heads, self.plain.head_dim)
        dtype = torch.float8_e4m3fn if self.fp8 else torch.bfloat16
        tensors = [torch.full(shape, STALE, device=self.hidden.device).to(dtype) for _ in range(2)]
        scales = [torch.full(shape[:2], STALE, device=self.hidden.device) if self.fp8 else None for _ in range(2)]
        return KV(*tensors, 4, 0, 0, *scales)

    def packed(self):
        layer = self.plain
        biases = (layer.bias, layer.q_norm, layer.k_norm, layer.kv_heads, layer.head_dim)
        return QKV(layer.norm, layer.weight.pack(), *biases)

    def run(self, launcher):
        """Returns q and all of the cache."""
        heads, kv, layer = self.heads + 2 * self.plain.kv_heads, self.cache(), self.packed()
        space = gemv.Workspace.of(launcher.device, heads, layer.head_dim)
        q = gemv.qkv(launcher, space, self.hidden, layer, self.rope, rows=self.rows(), kv=kv)
        assert not space.counters.any(), "counters are left as they were found"
        return q, *contents(kv)

    def expected(self):
        """The same by the reference, on the CPU."""
        kv, rows = self.cache(), self.rows().padded(4)
        hidden = functional.pad(self.hidden, (0, 0, 0, len(rows.positions) - len(self.hidden)))
        return Reference().qkv(hidden, self.plain, self.rope, rows, kv)[: len(self.hidden)], *contents(kv)


def angles(dim):
    places = torch.outer(torch.arange(float(POSITIONS)), 100.0 ** -torch.linspace(0, 1, dim // 2))
    return places.cos(), places.sin()


def contents(kv):
    """Keys and values as they are read, and the scales."""
    if kv.key_scales is None:
        return kv.keys, kv.values
    scaled = (kv.keys, kv.key_scales), (kv.values, kv.value_scales)
    return *(cells.float() * scales.unsqueeze(-1) for cells, scales in scaled), kv.key_scales, kv.value_scales


def close(found, expected, what):
    apart = difference(found, expected)
    assert apart < BOUND, f"{what}: {apart}"


# ---- packing ----


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


# ---- agreement ----


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_agrees_with_the_reference(execution, shape, rows):
    def run(launcher, place=None):
        chance = Chance(rows, place or launcher.device)
        weight, x, residual = chance.matrix(shape[1], shape[0]), chance(rows, shape[0]), chance(rows, shape[1])
        bias = chance(shape[1]) if rows % 2 else None
        if place:
            return (
                residual.float() + x.float() @ weight.dequantize().t() + (0 if bias is None else bias.float())
            ).bfloat16()
        return gemv.linear(launcher, x, weight.pack(), residual, bias)

    close(execution.everywhere(run), run(None, "cpu"), (shape, rows))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] % 16 == 0], ids=str)
def test_linear_rounds_as_often_as_the_reference(execution, shape):
    chance = Chance(3)
    weight, x, residual, bias = (
        chance.matrix(shape[1], shape[0]),
        chance(16, shape[0]),
        chance(16, shape[1]),
        chance(shape[1]),
    )
    ops = Reference()
    if not (packed := ops.pack(weight)).data.is_mkldnn:
        pytest.skip("the reference has no fused product of bfloat16 on this CPU")
    expected = ops.linear(x, packed, residual.clone(), bias)
    device = execution.launcher.device
    found = gemv.linear(execution.launcher, *(to(each, device) for each in (x, weight.pack(), residual, bias)))
    assert (found.cpu() != expected).float().mean() < 0.01  # a second rounding changes a tenth of them


@pytest.mark.parametrize("rows", [1, 4, 11, 16])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] % 16 == 0], ids=str)
def test_gate_up_agrees_with_the_reference(execution, shape, rows):
    def run(launcher, place=None):
        chance = Chance(rows + 20, place or launcher.device)
        hidden, norm, weight = chance(rows, shape[0]), chance.norm(shape[0]), chance.matrix(shape[1], shape[0])
        if place:
            return Reference().gate_up(functional.pad(hidden, (0, 0, 0, -rows % 4)), norm, weight)[:rows]
        return gemv.gate_up(launcher, hidden, norm, weight.pack())

    close(execution.everywhere(run), run(None, "cpu"), (shape, rows))


@pytest.mark.parametrize("rows", [1, 7, 16])
@pytest.mark.parametrize("shape", [*SHAPES, (96, 301)], ids=str)
def test_head_agrees_with_the_reference(execution, shape, rows):
    def run(launcher, place=None):
        chance = Chance(rows + 40, place or launcher.device)
        hidden, norm, weight = chance(rows, shape[0]), chance.norm(shape[0]), chance.matrix(shape[1], shape[0])
        if place:
            head = Reference().pack_head(weight)
            return Reference().head(functional.pad(hidden, (0, 0, 0, -rows % 4)), norm, head)[:rows]
        return gemv.head(launcher, hidden, norm, weight.pack())

    close(execution.everywhere(run), run(None, "cpu"), (shape, rows))


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_qkv_agrees_with_the_reference(execution, shape, rows):
    found = execution.everywhere(lambda launcher: Layer(shape, rows, 5, launcher.device).run(launcher))
    bound = 1e-3 if shape[-1] else BOUND  # a largest number that rounds the other way moves all of its fp8 cell
    for place, pair in enumerate(zip(found, Layer(shape, rows, 5).expected(), strict=True)):
        apart = difference(*pair)
        assert apart < bound, (shape, rows, place, apart)


@pytest.mark.parametrize("shape", [shape for shape in LAYERS if shape[-1] and shape[-2]], ids=str)
def test_fp8_cells_are_those_of_the_rule(execution, shape):
    launcher = execution.launcher
    layer, exact = Layer(shape, 16, 6, launcher.device), Layer((*shape[:-1], False), 16, 6, launcher.device)
    _, keys, values, key_scales, value_scales = layer.run(launcher)
    _, *cells = exact.run(launcher)
    for found, scales, wide in ((keys, key_scales, cells[0]), (values, value_scales, cells[1])):
        numbers, scale = quantize(wide[exact.slots])
        assert same_bits(scales[layer.slots], scale)
        assert same_bits(found[layer.slots], numbers.float() * scale.unsqueeze(-1))


def test_a_head_of_zeros_has_scale_one(execution):
    launcher = execution.launcher
    layer = Layer((64, 2, 1, 64, False, False, True), 3, 7, launcher.device)
    layer.plain.weight.data.zero_()
    q, keys, _, scales, _ = layer.run(launcher)
    assert not q.any()
    assert not keys[layer.slots].any()
    assert (scales[layer.slots] == 1).all()


@pytest.mark.parametrize("packed", [True, False])
def test_embed_copies_rows_of_ids_and_of_tokens_just_drawn(execution, packed):
    def run(launcher):
        weight = Chance(8, launcher.device).matrix(52, 2888)
        ids = torch.tensor([3, -2, 51, 0, -1, -3], device=launcher.device)
        drawn = torch.tensor([17, 50, 9], device=launcher.device)
        return gemv.embed(launcher, ids, weight.pack() if packed else weight, drawn)

    table = Chance(8).matrix(52, 2888).data
    assert same_bits(execution.everywhere(run), table[[3, 50, 51, 0, 17, 9]])


def test_embed_of_what_is_no_id_reads_a_row_that_exists(execution):
    launcher = execution.launcher
    weight = Chance(9, launcher.device).matrix(16, 64)
    ids, drawn = (torch.tensor(each, device=launcher.device) for each in ([99, -9, -1], [-5]))
    assert same_bits(gemv.embed(launcher, ids, weight, drawn), weight.data[[15, 0, 0]])
    assert same_bits(gemv.embed(launcher, ids, weight), weight.data[[15, 0, 0]])


# ---- what must not matter ----


@pytest.mark.parametrize("shape", [LAYERS[1], LAYERS[4], LAYERS[6]], ids=str)
def test_a_row_of_qkv_has_the_same_bits_alone_and_in_any_company(execution, shape):
    launcher = execution.launcher
    whole = Layer(shape, 16, 10, launcher.device)
    q, *cells = whole.run(launcher)
    for chosen in ([0], [7], [15], [9, 2], [15, 0, 3, 11, 5, 1, 8], [4, 3, 2, 1, 0, 15, 14, 13, 12]):
        part = Layer(shape, 16, 10, launcher.device)
        part.hidden, part.positions, part.slots = (x[chosen] for x in (whole.hidden, whole.positions, whole.slots))
        few, *others = part.run(launcher)
        assert same_bits(few, q[chosen]), (shape, chosen)
        for one, other in zip(cells, others, strict=True):
            assert same_bits(one[part.slots], other[part.slots]), (shape, chosen)


@pytest.mark.parametrize("shape", [(2880, 48), (4384, 288)], ids=str)
def test_a_row_has_the_same_bits_alone_and_in_any_company(execution, shape):
    inputs, outputs = shape
    launcher = execution.launcher
    chance = Chance(11, launcher.device)
    weight, norm, bias = chance.matrix(outputs, inputs).pack(), chance.norm(inputs), chance(outputs)
    x, residual = chance(16, inputs), chance(16, outputs)

    def run(chosen):
        given = x[chosen].contiguous()
        return (
            gemv.linear(launcher, given, weight, residual[chosen].contiguous(), bias),
            gemv.gate_up(launcher, given, norm, weight),
            gemv.head(launcher, given, norm, weight),
        )

    together = run(list(range(16)))
    for chosen in ([0], [6], [15], [9, 2], [15, 0, 3, 11, 5], [4, 3, 2, 1, 0, 15, 14, 13, 12]):
        for op, (one, all_rows) in enumerate(zip(run(chosen), together, strict=True)):
            assert same_bits(one, all_rows[chosen]), (shape, chosen, op)


def test_the_number_of_multiprocessors_shapes_nothing():
    chance = Chance(12)
    weight, norm, x, residual = chance.matrix(320, 2112).pack(), chance.norm(2112), chance(9, 2112), chance(9, 320)
    results = []
    for count in (1, 3, 10, 132):
        launcher = HostLauncher(count, multiprocessors=count)
        results.append((gemv.linear(launcher, x, weight, residual.clone()), gemv.head(launcher, x, norm, weight)))
    assert {gemv.tiles_at_once(320, 9, count) for count in (1, 132)} == {1, 2}, "both kinds of blocks"
    for linear, head in results[1:]:
        assert same_bits(linear, results[0][0])
        assert same_bits(head, results[0][1])


def test_rows_that_do_not_fit_in_shared_memory_at_once_have_the_bits_of_those_that_do(execution):
    launcher = execution.launcher
    chance = Chance(13, launcher.device)
    weight, norm, hidden = chance.matrix(32, 7200).pack(), chance.norm(7200), chance(16, 7200)
    assert len(list(gemv.parts(16, 7200, launcher.shared_limit))) == 2
    together = gemv.gate_up(launcher, hidden, norm, weight)
    for part in (slice(0, 5), slice(7, 8), slice(11, 16)):
        assert same_bits(gemv.gate_up(launcher, hidden[part], norm, weight), together[part])


def test_a_row_that_is_not_finite_disturbs_no_other(execution):
    launcher = execution.launcher
    layer = Layer(LAYERS[5], 12, 14, launcher.device)
    chance = Chance(15, launcher.device)
    weight, norm = chance.matrix(40, 136).pack(), chance.norm(136)
    before = *layer.run(launcher), gemv.head(launcher, layer.hidden, norm, weight)
    layer.hidden[3, 5], layer.hidden[9] = float("nan"), float("inf")
    after = *layer.run(launcher), gemv.head(launcher, layer.hidden, norm, weight)
    others = [row for row in range(12) if row not in (3, 9)]
    for rows, one, other in zip((others, *[layer.slots[others]] * 2, others), before, after, strict=True):
        assert same_bits(one[rows], other[rows])
    assert after[-1][[3, 9]].isnan().all()


@pytest.mark.parametrize("shape", [LAYERS[0], LAYERS[6]], ids=str)
def test_padding_rows_write_no_cell_whatever_their_position(execution, shape):
    launcher = execution.launcher
    layer = Layer(shape, 6, 16, launcher.device)
    layer.slots[[1, 5]], layer.positions[1], layer.positions[5] = -1, 10**12, -3
    q, keys, values, *_ = layer.run(launcher)
    assert q.isfinite().all()
    _, stale, *_ = contents(layer.cache())
    for cells in (keys, values):
        touched = (cells != stale).flatten(1).any(dim=1)
        assert touched.nonzero().flatten().tolist() == sorted(layer.slots[[0, 2, 3, 4]].tolist())


# ---- planted bugs: what these tests can see ----


def linear_error(execution):
    """How far `linear`, `gate_up` and `head` are from the truth; raises if they depend on order or poison."""
    chance = Chance(17)
    weight, x, residual, bias = chance.matrix(96, 520), chance(9, 520), chance(9, 96), chance(96)
    norm, padded = chance.norm(520), functional.pad(x, (0, 0, 0, 3))

    def run(launcher):
        packed = weight.pack()
        linear = gemv.linear(launcher, x, packed, residual.clone(), bias)
        return linear, gemv.gate_up(launcher, x, norm, packed), gemv.head(launcher, x, norm, packed)

    truth = (residual.float() + bias.float() + x.float() @ weight.dequantize().t()).bfloat16()
    ops = Reference()
    expected = truth, ops.gate_up(padded, norm, weight)[:9], ops.head(padded, norm, ops.pack_head(weight))[:9]
    return max(difference(*pair) for pair in zip(execution.everywhere(run), expected, strict=True))


def qkv_error(execution):
    shape = (64, 2, 2, 64, True, True, True)
    found = execution.everywhere(lambda launcher: Layer(shape, 5, 18).run(launcher))
    return max(difference(one, other) for one, other in zip(found, Layer(shape, 5, 18).expected(), strict=True))


PLANTED = {
    "the bias of the first tile": (
        "gemv.cu",
        "fwd::to_float(bias[output])",
        "fwd::to_float(bias[m])",
        linear_error,
    ),
    "gate and up exchanged": (
        "gemv.cu",
        "float gate = fwd::round_bf16(sum), up = fwd::shuffle_xor(gate, 8);",
        "float up = fwd::round_bf16(sum), gate = fwd::shuffle_xor(up, 8);",
        linear_error,
    ),
    "no barrier before sums are added": (
        "gemv.cuh",
        "store_sums(turn, sums);\n        block_barrier();",
        "store_sums(turn, sums);",
        linear_error,
    ),
    "no barrier behind the norm": (
        "gemv.cuh",
        "scale(row, rsqrtf(sum / inputs + eps));\n        }\n        block_barrier();",
        "scale(row, rsqrtf(sum / inputs + eps));\n        }",
        linear_error,
    ),
    "sums added in the order they arrive": (
        "gemv.cuh",
        "    int group = lane_index() / 4, pair = lane_index() % 4 * 2;\n",
        """
    int group = lane_index() / 4, pair = lane_index() % 4 * 2;
    static int arrivals[4096];
    int first = lane_index() == 0 ? atomicAdd(arrivals + blockIdx.x, 1) : 0;
    auto warp_index = [arrival = shuffle(first, 0) % kWarps] { return arrival; };
""",
        linear_error,
    ),
    "the inputs after the last block": (
        "gemv.cuh",
        "if ((first + i) * kWarps < there)",
        "if ((first + i) * kWarps <= there)",
        linear_error,
    ),
    "the scale of another head": (
        "qkv.cu",
        "cache.scales[cell] = scale",
        "cache.scales[cell / kv_heads * kv_heads] = scale",
        qkv_error,
    ),
    "a head finished before its last tile": (
        "qkv.cu",
        "fwd::last_arriver(counters + head, tiles())",
        "fwd::last_arriver(counters + head, tiles() - 1)",
        qkv_error,
    ),
    "both halves of a pair turned alike": (
        "qkv.cu",
        "rotated(upper, lower, false, c, s)",
        "rotated(upper, lower, true, c, s)",
        qkv_error,
    ),
}


@pytest.mark.parametrize("error", [linear_error, qkv_error])
def test_without_a_planted_bug_nothing_is_found(execution, error):
    assert error(execution) < 1e-3


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(execution, bug):
    source, old, new, error = PLANTED[bug]
    mutated = execution.mutated(source, old, new)
    assert seen(error, mutated)


def seen(error, execution):
    try:
        return error(execution) > 1e-3
    except AssertionError:  # `everywhere` found that it depends on the order
        return True


def test_a_kernel_that_does_not_wait_for_the_one_before_is_found(execution):
    launcher = execution.mutant("gemv.cu", "    fwd::grid_dependency_wait();\n", "")
    chance = Chance(19)
    with pytest.raises(KernelError, match="grid_dependency_wait"):
        gemv.linear(launcher, chance(1, 64), chance.matrix(16, 64).pack(), chance(1, 16))


def test_the_sanitizers_find_nothing(sanitized, execution):
    here = execution
    for kernel in ("LINEAR(linear_1x16", "LINEAR(linear_2x8", "GATE_UP(gate_up_8", "HEAD(head_16"):
        here = here.mutated("gemv.cu", f"FWD_{kernel},", "// ")  # a half of the kernels: they take long to compile
    for kernel in ("qkv_paired_8", "qkv_whole_16"):
        here = here.mutated("qkv.cu", f"FWD_QKV({kernel},", "// ")
    done = sanitized(
        f"""
        from pathlib import Path
        from fwd.kernels import gemv
        from fwd.kernels.host import HostLauncher
        from test_gemv import LAYERS, Chance, Layer

        launcher = HostLauncher(1, sanitize=True, folder=Path({str(here.folder)!r}))
        chance = Chance(20)
        for rows, inputs, outputs in ((3, 2056, 24), (16, 72, 320)):
            gemv.linear(launcher, chance(rows, inputs), chance.matrix(outputs, inputs).pack(), chance(rows, outputs))
        norm = chance.norm(72)
        gemv.gate_up(launcher, chance(11, 72), norm, chance.matrix(48, 72).pack())
        gemv.head(launcher, chance(3, 72), norm, chance.matrix(301, 72).pack())
        Layer(LAYERS[2], 16, 21).run(launcher)
        Layer(LAYERS[6], 5, 21).run(launcher)
        """
    )
    assert done.returncode == 0, done.stderr[-3000:]


# ---- how work is cut ----


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
    assert space.projected.nbytes + space.counters.nbytes == gemv.Workspace.nbytes(48, 128)


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


def to(thing, device):
    if isinstance(thing, QTensor):
        return QTensor(thing.data.to(device), thing.format, thing.shape, thing.packed)
    return thing.to(device)

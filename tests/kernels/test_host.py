"""What host execution does, primitive by primitive, against a statement of it in numpy; and that it is repeatable."""

import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import difference
from execution import Execution

from fwd.errors import KernelError
from fwd.kernels import gxx, host, noise, sources
from fwd.kernels.host import HostLauncher
from fwd.kernels.launch import Kernel, Launcher

FOLDER = Path(__file__).resolve().parent / "cuda"
LANES = np.arange(32)
SEEDS = range(1, 9)


def launch(launcher: Launcher, name: str, *arguments, grid=1, threads=32, shared=0, source="primitives.cu", **how):
    grid = grid if isinstance(grid, tuple) else (grid, 1, 1)
    launcher.launch(Kernel(source, name), grid, threads, shared, *arguments, **how)


@pytest.fixture
def here(tmp_path):
    """Execution of the kernels of this folder."""
    return Execution("host", tmp_path, FOLDER)


@pytest.fixture
def launcher(here):
    return here.launcher


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def bits16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x.astype(np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)


def words(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.astype(np.uint32)).view(np.int32))


# ---- tensor cores ----


def fragments(a, b):
    """The registers of each lane, by the tables of the PTX ISA: a [32, 4] and b [32, 2] of two bf16 each."""
    group, thread = LANES // 4, LANES % 4
    left, right = np.zeros((32, 8), np.uint32), np.zeros((32, 4), np.uint32)
    for i in range(8):  # a_i: row groupID, or + 8 for i in {2, 3, 6, 7}; column 2·thread + (i & 1), + 8 for i ≥ 4
        row = np.where(i % 4 < 2, group, group + 8)
        left[:, i] = bits16(a)[row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)]
    for i in range(4):  # b_i: row 2·thread + (i & 1), + 8 for i ≥ 2; column groupID
        right[:, i] = bits16(b)[thread * 2 + (i & 1) + (8 if i >= 2 else 0), group]
    return words(left[:, 0::2] | left[:, 1::2] << 16), words(right[:, 0::2] | right[:, 1::2] << 16)


def accumulators(d):
    """The four numbers of each lane, c_i: row groupID (+ 8 for i ≥ 2), column 2·thread + (i & 1)."""
    return np.stack([d[LANES // 4 + i // 2 * 8, LANES % 4 * 2 + i % 2] for i in range(4)], axis=1)


def test_mma_multiplies_fragments(here):
    random = np.random.default_rng(0)
    a, b, d = random.normal(size=(16, 16)), random.normal(size=(16, 8)), random.normal(size=(16, 8)).astype(np.float32)
    left, right = fragments(a, b)

    def run(each):
        sums = torch.from_numpy(accumulators(d))
        launch(each, "mma", sums, left, right)
        return sums

    rounded = [torch.from_numpy(x).bfloat16().double().numpy() for x in (a, b)]
    expected = torch.from_numpy(accumulators(d + rounded[0] @ rounded[1]))
    assert difference(here.everywhere(run), expected) < 1e-13


@pytest.mark.parametrize("transposed", [0, 1])
def test_ldmatrix_hands_out_rows(here, transposed):
    numbers = np.random.default_rng(1).integers(0, 1 << 16, (4, 8, 8)).astype(np.uint32)
    data = words(numbers.reshape(32, 4, 2)[..., 0] | numbers.reshape(32, 4, 2)[..., 1] << 16)

    def run(each):
        out = each.empty((32, 4), torch.int32)
        launch(each, "matrices", out, data, transposed, shared=512)
        return out

    shown = numbers.transpose(0, 2, 1) if transposed else numbers
    pairs = shown[:, LANES // 4, LANES % 4 * 2] | shown[:, LANES // 4, LANES % 4 * 2 + 1] << 16
    assert torch.equal(here.everywhere(run), words(pairs.T))


# ---- lanes and blocks ----


def of_warp(value):
    """What the kernel `lanes` says of a warp whose lanes hold `value`."""
    odd, even = value[1::2].sum(), value[0::2].max()
    return [
        value[LANES ^ 5],
        np.full(32, value[7]),
        value[LANES * 3 % 32],
        value[np.where(LANES < 3, LANES, LANES - 3)],
        value[np.where(LANES + 9 > 31, LANES, LANES + 9)],
        np.full(32, ((value > 0) << LANES).sum()),
        np.where(LANES % 2, odd, even),
        np.full(32, (value > 90).any()),
        np.full(32, (value > -100).all()),
        np.full(32, value[2]),
        value[LANES ^ 1],
        None,
        None,
        np.ones(32),
        np.full(32, ((value % 2 == 0) << LANES).sum()),
        np.full(32, value[8]),
    ]


def test_lanes_exchange_and_vote(here):
    value = np.random.default_rng(2).integers(-100, 100, 64).astype(np.int32)

    def run(each):
        out = each.empty((64, 16), torch.int32)
        launch(each, "lanes", out, torch.from_numpy(value), threads=64)
        return out

    out = here.everywhere(run).numpy()
    for warp in range(2):
        for column, expected in enumerate(of_warp(value[warp * 32 :][:32].astype(np.int64))):
            if expected is not None:
                shown = out[warp * 32 :][:32, column]
                assert (shown == expected.astype(np.uint64).astype(np.uint32).view(np.int32)).all(), f"column {column}"
    assert (out[:, 11] == int((value > 95).any())).all()
    assert (out[:, 12] == 0).all()


def butterfly(x):
    for mask in (16, 8, 4, 2, 1):
        x = x + x[..., LANES ^ mask]
    return x


def test_sums_have_one_order(here):
    value = np.random.default_rng(3).normal(size=(4, 32)).astype(np.float32)

    def run(each):
        out = each.empty((4, 32, 4), torch.float32)
        launch(each, "sums", out, torch.from_numpy(value), threads=128, shared=16)
        return out

    out = here.everywhere(run).numpy()
    sums = butterfly(value)
    total = ((sums[0, 0] + sums[1, 0]) + sums[2, 0]) + sums[3, 0]
    assert (out[..., 0] == sums).all()
    assert (out[..., 1] == value.max(axis=1, keepdims=True)).all()
    assert (out[..., 2] == total).all()
    assert (out[..., 3] == value.max()).all()


def test_atomics_of_two_workers_lose_nothing(launcher):
    blocks, count = 200, 12800
    counters, taken, total, most = ints(5), ints(count), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    launch(launcher, "atomics", counters, taken, total, most, grid=blocks, threads=64)
    index = np.arange(count)
    assert sorted(taken.tolist()) == list(range(count))
    assert counters.tolist()[:2] == [count, (index * 7919 % 4093).max()]
    assert 1 <= counters[2] <= count
    assert counters.tolist()[3:] == [-(count - 1), 0x7FFFFFFF]
    assert most.item() == (count - 1) << 33
    assert total.item() == count / 2


def test_the_last_block_sees_all_and_leaves_the_counter_at_zero(here):
    def run(each, **how):
        out, parts = each.empty((1,), torch.float32), each.empty((50,), torch.float32)
        counter, wins = ints(1), ints(1)
        launch(each, "arrivals", out, parts, counter, wins, grid=50, threads=64, **how)
        return out, counter, wins

    out, counter, wins = here.everywhere(run)
    assert (counter.item(), wins.item()) == (0, 64)
    assert out.item() == np.cumsum(1 / np.arange(1, 51, dtype=np.float32), dtype=np.float32)[-1]
    assert here.everywhere(partial(run, cooperative=True))[0].item() == out.item()
    before, text = "    block_barrier(FWD_ONLY_PASS);\n    bool last", (sources.home() / "common.cuh").read_text()
    assert before in text
    hasty = here.mutated("primitives.cu", "arrivals", "arrivals")
    (hasty.folder / "common.cuh").write_text(text.replace(before, "    bool last"))
    with pytest.raises(AssertionError, match="depends on thread order"):
        hasty.everywhere(partial(run, cooperative=True))  # their blocks take turns at every barrier


# ---- copies ----


def test_cp_async_is_there_after_the_wait(here):
    data = torch.arange(128, dtype=torch.int32).view(32, 4)

    def run(each):
        out = each.empty((128, 4), torch.int32)
        launch(each, "late", out, data, 1, shared=1536)
        return out[:32], out[64:96], out[96:, 0]

    first, second, third = here.everywhere(run)
    even = torch.arange(32) % 2 == 0
    assert torch.equal(first, data)
    assert torch.equal(second, torch.where(even[:, None], data, 0))
    assert torch.equal(third, torch.where(even, data[:, 0], 0))


def test_cp_async_is_not_there_before(here):
    data = torch.arange(128, dtype=torch.int32).view(32, 4)
    early = []
    for seed in SEEDS:
        each = HostLauncher(seed, folder=FOLDER)
        out = each.empty((128, 4), torch.int32)
        launch(each, "late", out, data, 0, shared=1536)
        assert torch.equal(out[64:96:2], data[::2])
        early.append((out[:32] == data).all(dim=1).float().mean().item())
    assert all(0 < share < 0.9 for share in early)
    assert len(set(early)) > 1


def test_bulk_copies_are_counted_by_phases(here):
    data = torch.randint(-99, 99, (5, 128), dtype=torch.int32, generator=torch.Generator().manual_seed(0))

    def run(each, waits=1):
        out = each.empty((32,), torch.int32)
        launch(each, "ring", out, data, 5, waits, shared=128 + 1024)
        return out

    expected = (data.view(5, 32, 4).sum(dim=2) * torch.arange(1, 6)[:, None]).sum(dim=0).int()
    assert torch.equal(here.everywhere(run), expected)
    with pytest.raises((AssertionError, KernelError), match=r"depends on thread order|one arrival too many"):
        here.everywhere(lambda each: run(each, waits=0), count=4)


# ---- grids ----


def test_a_cooperative_grid_meets(here):
    def run(each):
        cells, state = torch.arange(4 * 64, dtype=torch.int32), ints(1)
        launch(each, "meetings", cells, state, 3, grid=4, threads=64, cooperative=True)
        return cells, state

    expected = np.arange(256)
    for _ in range(3):
        expected = np.roll(expected, -1) + np.roll(expected, 64)
    cells, state = here.everywhere(run)
    assert (cells.numpy() == expected).all()
    assert state.item() & 0x7FFFFFFF == 0


def test_a_block_waits_for_what_another_releases(here):
    def run(each):
        flag, out = ints(1), each.empty((64,), torch.int32)
        launch(each, "signal", flag, out, grid=2, threads=64, cooperative=True)
        return out

    assert (here.everywhere(run) == 42).all()


def test_the_order_is_the_seeds(here):
    def order(seed, workers=1):
        counter, out = ints(1), ints(2 * 64 * 6)
        launch(HostLauncher(seed, folder=FOLDER, workers=workers), "order", out, counter, grid=6, threads=64)
        assert sorted(out.tolist()) == sorted([*range(384), *range(384)])
        return out.tolist()

    orders = [order(seed) for seed in SEEDS]
    assert len({tuple(each) for each in orders}) == len(orders)
    assert orders == [order(seed) for seed in SEEDS]
    first = [[entry // 64 for entry in each][::128] for each in orders]
    assert len({tuple(each) for each in first}) > 4, "blocks start in one order"
    assert len({each[0] % 64 for each in orders}) > 4, "threads start in one order"
    order(1, workers=2)


# ---- numbers ----


def test_noise_is_that_of_the_reference(here):
    seeds, position = [0, 1, 0x9E3779B97F4A7C15, (1 << 64) - 1], 77
    signed = torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64))

    def run(each):
        out = each.empty((256,), torch.int32), each.empty((256,), torch.float64)
        launch(each, "noise", *out, signed, position, grid=4, threads=64)
        return out

    shown, values = here.everywhere(run)
    for i, seed in enumerate(seeds):
        tokens = np.arange(64 * i, 64 * i + 64)
        zero = np.zeros(64, np.uint64)
        counter = (tokens.astype(np.uint64), zero + np.uint64(position), zero, zero)
        expected = noise.philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))[0]
        assert (shown.numpy().view(np.uint32)[tokens] == expected).all()
        np.testing.assert_allclose(values.numpy()[tokens], noise.gumbel(seed, position, tokens), rtol=1e-14, atol=1e-15)


def test_numbers_round_as_torch_rounds(here):
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(128, 8, generator=generator) * torch.tensor([1e-3, 1, 3, 1e2, 1e4, 1e20, 1e38, 1e-39])
    values[0, :4] = torch.tensor([float("inf"), -0.0, 1.00390625, 1.01171875])  # the last two are ties

    def run(each):
        out = each.empty((128, 16), torch.int32)
        launch(each, "numbers", out, values, grid=2, threads=64)
        return out[:, :16]

    out = here.everywhere(run)
    packed = out[:, :4].contiguous().view(torch.bfloat16)
    assert torch.equal(packed, values.bfloat16())
    finite = values.isfinite()
    assert (out[:, 4:12].view(torch.float32)[finite] == 0).all()
    eighths = out[:, 12].contiguous().view(torch.float32)
    assert torch.equal(eighths, values[:, 0].clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert set(out[:, 13].contiguous().view(torch.float32).abs().tolist()) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}
    assert out[0, 14].item() == 0x07010205
    assert out[0, 15].item() == 0x88112233 - (1 << 32)


def test_subnormals_are_zero_where_the_device_build_flushes_them(launcher):
    out = launcher.empty((5,), torch.float32)
    launch(launcher, "tiny", out, 2.0**-126, 0x00010001)
    assert out.tolist() == [0, 0, 0, 2.0**-133, 16 * 2.0**-133 * 2.0**126]
    assert torch.tensor(2.0**-126).mul(0.5).item() == 2.0**-127, "the caller's own arithmetic is as before"


# ---- what is undefined ----


def test_poison_is_in_outputs_and_shared_memory(here):
    assert HostLauncher().empty((3,), torch.bfloat16).isnan().all()
    assert (HostLauncher(poison=0x3F).empty((2, 3), torch.int32) == 0x3F3F3F3F).all()
    assert HostLauncher().empty((), torch.float32).isnan()

    def run(each, place):
        out = each.empty((32,), torch.float32)
        launch(each, "unwritten", out, torch.ones(32), place, shared=124)
        return out

    assert (here.everywhere(lambda each: run(each, 32)) == 1).all()
    for place in (0, 31, -1):  # the last two lie around it
        with pytest.raises(AssertionError, match="what was in memory before"):
            here.everywhere(lambda each, place=place: run(each, place))
    assert run(HostLauncher(folder=FOLDER), 0).isnan().all()


def test_a_dropped_barrier_is_caught(here):
    value = torch.randn(64, generator=torch.Generator().manual_seed(5))

    def run(each):
        out = each.empty((64,), torch.float32)
        launch(each, "exchange", out, value, threads=64, shared=256)
        return out

    assert torch.equal(here.everywhere(run), value.flip(0))
    mutant = here.mutated(
        "primitives.cu", "    block_barrier();\n    out[threadIdx.x] = cells", "    out[threadIdx.x] = cells"
    )
    with pytest.raises(AssertionError, match="depends on thread order"):
        mutant.everywhere(run)


# ---- launches that overlap ----


def hasty(each, first=(0, 0), second=(0, 0), **how):
    """Two kernels, each with whether it reads and writes before it waits."""
    middle, out = each.empty((256,), torch.float32), each.empty((256,), torch.float32)
    launch(each, "hasty", middle, torch.arange(256.0), *first, grid=4, threads=64, **how)
    launch(each, "hasty", out, middle, *second, grid=4, threads=64, **how)
    return out


def test_a_kernel_waits_for_the_one_before(here):
    for how in ({}, {"cooperative": True}):
        assert torch.equal(here.everywhere(lambda each, how=how: hasty(each, **how)), torch.arange(256.0))
    assert torch.equal(here.everywhere(lambda each: hasty(each, first=(1, 0))), torch.arange(256.0)), "a weight"
    with pytest.raises(AssertionError, match="depends on thread order"):
        here.everywhere(lambda each: hasty(each, second=(1, 0)))
    with pytest.raises(KernelError, match=r"kernel hasty, block .* writes before grid_dependency_wait, at byte \d+"):
        here.everywhere(lambda each: hasty(each, first=(0, 1)))


def test_overlapping_launches_see_views_once(here):
    launcher = HostLauncher(dependent=True, folder=FOLDER)
    memory = torch.arange(512.0)
    launch(launcher, "hasty", memory[100:356], memory[:256], 0, 0, grid=1, threads=64)
    assert memory[100:164].tolist() == list(range(64))
    assert memory[164:].tolist() == list(range(164, 512))


# ---- launches ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1), torch.zeros(1)), "takes 3 arguments, not 2"),
        ((torch.zeros(1), torch.zeros(1), 1.0), "argument 2 is an int, not 1.0"),
        ((torch.zeros(1), 3, 1), "argument 1 is a pointer, not 3"),
        ((torch.zeros(1), None, 1 << 31), "kernel unwritten: "),
        ((torch.zeros(1), torch.zeros(1, device="meta"), 1), "argument 1 is on meta"),
    ],
)
def test_arguments_are_checked(launcher, arguments, message):
    with pytest.raises(KernelError, match=message):
        launch(launcher, "unwritten", *arguments)


def test_launches_are_checked(launcher):
    out = torch.zeros(1)
    for wrong, message in [
        ({"threads": 33}, "33 threads a block"),
        ({"threads": 2048}, "2048 threads a block"),
        ({"grid": (0, 1, 1)}, "a grid of"),
        ({"grid": (1, 1 << 16, 1)}, "a grid of"),
        ({"shared": 1 << 20}, "1048576 bytes of shared memory, it may take 232448"),
        ({"grid": 1000, "threads": 1024, "cooperative": True}, "more than 16384 threads"),
    ]:
        with pytest.raises(KernelError, match=message):
            launch(launcher, "nothing", out, **wrong)
    with pytest.raises(KernelError, match="no kernel other"):
        launch(launcher, "other", out)
    launch(launcher, "nothing", out, shared=227 * 1024, threads=1024)
    assert out.item() == 1


def test_two_launchers_take_turns(here):
    outs = [each.empty((1,), torch.float32) for each in here.launchers(2)]
    for each, out in zip(here.launchers(2), outs, strict=True):
        launch(each, "nothing", out)
    assert [out.item() for out in outs] == [1, 1]


def test_text_that_does_not_compile_is_one_line(here):
    broken = here.mutated("primitives.cu", "store_shared(", "no_such_thing(")
    with pytest.raises(KernelError, match=r"primitives.cu does not compile for the CPU: .*no_such_thing.*") as caught:
        launch(broken.launcher, "nothing", torch.zeros(1))
    assert "\n" not in caught.value.message
    unfit = here.mutated("primitives.cu", "nothing(float* out)", "nothing(double* out, double x)")
    with pytest.raises(KernelError, match="parameters of kernels are pointers, int and float"):
        launch(unfit.launcher, "nothing", torch.zeros(1))


@pytest.fixture
def fresh(monkeypatch):
    """Nothing is remembered of earlier builds."""
    for cached in (gxx.build, gxx._compiler):
        monkeypatch.setattr(gxx, cached.__name__, cached.__wrapped__)
    return monkeypatch


def test_what_is_missing_is_named(fresh, tmp_path):
    fresh.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelError, match=r"no-such-compiler is not found: install g\+\+ or set CXX"):
        gxx.build(FOLDER / "wrong.cu")
    fresh.delenv("CXX")
    (tmp_path / "file").touch()
    fresh.setenv("CACHE_DIRECTORY", str(tmp_path / "file"))
    with pytest.raises(KernelError, match=r"cannot be written .*: set CACHE_DIRECTORY"):
        gxx.build(FOLDER / "wrong.cu")
    fresh.setattr(gxx.platform, "machine", lambda: "riscv64")
    with pytest.raises(KernelError, match="on x86-64 CPUs, not on riscv64: use --device cpu"):
        gxx.build(FOLDER / "wrong.cu")


def test_headers_of_a_whole_toolkit_do_as_well(fresh, tmp_path):
    """It brings a `crt/host_defines.h` beside them, whose words mean something else to g++."""
    whole = shutil.copytree(sources.toolkit("nv/target"), tmp_path / "include")
    real = "#ifndef __HOST_DEFINES_H__\n#define __HOST_DEFINES_H__\n#define __global__ nothing of the kind\n#endif\n"
    (whole / "crt").mkdir(exist_ok=True)
    (whole / "crt/host_defines.h").write_text(real)
    fresh.setattr(sources, "_toolkits", lambda: [whole])
    fresh.setenv("CACHE_DIRECTORY", str(tmp_path / "cache"))

    assert gxx.build(FOLDER / "wrong.cu").is_file()


def test_a_build_is_kept_until_its_text_changes(fresh, tmp_path):
    fresh.setenv("CACHE_DIRECTORY", str(tmp_path / "cache"))
    source = shutil.copy(FOLDER / "wrong.cu", tmp_path)
    first = gxx.build(Path(source))
    assert first.parent.parent == tmp_path / "cache/host"
    assert gxx.build(Path(source)) == first
    Path(source).write_text(Path(source).read_text() + "// more\n")
    assert gxx.build(Path(source)) != first
    first.write_bytes(b"no library")
    with pytest.raises(KernelError, match="remove its folder, and it is built again"):
        host._load(first)


# ---- speed, shown with -s; no test of it ----


def test_speed(here):
    launcher = here.launcher
    weight, x = torch.randn(256, 1024).bfloat16(), torch.randn(1024).bfloat16()
    out = launcher.empty((256,), torch.float32)
    took = {}
    for name, arguments, how in (
        ("nothing", (out,), {}),
        ("gemv", (out, weight, x, 1024), {"grid": 64, "threads": 128}),
    ):
        times = []
        for _ in range(10):
            began = time.perf_counter()
            launch(launcher, name, *arguments, **how)
            times.append(time.perf_counter() - began)
        took[name] = min(times) * 1e3
    assert difference(out, weight.float() @ x.float()) < 1e-9
    print(f"ms a launch: {took['nothing']:.3f} of nothing, {took['gemv']:.2f} of a 256×1024 product")  # noqa: T201

"""Every kernel of `cuda/` for every architecture: compiled, in the table, within its bounds, without a spill."""

import os
import re

import pytest

from fwd.errors import KernelError
from fwd.kernels import paged_attention as decode
from fwd.kernels import prefill, sources
from fwd.kernels.builds import ARCHES, BUILDS, MAX_BUILDS, SHARED_LIMIT, shared_bound
from fwd.kernels.gpu import ARCHES as SERVED
from fwd.kernels.host import HostLauncher
from fwd.kernels.jit import Jit
from fwd.kernels.launch import Kernel

FILES = sorted(sources.home().glob("*.cu*"))
PAIRS = [(source, arch) for source in BUILDS for arch in ARCHES]


@pytest.fixture(scope="session")
def builds(request):
    """All builds by (file, architecture), kept between sessions while their sources stand."""
    jit = Jit(request.config.cache.mkdir("fwd"))
    found = {(each.record.source, each.record.arch): each.record for each in jit.builds(ARCHES, os.cpu_count() or 1)}
    for each in jit.kept():
        if jit.stale(each):
            sources.discard(each.path.parent)
    return found


def test_the_table_is_of_these_files():
    assert sorted(BUILDS) == sorted(file.name for file in sources.home().glob("*.cu"))
    assert sum(map(len, BUILDS.values())) * len(ARCHES) <= MAX_BUILDS
    assert set(SERVED.values()) == set(ARCHES)


@pytest.mark.parametrize(("source", "arch"), PAIRS)
def test_a_build(builds, source, arch):
    record = builds[source, arch]
    assert set(record.kernels) == set(BUILDS[source]), "the table and the file name other kernels"
    assert record.warnings == ()
    over = {
        name: f"{usage} of {BUILDS[source][name]}"
        for name, usage in record.kernels.items()
        if usage.registers > BUILDS[source][name].registers or usage.spills or usage.stack or usage.shared
    }
    assert not over


def test_the_table_says_what_blocks_take():
    """What depends on the head size alone stands there exactly; normed rows take what there is."""
    for dim in (64, 128, 256):
        for kv, size in (("bf16", 2), ("fp8", 1)):
            assert shared_bound("paged_attention.cu", f"decode_attention_{kv}_{dim}") == decode.shared_bytes(dim)
            assert shared_bound("prefill.cu", f"prefill_attention_{kv}_{dim}") == prefill.shared_bytes(dim, size)
    assert shared_bound("gemv.cu", "head_8") == SHARED_LIMIT == shared_bound("other.cu", "head_8")


def test_a_launch_that_takes_more_is_refused():
    with pytest.raises(KernelError, match="20480 bytes of shared memory, it may take 10240"):
        HostLauncher().launch(Kernel("gemv.cu", "linear_1x8"), (1, 1, 1), 256, 20480, *[None] * 5, 1, 32, 16)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_one_file_speaks_ptx_and_no_shared_memory_is_static(file):
    text = re.sub(r"//.*", "", file.read_text())
    assert file.name == "ptx.cuh" or not re.search(r"\basm\b", text)
    assert file.name == "ptx.cuh" or "__shared__" not in text


@pytest.mark.parametrize("source", BUILDS)
def test_every_kernel_bounds_its_threads(source):
    files = set(sources.closure(sources.home() / source, ())) & set(FILES)
    text = re.sub(r"//.*", "", "".join(file.read_text() for file in files))
    assert text.count("__global__") == len(re.findall(r"__global__ void __launch_bounds__\(", text)) > 0

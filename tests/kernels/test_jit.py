"""Builds of kernels: right by name, whole or not there, and what helps where they cannot be made."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from fwd.errors import KernelError
from fwd.kernels import nvrtc, sources
from fwd.kernels.builds import Bound
from fwd.kernels.jit import CUBIN, RECORD, Jit

ROOT = Path(__file__).resolve().parents[2]
KERNEL = """#include "part.cuh"
extern "C" __global__ void __launch_bounds__(64) some(float* x, int n) { x[threadIdx.x] = part(x[n]); }
"""
PART = """#pragma once
#include <cuda_bf16.h>
#include "constant.cuh"
__device__ inline float part(float x) { return x * CONSTANT; }
"""
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spills(float* x) {
    float kept[90];
#pragma unroll
    for (int i = 0; i < 90; i++) kept[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 90; i++) x[(89 - i) * 1024 + threadIdx.x] = kept[i] * kept[i * 7 % 90];
}
__device__ __noinline__ float picks(const float* x, int n) {
    float kept[60], sum = 0;
    for (int i = 0; i < 60; i++) kept[i] = x[i];
    for (int i = 0; i < n; i++) sum += kept[i * 7 % 60];
    return sum;
}
extern "C" __global__ void __launch_bounds__(256) shares(float* x) {
    __shared__ float all[100];
    all[threadIdx.x % 100] = picks(x, threadIdx.x);
    __syncthreads();
    x[threadIdx.x] = all[3];
}
"""


@pytest.fixture
def folder(tmp_path):
    """Sources of a kernel in three files."""
    made = tmp_path / "sources"
    made.mkdir()
    (made / "some.cu").write_text(KERNEL)
    (made / "part.cuh").write_text(PART)
    (made / "constant.cuh").write_text("#define CONSTANT 2\n")
    return made


@pytest.fixture
def make(folder, tmp_path):
    """A `Jit` of those sources and one cache."""

    def made(**settings):
        table = {"some.cu": {"some": Bound(32)}}
        return Jit(**{"cache": tmp_path / "cache", "folder": folder, "table": table, **settings})

    return made


@pytest.fixture
def uncompiled(monkeypatch):
    """From when it is called on a build is an error."""
    return lambda: monkeypatch.setattr(nvrtc, "compile_cubin", lambda *_: pytest.fail("compiled"))


@pytest.fixture
def no_nvrtc(monkeypatch):
    """From when it is called on the compiler's library is not there."""

    class Absent:
        def __getattr__(self, name):
            raise RuntimeError('Failure finding "libnvrtc.so"')

    return lambda: monkeypatch.setattr(nvrtc, "_nvrtc", Absent)


def places(made):
    return sorted(made.cache.iterdir()) if made.cache.exists() else []


def test_a_build_and_its_record(make):
    assert make().trouble("sm_90a") is None
    built = make().build("some.cu", "sm_90a")
    record = built.record
    assert built.fresh
    assert built.path.read_bytes().startswith(b"\x7fELF")
    assert (record.source, record.arch, record.compiler) == ("some.cu", "sm_90a", nvrtc.version())
    assert record.options == ("-std=c++17", "-ftz=true", "--ptxas-options=-v", "-arch=sm_90a")
    assert record.kernels == {
        "some": nvrtc.Usage(registers=record.kernels["some"].registers, stack=0, spills=0, shared=0)
    }
    assert 0 < record.kernels["some"].registers <= 32
    assert record.warnings == ()
    assert json.loads((built.path.parent / RECORD).read_text())["length"] == built.path.stat().st_size
    assert built.path.parent.stat().st_mode & 0o777 == 0o755


def test_what_is_built_is_not_built_again(make, uncompiled):
    first = make().build("some.cu", "sm_100a")
    uncompiled()
    assert make().build("some.cu", "sm_100a") == first._replace(fresh=False)
    assert [each.record for each in make().builds(["sm_100a"], 2)] == [first.record]


def test_sources_in_another_place_are_the_same(make, folder, tmp_path, uncompiled):
    first = make().build("some.cu", "sm_90a")
    shutil.copytree(folder, tmp_path / "elsewhere")
    uncompiled()
    assert make(folder=tmp_path / "elsewhere").build("some.cu", "sm_90a").path == first.path


@pytest.mark.parametrize("changed", ["some.cu", "part.cuh", "constant.cuh", "arch", "debug", "compiler", "toolkit"])
def test_what_a_build_depends_on(make, folder, tmp_path, monkeypatch, changed):
    first, arch, settings = make().build("some.cu", "sm_90a"), "sm_90a", {}
    match changed:
        case "arch":
            arch = "sm_100a"
        case "debug":
            settings = {"debug": True}
        case "compiler":
            monkeypatch.setattr(nvrtc, "version", lambda: "13.9")
        case "toolkit":
            toolkit = tmp_path / "toolkit"
            shutil.copytree(sources.toolkit(), toolkit)
            with (toolkit / "cuda_bf16.h").open("a") as header:
                header.write("// another version\n")
            monkeypatch.setattr(sources, "_toolkits", lambda: [toolkit])
        case _:
            (folder / changed).write_text((folder / changed).read_text().replace("2", "3") + "\n")
    second = make(**settings).build("some.cu", arch)
    assert second.fresh
    assert second.path != first.path
    stale = {build.path: make(**settings).stale(build) for build in make(**settings).kept()}
    assert stale == {first.path: changed != "arch", second.path: False}


def test_other_files_change_nothing(make, folder, uncompiled):
    make().build("some.cu", "sm_90a")
    (folder / "other.cuh").write_text("#error nobody includes this\n")
    uncompiled()
    assert not make().build("some.cu", "sm_90a").fresh


def truncate(place):
    cubin = (place / CUBIN).read_bytes()
    (place / CUBIN).write_bytes(cubin[: len(cubin) // 2])


def flip(place):
    cubin = bytearray((place / CUBIN).read_bytes())
    cubin[len(cubin) // 2] ^= 1
    (place / CUBIN).write_bytes(cubin)


BREAKS = {
    "truncated": truncate,
    "flipped": flip,
    "empty": lambda place: (place / CUBIN).write_bytes(b""),
    "gone": lambda place: (place / CUBIN).unlink(),
    "no record": lambda place: (place / RECORD).unlink(),
    "bad record": lambda place: (place / RECORD).write_text("{"),
    "strange record": lambda place: (place / RECORD).write_text('{"source": 1}'),
    "nothing": lambda place: [file.unlink() for file in place.iterdir()],
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_build_is_built_again_and_said_once(make, broken):
    first = make().build("some.cu", "sm_90a")
    BREAKS[broken](first.path.parent)
    assert make().kept() == []
    with capture_logs() as lines:
        second = make().build("some.cu", "sm_90a")
    assert [line["event"] for line in lines] == ["kernels_broken", "kernels_built"]
    assert lines[0]["path"] == str(first.path.parent)
    assert (second.path, second.record.sha256, second.fresh) == (first.path, first.record.sha256, True)
    assert places(make()) == [first.path.parent]


@pytest.mark.parametrize("broken", [*BREAKS, "discarded"])
def test_anothers_build_that_is_broken_does_not_stay(make, monkeypatch, broken):
    publish = sources.publish

    def raced(place, files):
        monkeypatch.undo()
        publish(place, files)
        {**BREAKS, "discarded": shutil.rmtree}[broken](place)

    monkeypatch.setattr(sources, "publish", raced)
    built = make().build("some.cu", "sm_90a")
    assert make().kept() == [built._replace(fresh=False)]


@pytest.mark.parametrize("failing", ["_write", "_sync", "_rename"])
def test_a_build_that_was_stopped_is_not_there(make, monkeypatch, failing):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources, failing, fail)
    with pytest.raises(KernelError, match=r"cannot be written .No space left on device.: give another with --cache"):
        make().build("some.cu", "sm_90a")
    assert places(make()) == []


def test_a_cache_that_cannot_be_written_is_replaced_for_this_process(make, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    made = make(fallback=True)
    with capture_logs() as lines:
        first = made.build("some.cu", "sm_90a")
        assert made.build("some.cu", "sm_90a") == first._replace(fresh=False)
        made.build("some.cu", "sm_100a")
    assert [line["event"] for line in lines] == ["kernels_built", "kernel_cache_unwritable", "kernels_built"]
    assert first.path.read_bytes().startswith(b"\x7fELF")
    assert not first.path.is_relative_to(tmp_path / "cache")
    assert first.path.parents[1].stat().st_mode & 0o77 == 0
    with pytest.raises(KernelError, match="give another with --cache or CACHE_DIRECTORY"):
        make().build("some.cu", "sm_90a")
    del made
    assert not first.path.exists()


def test_a_broken_build_that_cannot_be_removed_does_not_serve(make, monkeypatch):
    first = make().build("some.cu", "sm_90a")
    truncate(first.path.parent)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(sources, "discard", refuse)
    made = make(fallback=True)
    second = made.build("some.cu", "sm_90a")
    assert second.path != first.path
    assert second.record.sha256 == first.record.sha256
    assert made.build("some.cu", "sm_90a").path == second.path


def test_what_a_killed_builder_left_is_not_listed_and_goes(make):
    first = make().build("some.cu", "sm_90a")
    young, old = (first.path.parents[1] / f".draft-{name}" for name in ("young", "old"))
    for draft in (young, old):
        shutil.copytree(first.path.parent, draft)
    os.utime(old, (0, 0))
    assert make().kept() == [first._replace(fresh=False)]
    second = make().build("some.cu", "sm_100a")
    assert places(make()) == sorted([young, first.path.parent, second.path.parent])


def test_builders_at_once(make):
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: make().build("some.cu", "sm_90a"), range(8)))
    assert len({build.path for build in built}) == 1
    assert len({build.record.sha256 for build in built}) == 1
    assert places(make()) == [built[0].path.parent]


def test_processes_at_once(make, folder):
    made = make()
    script = (
        "import sys; from pathlib import Path; from fwd.kernels.jit import Jit;"
        "cache, folder = map(Path, sys.argv[1:]);"
        "[Jit(cache, folder=folder, table={'some.cu': {}}).build('some.cu', arch) for arch in ('sm_90a', 'sm_100a')]"
    )
    command = (sys.executable, "-c", script, made.cache.parent, folder)
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert len(places(made)) == 2
    assert [build.record.arch for build in made.kept()] == ["sm_100a", "sm_90a"]


def test_without_a_compiler_what_is_built_serves(make, folder, no_nvrtc):
    first = make().build("some.cu", "sm_90a")
    no_nvrtc()
    made = make()
    assert made.build("some.cu", "sm_90a") == first._replace(fresh=False)
    assert made.trouble("sm_90a") is None
    assert made.trouble("sm_100a").startswith("NVRTC is not installed")
    assert not made.stale(first)
    (folder / "constant.cuh").write_text("#define CONSTANT 3\n")
    assert made.stale(first)
    with pytest.raises(KernelError, match="NVRTC is not installed, which builds kernels: run `pip install") as caught:
        made.build("some.cu", "sm_90a")
    assert (caught.value.exit_code, "\n" in caught.value.message) == (6, False)


def test_without_a_compiler_a_broken_build_does_not_serve(make, no_nvrtc):
    truncate(make().build("some.cu", "sm_90a").path.parent)
    no_nvrtc()
    with pytest.raises(KernelError, match="NVRTC is not installed"):
        make().build("some.cu", "sm_90a")


def test_without_headers_what_is_built_serves(make, monkeypatch):
    first = make().build("some.cu", "sm_90a")
    monkeypatch.setattr(sources, "_toolkits", list)
    assert make().build("some.cu", "sm_90a") == first._replace(fresh=False)
    assert (make().trouble("sm_90a"), "headers of CUDA" in make().trouble("sm_100a")) == (None, True)
    with pytest.raises(KernelError, match=r"headers of CUDA .cuda_bf16.h. are not found: install them with `pip"):
        make().build("some.cu", "sm_100a")


def test_without_bindings(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(KernelError, match="cuda-bindings is not installed, by which kernels are built: run `pip"):
        make().build("some.cu", "sm_90a")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('extern "C" __global__ void a(float* x) { x[0] = y; }\n', 'some.cu(1): error: identifier "y" is undefined'),
        ("#include <nothing.h>\n", 'some.cu(1): catastrophic error: cannot open source file "nothing.h"'),
        ('extern "C" __global__ void some() { asm volatile("no.such;"); }\n', "error : Unknown modifier"),
    ],
    ids=["text", "header", "instruction"],
)
def test_text_that_does_not_compile_is_one_line(make, folder, text, said):
    (folder / "some.cu").write_text(text)
    with pytest.raises(KernelError) as caught:
        make().build("some.cu", "sm_90a")
    assert caught.value.message.startswith("some.cu does not compile: ")
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert places(make()) == []


def test_an_architecture_that_the_compiler_does_not_know(make):
    with pytest.raises(KernelError, match=r"some.cu does not compile: nvrtc: error: invalid value"):
        make().build("some.cu", "sm_12345")


def test_a_source_that_changes_under_the_compiler(make, folder, monkeypatch):
    compiled = nvrtc.compile_cubin

    def edited(*arguments):
        (folder / "constant.cuh").write_text("#define CONSTANT 4\n")
        return compiled(*arguments)

    monkeypatch.setattr(nvrtc, "compile_cubin", edited)
    with pytest.raises(KernelError, match=r"some.cu changed while it was built: start again"):
        make().build("some.cu", "sm_90a")
    assert make().build("some.cu", "sm_90a").fresh


def test_what_a_kernel_takes_stands_in_the_log(make, folder):
    (folder / "some.cu").write_text(SPILLING)
    kernels = make().build("some.cu", "sm_90a").record.kernels
    assert kernels["spills"].spills > 0
    assert kernels["spills"].registers == 64
    assert kernels["shares"].shared == 400
    assert kernels["shares"].stack >= 240


def test_warnings_are_kept(make, folder):
    (folder / "some.cu").write_text('extern "C" __global__ void some(float* x) { int nobody; x[0] = 1; }\n')
    (warning,) = make().build("some.cu", "sm_90a").record.warnings
    assert 'some.cu(1): warning #177-D: variable "nobody" was declared but never referenced' in warning


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHE_DIRECTORY", "/var/cache/fwd:/var/cache/other")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.cache("kernels") == Path("/var/cache/fwd/kernels")
    assert Jit(folder=ROOT).cache == Path("/var/cache/fwd/kernels")
    assert Jit(tmp_path, folder=ROOT).cache == tmp_path / "kernels"
    monkeypatch.delenv("CACHE_DIRECTORY")
    assert sources.cache("host") == Path("/x/fwd/host")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.cache("kernels") == tmp_path / ".cache/fwd/kernels"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(KernelError, match="no home folder for the kernel cache: set CACHE_DIRECTORY"):
        sources.cache("kernels")


def test_where_the_headers_are(monkeypatch, tmp_path):
    assert (sources.toolkit() / "cuda_bf16.h").is_file()
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: None)
    (tmp_path / "include").mkdir()
    (tmp_path / "include/cuda_bf16.h").write_text("")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sources.toolkit() == tmp_path / "include"


def test_headers_that_are_incomplete_are_passed_over(monkeypatch, tmp_path):
    for folder, headers in {"torch's": ["cuda_bf16.h"], "whole": ["cuda_bf16.h", "nv/target"]}.items():
        for header in headers:
            (tmp_path / folder / header).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / header).write_text("")
    monkeypatch.setattr(sources, "_toolkits", lambda: [tmp_path / "torch's", tmp_path / "whole"])

    assert sources.toolkit() == tmp_path / "torch's"
    assert sources.toolkit("nv/target") == tmp_path / "whole"
    with pytest.raises(KernelError, match=r"\(cuda_bf16.h and nv/other\) are not found"):
        sources.toolkit("nv/other")


def test_includes_are_followed(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.cu").write_text(
        '#include "deep/b.cuh"\n  #  include <c.cuh>\n#include <cstdint>\n// #include "d.cuh"\n'
    )
    (tmp_path / "deep/b.cuh").write_text('#include "../c.cuh"\n#include "a.cu"\n')
    (tmp_path / "c.cuh").write_text('#include "deep/b.cuh"\n')
    (tmp_path / "d.cuh").write_text("")
    found = sources.closure(tmp_path / "a.cu", (tmp_path,))
    assert sorted(file.name for file in found) == ["a.cu", "b.cuh", "c.cuh"]


def test_the_front_needs_no_torch_to_build():
    script = "import sys, fwd.kernels.jit, fwd.cli.kernels; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False\n"

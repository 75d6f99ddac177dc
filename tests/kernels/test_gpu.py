"""What is said of a GPU that is there, is not there, or cannot be used; and how kernels are launched on one.

There is no GPU: the libraries of its driver are stand-ins, through which the real `cuda-bindings` launches.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fake_gpu
import pytest

from fwd.engine.device import GPUS
from fwd.engine.device import gpu as device_of
from fwd.errors import KernelError
from fwd.kernels import cuda, gpu, nvml
from fwd.kernels.gpu import Facts, held, probe, usable
from fwd.kernels.jit import Jit

ROOT = Path(__file__).resolve().parents[2]
H100 = Facts(
    visible=True,
    driver=13000,
    devices=1,
    name="NVIDIA H100 80GB HBM3",
    uuid="00010203-0405-0607-0809-0a0b0c0d0e0f",
    capability=(9, 0),
    memory=85_000_000_000,
    free=41_000_000_000,
    bandwidth=3.35232e12,
    multiprocessors=132,
    shared_limit=232448,
    torch="2.13.0",
    torch_cuda="13.0",
)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    fake_gpu.build(folder)
    return folder


@pytest.fixture
def driver(libraries, monkeypatch):
    """A machine with one H100, half of which others hold; torch and packages as they are here."""
    monkeypatch.setattr(gpu, "LIBCUDA", str(libraries / "libcuda.so.1"))
    monkeypatch.setattr(nvml, "LIBNVML", str(libraries / "libnvidia-ml.so.1"))
    monkeypatch.setenv("FAKE_OURS", str(os.getpid()))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_a_gpu_is_known_by_its_driver(driver):
    here = probe()
    assert replace(here, torch=H100.torch, torch_cuda=H100.torch_cuda, missing=()) == H100
    assert (H100.arch, replace(H100, capability=(10, 0)).arch) == ("sm_90a", "sm_100a")
    assert usable(H100) is None


def test_without_nvml_all_memory_counts_as_free(driver):
    driver.setenv("FAKE_NVML", "9")
    assert probe().free == H100.memory
    assert held(H100) == ""
    driver.setattr(nvml, "LIBNVML", "/nowhere")
    assert probe().free == H100.memory
    assert held(H100) == ""


def test_who_holds_the_memory(driver):
    """The greatest first, not ourselves; a process of another container has no name, and some say no number."""
    name = Path("/proc/1/comm").read_text().strip()
    said = f"by pid 4194309 with 40,000 and pid 1 ({name}) with 4,000 and pid 4194310: stop what is not needed"
    assert held(H100) == f"44,000,000,000 of its 85,000,000,000 bytes are taken, {said}"
    assert held(replace(H100, uuid="another")) == ""


def test_a_plan_knows_the_gpu_that_is_here():
    device = device_of(H100)
    assert (device.name, device.memory) == (H100.name, H100.free)
    assert device.bandwidth == pytest.approx(GPUS["h100"].bandwidth, rel=0.01)
    assert (device.chunk, device.graphs, device.reserve) == (512, GPUS["h100"].graphs, GPUS["h100"].reserve)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"FAKE_DRIVER": "12080"}, "the CUDA driver is for CUDA 12.8, fwd needs 13.0: install NVIDIA's driver 580"),
        ({"FAKE_INIT": "100"}, "finds no GPU (CUDA_ERROR_NO_DEVICE): see what nvidia-smi says"),
        ({"FAKE_INIT": "802"}, "finds no GPU (CUDA_ERROR_SYSTEM_NOT_READY)"),
        ({"FAKE_COUNT": "0"}, "finds no GPU (no device)"),
        ({"FAKE_COUNT": "0", "CUDA_VISIBLE_DEVICES": ""}, "finds no GPU (no device, CUDA_VISIBLE_DEVICES=)"),
        (
            {"FAKE_MAJOR": "8", "FAKE_NAME": "NVIDIA A100"},
            "need an H100, H200 or B200 (compute capability 9.0 or 10.0), this is NVIDIA A100 (8.0): use --device cpu",
        ),
        ({"FAKE_MAJOR": "12", "FAKE_NAME": "RTX"}, "this is RTX (12.0)"),
        ({"FAKE_MAJOR": "10", "FAKE_MINOR": "3", "FAKE_NAME": "B300"}, "this is B300 (10.3)"),
    ],
    ids=str,
)
def test_a_gpu_that_cannot_be_used(driver, environment, said):
    for name, value in environment.items():
        driver.setenv(name, value)
    line = usable(probe())
    assert said in line
    assert "use --device cpu" in line
    assert "\n" not in line


def test_a_machine_without_a_driver(monkeypatch):
    monkeypatch.setattr(gpu, "LIBCUDA", "libcuda-of-nobody.so")
    line = usable(probe())
    assert line == ("no CUDA driver (libcuda-of-nobody.so): install NVIDIA's driver 580 or newer, or use --device cpu")


def test_packages_that_are_missing():
    built = "torch 2.13.0+cpu is built without CUDA: install the build for CUDA 13 from PyPI, or use --device cpu"
    assert usable(replace(H100, torch="2.13.0+cpu", torch_cuda="")) == built
    wanted = "cuda-bindings and cupy-cuda13x must be installed: run `pip install 'fwd[cuda]'`, or use --device cpu"
    assert usable(replace(H100, missing=("cuda-bindings", "cupy-cuda13x"))) == wanted
    assert gpu._installed("json.decoder")
    assert not gpu._installed("json.nothing")
    assert not gpu._installed("nobody.nothing")


def test_a_hidden_gpu_is_not_visible(monkeypatch):
    monkeypatch.setattr(gpu, "LIBCUDA", "libcuda-of-nobody.so")
    monkeypatch.setattr(gpu.Path, "glob", lambda *_: iter([Path("/dev/nvidia0")]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert probe().visible
    for mask in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
        assert not probe().visible


KERNELS = """
extern "C" __global__ void one(float* x, float* y, int n, float a) { x[n] = a; }
extern "C" __global__ void two(float* x, float* y, int n, float a) { y[n] = a; }
"""
LAUNCHES = """
import contextlib, io, json, os, sys, types
from dataclasses import replace
from pathlib import Path

import torch
from fwd.errors import KernelError
from fwd.kernels import cuda
from fwd.kernels.builds import Bound
from fwd.kernels.jit import Jit
from fwd.kernels.launch import Kernel

class RawModule:  # of CuPy: the functions of a cubin at made-up addresses
    def __init__(self, path):
        assert Path(path).read_bytes().startswith(b"\\x7fELF")
    def get_function(self, name):
        address = {"one": 0x1000, "two": 0x2000}[name]
        return types.SimpleNamespace(kernel=types.SimpleNamespace(ptr=address), max_dynamic_shared_size_bytes=0)

sys.modules["cupy"] = types.SimpleNamespace(RawModule=RawModule, __spec__="fake")
cuda._start = lambda device, facts: None
cuda._stream = lambda device: 0x77
torch.Tensor.is_pinned = lambda tensor: True
folder, cache, record = map(Path, sys.argv[1:])
facts = replace(cuda.probe(), torch_cuda="13.0", missing=())
jit = Jit(cache, folder=folder, table={"some.cu": {"one": Bound(32), "two": Bound(32)}})
one, two, x = Kernel("some.cu", "one"), Kernel("some.cu", "two"), torch.empty(4)
nothing = (None, None, 0, 0.0)

def told(action, **settings):
    record.write_text("")
    launcher = cuda.CudaLauncher(**{"jit": jit, "facts": facts, **settings})
    with contextlib.redirect_stdout(io.StringIO()) as log:
        try:
            error = action(launcher)
        except (AssertionError, KernelError) as caught:
            error = str(caught)
    return {"seen": record.read_text().splitlines(), "log": log.getvalue(), "error": error, "how": launcher.how,
            "dependent": launcher.dependent, "address": x.data_ptr()}

def both(launcher):
    launcher.launch(one, (3, 2, 1), 256, 232448, x, None, -7, 1.5)
    launcher.launch(two, (132, 1, 1), 128, 0, None, x[1:], 2**31 - 1, -0.25, cooperative=True)

def twice(launcher):
    for _ in range(2):
        launcher.launch(one, (1, 1, 1), 32, 0, *nothing)

def called(*arguments, threads=32, shared=0):
    return told(lambda launcher: launcher.launch(one, (1, 1, 1), threads, shared, *arguments))

found = {"both": told(both), "off": told(twice, dependent=False), "wide": called(*nothing, threads=2048)}
os.environ["FAKE_REFUSAL"] = "801"
found["refused"] = told(twice)
del os.environ["FAKE_REFUSAL"]
found["wrong"] = [
    called(None, None, 0), called(None, 0, 0, 0.0), called(None, None, 0, None), called(None, None, 2**31, 0.0),
    called(*nothing, shared=232449),
]
os.environ["FAKE_MAJOR"] = "8"
try:
    cuda.CudaLauncher()
except KernelError as error:
    found["unusable"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Sources and a cache that holds their cubins."""
    folder, cache = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("cache")
    (folder / "some.cu").write_text(KERNELS)
    Jit(cache, folder=folder, table={"some.cu": {}}).build("some.cu", "sm_90a")
    return folder, cache


@pytest.fixture(scope="module")
def told(libraries, kernels, tmp_path_factory):
    """What came of each case of the script: what the driver saw, what was logged, how the launcher ended."""
    record = tmp_path_factory.mktemp("record") / "launches"
    said = {"LD_LIBRARY_PATH": str(libraries), "FAKE_LAUNCHES": str(record), "FAKE_OURS": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES, *kernels, record],
        env={**os.environ, **said},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def attributes(case):
    return [line.split(";")[1] for line in case["seen"]]


def test_launches_are_dependent_and_on_torchs_stream(told):
    address = told["both"]["address"]
    assert told["both"]["seen"] == [
        f"0x1000 on 0x77: 3,2,1 256,1,1 232448; 6=1; {address:#x} (nil) -7 1.5",
        f"0x2000 on 0x77: 132,1,1 128,1,1 0; 2=1; (nil) {address + 4:#x} 2147483647 -0.25",
    ]
    assert (told["both"]["how"], told["both"]["dependent"]) == ("programmatic dependent launch", True)


def test_a_driver_that_refuses_dependent_launches_gets_plain_ones(told):
    case = told["refused"]
    assert attributes(case) == [" 6=1", "", ""]
    assert case["how"] == "plain launches: the driver refuses dependent ones (CUDA_ERROR_NOT_SUPPORTED)"
    assert not case["dependent"]
    assert case["log"].count("plain_launches") == 1


def test_dependent_launches_can_be_switched_off(told):
    assert attributes(told["off"]) == ["", ""]
    assert told["off"]["how"] == "plain launches: dependent launches are switched off"


def test_a_launch_that_is_refused_says_which(told):
    assert attributes(told["wide"]) == [" 6=1", ""]
    assert told["wide"]["dependent"]
    where = "(grid (1, 1, 1), 2048 threads, 0 bytes of shared memory)"
    assert told["wide"]["error"] == f"one of some.cu could not be launched: CUDA_ERROR_INVALID_VALUE {where}"


def test_arguments_that_are_not_the_kernels(told):
    *sizes, number, shared = told["wrong"]
    for case in sizes:
        assert "takes parameters of (8, 8, 4, 4) bytes, not" in case["error"]
    assert "2147483648 is no int32" in number["error"]
    assert "232449 bytes of shared memory, it may take 232448" in shared["error"]
    assert not any(case["seen"] for case in told["wrong"])


def test_a_gpu_that_cannot_be_used_makes_no_launcher(told):
    assert "this is NVIDIA H100 80GB HBM3 (8.0): use --device cpu" in told["unusable"]


def test_a_context_that_cannot_be_made_names_who_holds_the_memory(driver, monkeypatch):
    def full(device):
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(cuda.torch.cuda, "set_device", full)
    with pytest.raises(KernelError) as caught:
        cuda._start(None, H100)
    said = f"NVIDIA H100 80GB HBM3 cannot be used: CUDA error: out of memory; {held(H100)}"
    assert caught.value.message == said

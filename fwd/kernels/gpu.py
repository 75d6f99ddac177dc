"""What this machine has for kernels on a GPU, and in one line what is missing.

The driver is asked through its library, so that what is said of a GPU hangs on no package. Compute capability 10.3 is
left out: it would take builds for `sm_100f`, and what is not built in the tests is not served.
"""

import ctypes
import importlib.util
import os
import uuid
from ctypes import byref, c_char_p, c_int, c_size_t, create_string_buffer
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwd.kernels import nvml

LIBCUDA = "libcuda.so.1"
DRIVER = 13000  # the CUDA version that a driver must be for: NVIDIA's 580 and newer
ARCHES = {(9, 0): "sm_90a", (10, 0): "sm_100a"}  # capability → what is compiled for it
PACKAGES = {"cuda.bindings": "cuda-bindings", "cupy": "cupy-cuda13x"}
CPU = "or use --device cpu"

# CUdevice_attribute of cuda.h
MULTIPROCESSORS, MEMORY_CLOCK, BUS_WIDTH, MAJOR, MINOR, SHARED = 16, 36, 37, 75, 76, 97


@dataclass(frozen=True, slots=True)
class Facts:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves, which is `cuda:0`, and what it takes to use it."""

    visible: bool = False  # a GPU is in this machine and not hidden from us
    driver: int = 0  # the CUDA version the driver is for, 13000; 0: there is no driver
    trouble: str = ""  # the driver's error as it started
    devices: int = 0
    name: str = ""
    uuid: str = ""  # by which NVML knows it
    capability: tuple[int, int] = (0, 0)
    memory: int = 0  # bytes
    free: int = 0  # bytes that nobody holds; all of them where NVML is absent
    bandwidth: float = 0.0  # bytes a second, by memory clock and bus; 0: not said
    multiprocessors: int = 0
    shared_limit: int = 0  # bytes of dynamic shared memory a block may take
    torch: str = ""  # version
    torch_cuda: str = ""  # CUDA version that torch is built for, "" without
    missing: tuple[str, ...] = ()  # packages that are not installed

    @property
    def arch(self) -> str:
        """What kernels are compiled for; only of a GPU that is `usable`."""
        return ARCHES[self.capability]


def probe() -> Facts:
    """Ask driver, NVML and Python's packages; changes nothing, makes no context and never fails."""
    import torch  # noqa: PLC0415  # seconds

    found: dict[str, Any] = {
        "visible": present(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda or "",
        "missing": tuple(package for module, package in PACKAGES.items() if not _installed(module)),
    }
    try:
        driver = ctypes.CDLL(LIBCUDA)
    except OSError:
        return Facts(**found)
    return Facts(**{**found, **_driver_facts(driver)})


def usable(facts: Facts) -> str | None:
    """Why kernels cannot run here, in one line with a way out; None if they can."""
    return _driver_trouble(facts) or _device_trouble(facts) or _package_trouble(facts)


def held(facts: Facts) -> str:
    """What others hold of the GPU's memory and who they are, as the end of a sentence; "" if nobody is known to."""
    named = [
        f"pid {holder.pid}"
        f"{f' ({holder.name})' if holder.name else ''}"
        f"{f' with {holder.bytes:,}' if holder.bytes else ''}"
        for holder in nvml.holders(facts.uuid)
    ]
    taken = f"{facts.memory - facts.free:,} of its {facts.memory:,} bytes are taken"
    return f"{taken}, by {' and '.join(named)}: stop what is not needed" if named else ""


def _driver_trouble(facts: Facts) -> str | None:
    if not facts.driver:
        return f"no CUDA driver ({LIBCUDA}): install NVIDIA's driver 580 or newer, {CPU}"
    if facts.driver < DRIVER:
        has = f"{facts.driver // 1000}.{facts.driver % 1000 // 10}"
        return f"the CUDA driver is for CUDA {has}, fwd needs 13.0: install NVIDIA's driver 580 or newer, {CPU}"
    if facts.trouble or not facts.devices:
        mask = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = (facts.trouble or "no device") + ("" if mask is None else f", CUDA_VISIBLE_DEVICES={mask}")
        return f"the CUDA driver finds no GPU ({why}): see what nvidia-smi says, {CPU}"
    return None


def _device_trouble(facts: Facts) -> str | None:
    if facts.capability in ARCHES:
        return None
    needed, has = "an H100, H200 or B200 (compute capability 9.0 or 10.0)", ".".join(map(str, facts.capability))
    return f"fwd's kernels need {needed}, this is {facts.name} ({has}): use --device cpu"


def _package_trouble(facts: Facts) -> str | None:
    if not facts.torch_cuda:
        return f"torch {facts.torch} is built without CUDA: install the build for CUDA 13 from PyPI, {CPU}"
    if facts.missing:
        return f"{' and '.join(facts.missing)} must be installed: run `pip install 'fwd[cuda]'`, {CPU}"
    return None


def present() -> bool:
    """Whether there is a device node of a GPU that the environment does not hide."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in {"", "-1"}
    return not hidden and any(Path("/dev").glob("nvidia[0-9]*"))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def _driver_facts(cuda: ctypes.CDLL) -> dict[str, Any]:
    """What the driver says, as far as it works."""
    version, count = c_int(), c_int()
    cuda.cuDriverGetVersion(byref(version))
    found: dict[str, Any] = {"driver": version.value}
    if status := cuda.cuInit(0) or cuda.cuDeviceGetCount(byref(count)):
        return {**found, "trouble": _error(cuda, status)}
    if not count.value:
        return found
    return {**found, "visible": True, "devices": count.value, **_device_facts(cuda)}


def _device_facts(cuda: ctypes.CDLL) -> dict[str, Any]:
    device, memory, name, bits = c_int(), c_size_t(), create_string_buffer(256), create_string_buffer(16)
    status = (
        cuda.cuDeviceGet(byref(device), 0)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceTotalMem_v2(byref(memory), device)
        or cuda.cuDeviceGetUuid_v2(bits, device)
    )
    if status:
        return {"trouble": _error(cuda, status)}

    def attribute(number: int) -> int:
        value = c_int()
        return 0 if cuda.cuDeviceGetAttribute(byref(value), number, device) else value.value

    known = str(uuid.UUID(bytes=bits.raw))
    return {
        "name": name.value.decode(errors="replace"),
        "uuid": known,
        "capability": (attribute(MAJOR), attribute(MINOR)),
        "memory": memory.value,
        "free": min(nvml.free(known) or memory.value, memory.value),
        "bandwidth": 2e3 * attribute(MEMORY_CLOCK) * attribute(BUS_WIDTH) / 8,  # kHz, both edges; bits
        "multiprocessors": attribute(MULTIPROCESSORS),
        "shared_limit": attribute(SHARED),
    }


def _error(cuda: ctypes.CDLL, status: int) -> str:
    name = c_char_p()
    cuda.cuGetErrorName(status, byref(name))
    return (name.value or b"error %d" % status).decode()

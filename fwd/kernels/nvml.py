"""Who holds the memory of a GPU, as NVML tells; where its library is absent nothing is known. GPUs go by their UUID."""

import ctypes
import os
from ctypes import byref, c_uint, c_ulonglong
from dataclasses import dataclass
from pathlib import Path

LIBNVML = "libnvidia-ml.so.1"
MOST = 256  # processes that are asked for
NOT_SAID = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds memory of the GPU."""

    pid: int
    name: str  # "" where it cannot be seen: another container's
    bytes: int  # 0: not said


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t of nvml.h."""

    _fields_ = (("pid", c_uint), ("used", c_ulonglong), ("instance", c_uint), ("compute_instance", c_uint))


class _Memory(ctypes.Structure):
    """nvmlMemory_t of nvml.h."""

    _fields_ = (("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong))


def free(uuid: str) -> int:
    """Bytes that nobody holds, 0 if that is not known."""
    memory = _Memory()
    nvml, handle = _device(uuid)
    return 0 if not nvml or nvml.nvmlDeviceGetMemoryInfo(handle, byref(memory)) else int(memory.free)


def holders(uuid: str) -> list[Holder]:
    """Other processes that hold memory of the GPU, the greatest first."""
    count, found = c_uint(MOST), (_Process * MOST)()
    nvml, handle = _device(uuid)
    if not nvml or nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle, byref(count), found):
        return []
    others = [_holder(each) for each in found[: count.value] if each.pid != os.getpid()]
    return sorted(others, key=lambda holder: -holder.bytes)


def _device(uuid: str) -> tuple[ctypes.CDLL | None, ctypes.c_void_p]:
    """The library and the device, a whole GPU or a slice of one; no library where there is no such device."""
    handle = ctypes.c_void_p()
    try:
        nvml = ctypes.CDLL(LIBNVML)
    except OSError:
        return None, handle
    if nvml.nvmlInit_v2():
        return None, handle
    known = any(not nvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}".encode(), byref(handle)) for kind in ("GPU", "MIG"))
    return (nvml if known else None), handle


def _holder(process: _Process) -> Holder:
    try:
        name = Path(f"/proc/{process.pid}/comm").read_text(errors="replace").strip()
    except OSError:
        name = ""
    return Holder(process.pid, name, 0 if process.used == NOT_SAID else process.used)

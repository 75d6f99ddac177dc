"""Kernels on a GPU: cubins of `jit`, loaded by CuPy, launched by the driver's extensible launch on torch's stream.

CuPy launches nothing itself because it cannot set launch attributes, and without programmatic dependent launch the
weights of a kernel are not fetched while the one before it ends.
"""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from torch import Tensor

from fwd.errors import KernelError
from fwd.kernels.builds import shared_bound
from fwd.kernels.gpu import Facts, held, probe, usable
from fwd.kernels.jit import Jit
from fwd.kernels.launch import Argument, Kernel

__all__ = ["CudaLauncher", "Facts", "probe", "usable"]

log = structlog.get_logger("fwd.kernels")
COOPERATIVE, DEPENDENT = "CU_LAUNCH_ATTRIBUTE_COOPERATIVE", "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"
REFUSALS = {"CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_INVALID_VALUE"}  # what a driver without an attribute answers
INT32 = range(-(2**31), 2**31)


@dataclass(frozen=True, slots=True, eq=False)
class _Function:
    pointer: int  # CUfunction
    sizes: tuple[int, ...]  # bytes of each parameter: 8 for pointers, 4 for int and float
    owner: Any  # CuPy's kernel, which keeps the module loaded


class CudaLauncher:
    """The `Launcher` of `cuda:0`. Every kernel of the table is loaded when it is made, so that capture loads nothing.

    It belongs to the thread that made it. `dependent` turns False if the driver refuses dependent launches; `plain`
    then says why. Cooperative launches are never dependent: a grid all of whose blocks must be resident does not wait
    in the room that the one before it still holds.
    """

    name = "cuda"

    def __init__(
        self, *, dependent: bool = True, debug: bool = False, jit: Jit | None = None, facts: Facts | None = None
    ) -> None:
        """Build what the cache lacks, and load it; raises `KernelError` where the GPU or its kernels cannot be used."""
        self.facts = facts or probe()
        if reason := usable(self.facts):
            raise KernelError(reason)
        self.device = torch.device("cuda", 0)
        self.multiprocessors = self.facts.multiprocessors
        self.shared_limit = self.facts.shared_limit
        self.dependent = dependent
        self.plain = "" if dependent else "dependent launches are switched off"
        _start(self.device, self.facts)
        self._jit = jit or Jit(debug=debug, fallback=True)  # it holds the folder of the cubins
        self._functions = _load(self._jit, self.facts.arch, self.shared_limit)

    @property
    def how(self) -> str:
        """How kernels are launched, in words."""
        return "programmatic dependent launch" if self.dependent else f"plain launches: {self.plain}"

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        *arguments: Argument,
        cooperative: bool = False,
    ) -> None:
        """Launch on torch's current stream; raises `KernelError` if the driver refuses."""
        function = self._functions[kernel]
        most = min(self.shared_limit, shared_bound(kernel.source, kernel.name))
        assert shared <= most, f"{kernel}: {shared} bytes of shared memory, it may take {most}"
        values = [_value(argument, kernel) for argument in arguments]
        sizes = tuple(ctypes.sizeof(value) for value in values)
        assert sizes == function.sizes, f"{kernel} takes parameters of {function.sizes} bytes, not {sizes}"
        attribute = COOPERATIVE if cooperative else DEPENDENT if self.dependent else None
        config = _config(grid, threads, shared, _stream(self.device), attribute)
        status = _launch(config, function.pointer, values)
        if status in REFUSALS and attribute == DEPENDENT:
            refusal, status = status, _launch(_config(grid, threads, shared, config.hStream), function.pointer, values)
            self._launch_plainly(refusal, worked=not status)
        if status:
            where = f"grid {grid}, {threads} threads, {shared} bytes of shared memory"
            raise KernelError(f"{kernel.name} of {kernel.source} could not be launched: {status} ({where})")

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory of the device, its contents undefined."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _launch_plainly(self, refusal: str, *, worked: bool) -> None:
        """From now on, if that worked where a dependent launch was refused."""
        if worked:
            self.dependent, self.plain = False, f"the driver refuses dependent ones ({refusal})"
            log.warning("plain_launches", reason=self.plain)


def _start(device: torch.device, facts: Facts) -> None:
    """Make torch's context the current one; raises `KernelError` where it cannot be made."""
    try:
        torch.cuda.set_device(device)
        torch.cuda.synchronize(device)
    except RuntimeError as error:  # torch's, also for memory
        reason = str(error).splitlines()[0]
        raise KernelError("; ".join(filter(None, (f"{facts.name} cannot be used: {reason}", held(facts))))) from error


def _load(jit: Jit, arch: str, shared_limit: int) -> dict[Kernel, _Function]:
    """Every kernel of the table."""
    import cupy  # noqa: PLC0415  # an optional package, seconds

    found = {}
    for build in jit.builds([arch], os.cpu_count() or 1):
        source = build.record.source
        try:
            module = cupy.RawModule(path=str(build.path))
            for name in jit.table[source]:
                function = module.get_function(name)
                function.max_dynamic_shared_size_bytes = shared_limit
                pointer = function.kernel.ptr
                found[Kernel(source, name)] = _Function(pointer, _sizes(pointer), function)
        except RuntimeError as error:  # CuPy's own
            raise KernelError(f"{source} could not be loaded for {arch}: {error}") from error
    return found


def _sizes(pointer: int) -> tuple[int, ...]:
    """The sizes of a function's parameters; the driver refuses the first number that has none."""
    from cuda.bindings import driver  # noqa: PLC0415  # an optional package

    sizes: list[int] = []
    while True:
        status, _, size = driver.cuFuncGetParamInfo(pointer, len(sizes))
        if status:
            return tuple(sizes)
        sizes.append(size)


def _value(argument: Argument, kernel: Kernel) -> Any:
    match argument:
        case None:
            return ctypes.c_void_p(None)
        case Tensor():
            assert argument.is_cuda or argument.is_pinned(), f"{kernel}: a tensor that the GPU cannot reach"
            return ctypes.c_void_p(argument.data_ptr())
        case int():
            assert argument in INT32, f"{kernel}: {argument} is no int32"
            return ctypes.c_int32(argument)
        case float():
            return ctypes.c_float(argument)


def _config(grid: tuple[int, int, int], threads: int, shared: int, stream: Any, attribute: str | None = None) -> Any:
    from cuda.bindings import driver  # noqa: PLC0415  # an optional package

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared, stream
    if attribute:
        chosen = driver.CUlaunchAttribute()
        chosen.id = getattr(driver.CUlaunchAttributeID, attribute)
        if attribute == COOPERATIVE:
            chosen.value.cooperative = 1
        else:
            chosen.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [chosen], 1
    return config


def _launch(config: Any, pointer: int, values: Sequence[Any]) -> str:
    """Return the name of the error, "" for none; the driver copies the values before it returns."""
    from cuda.bindings import driver  # noqa: PLC0415  # an optional package

    addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    (status,) = driver.cuLaunchKernelEx(config, pointer, ctypes.addressof(addresses), 0)
    return status.name if status else ""


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream

"""Kernels executed by the CPU: the text of `cuda/` compiled by g++, its blocks and threads as fibers (`cuda/host/`).

What a GPU leaves to chance is random here, by a seed: the order of blocks, warps and lanes, and when copies arrive.
What it leaves undefined is poison, and what it would hang or be silent about is an error with the line it happens at.
"""

import ctypes
import struct
import threading
from functools import cache
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fwd.errors import KernelError
from fwd.kernels import sources
from fwd.kernels.builds import SHARED_LIMIT, shared_bound
from fwd.kernels.gxx import build
from fwd.kernels.launch import Argument, Kernel

POISON = 0xFF  # every byte of it: NaN in all formats, −1
MAX_THREADS = 1024
MAX_GRID = 65535  # in y and z
MAX_KERNELS = 256  # of a file
CODES = {"p": "Q", "w": "Q", "i": "i4x", "f": "f4x"}  # a parameter as struct packs it in 8 bytes
KINDS = {"p": "a pointer", "w": "a pointer", "i": "an int", "f": "a float"}

_one_launch = threading.Lock()  # faults are caught for the whole process


class _Region(ctypes.Structure):
    """`fwd::host::Region` of cuda/host/runtime.h."""

    _fields_ = (("memory", ctypes.c_void_p), ("bytes", ctypes.c_uint64))


class _Call(ctypes.Structure):
    """`fwd::host::Call` of cuda/host/runtime.h."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("thunk", ctypes.c_void_p),
        ("arguments", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
        ("cooperative", ctypes.c_uint32),
        ("workers", ctypes.c_uint32),
        ("poison", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("regions", ctypes.POINTER(_Region)),
        ("region_count", ctypes.c_uint64),
    )


class _Export(ctypes.Structure):
    """`fwd::host::Export` of cuda/host/runtime.h."""

    _fields_ = (("name", ctypes.c_char_p), ("parameters", ctypes.c_char_p), ("thunk", ctypes.c_void_p))


class _Entry(NamedTuple):
    """One kernel of a library."""

    parameters: str  # a letter of CODES each
    packing: struct.Struct
    thunk: int


class HostLauncher:
    """Implements `fwd.kernels.launch.Launcher` on the CPU.

    `seed` shuffles, `poison` (a byte) fills shared memory and outputs, `folder` stands for `cuda/`. Where launches are
    `dependent`, memory that a kernel of this launcher may write holds poison until the next kernel's threads wait for
    it, as if the one before had not begun. `sanitize` needs a process that the address sanitizer's library is preloaded
    into (`sanitizer_environment`). Kernels that run only a few times are there sooner with `optimization` 1.
    """

    name = "host"
    device = torch.device("cpu")
    shared_limit = SHARED_LIMIT

    def __init__(
        self,
        seed: int = 0,
        poison: int = POISON,
        *,
        dependent: bool = False,
        sanitize: bool = False,
        optimization: int = 2,
        workers: int = 2,
        multiprocessors: int = 4,
        folder: Path | None = None,
    ) -> None:
        assert 0 <= poison <= 0xFF, "a byte"
        self.seed = seed
        self.poison = poison
        self.dependent = dependent
        self.sanitize = sanitize
        self.optimization = optimization
        self.workers = workers
        self.multiprocessors = multiprocessors
        self.folder = folder or sources.home()
        self._launches = 0
        # By address: what kernels of this launcher may write.
        self._written = WeakValueDictionary[int, torch.UntypedStorage]()
        self._kernels: dict[str, dict[str, _Entry]] = {}
        self._runtime = _runtime(sanitize)

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        *arguments: Argument,
        cooperative: bool = False,
    ) -> None:
        """As `Launcher.launch`. Returns when the kernel has run; raises `KernelError` for whatever goes wrong in it."""
        entry = self._entry(kernel)
        _check_shape(kernel, grid, threads, shared)
        self._launches += 1
        regions = self._regions(entry, arguments) if self.dependent else []
        call = _Call(
            kernel.name.encode(),
            entry.thunk,
            _packed(kernel, entry, arguments),
            grid,
            threads,
            shared,
            cooperative,
            1 if regions else self.workers,
            self.poison,
            (self.seed << 32) + self._launches,
            (_Region * len(regions))(*regions),
            len(regions),
        )
        message = ctypes.create_string_buffer(2048)
        with _one_launch:
            failed = self._runtime.fwd_host_launch(ctypes.byref(call), message, len(message))
        if failed:
            raise KernelError(message.value.decode(errors="replace"))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory full of poison."""
        memory = torch.empty(shape, dtype=dtype)
        memory.flatten().view(torch.uint8).fill_(self.poison)
        return memory

    def _regions(self, entry: _Entry, arguments: tuple[Argument, ...]) -> list[_Region]:
        """The memory of arguments that this kernel or one before may write, each byte once."""
        spans = []
        for code, argument in zip(entry.parameters, arguments, strict=True):
            if not isinstance(argument, Tensor) or not argument.numel():
                continue
            storage = argument.untyped_storage()
            if code == "w":
                self._written[storage.data_ptr()] = storage
            if storage.data_ptr() in self._written:
                spans.append((argument.data_ptr(), argument.data_ptr() + _extent(argument)))
        return [_Region(first, last - first) for first, last in _merged(spans)]

    def _entry(self, kernel: Kernel) -> _Entry:
        if kernel.source not in self._kernels:
            source = self.folder / kernel.source
            self._kernels[kernel.source] = _load(build(source, sanitize=self.sanitize, optimization=self.optimization))
        if found := self._kernels[kernel.source].get(kernel.name):
            return found
        raise KernelError(f"{kernel.source} has no kernel {kernel.name}")


@cache
def _runtime(sanitize: bool) -> ctypes.CDLL:
    """The runtime, whose symbols the libraries of kernels loaded after it use."""
    return _open(build(sources.home() / "host/runtime.cpp", sanitize=sanitize), ctypes.RTLD_GLOBAL)


def _open(path: Path, mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path), mode)
    except OSError as error:
        raise KernelError(f"{path} cannot be loaded ({error}): remove its folder, and it is built again") from None


@cache
def _load(path: Path) -> dict[str, _Entry]:
    entries = {}
    for export in (_Export * MAX_KERNELS).in_dll(_open(path), "fwd_host_kernels"):
        if export.name is None:
            break
        parameters = export.parameters.decode()
        packing = struct.Struct("=" + "".join(CODES[each] for each in parameters))
        entries[export.name.decode()] = _Entry(parameters, packing, export.thunk)
    return entries


def _check_shape(kernel: Kernel, grid: tuple[int, int, int], threads: int, shared: int) -> None:
    if min(grid) < 1 or grid[0] >= 1 << 31 or max(grid[1:]) > MAX_GRID:
        raise KernelError(f"kernel {kernel.name}: a grid of {grid}")
    if threads % 32 or not 32 <= threads <= MAX_THREADS:
        raise KernelError(f"kernel {kernel.name}: {threads} threads a block are no multiple of 32 up to {MAX_THREADS}")
    if not 0 <= shared <= (most := shared_bound(kernel.source, kernel.name)):
        raise KernelError(f"kernel {kernel.name}: {shared} bytes of shared memory, it may take {most}")


def _packed(kernel: Kernel, entry: _Entry, arguments: tuple[Argument, ...]) -> bytes:
    """The arguments, 8 bytes each, if they are what the kernel's parameters take."""
    if len(arguments) != len(entry.parameters):
        raise KernelError(f"kernel {kernel.name} takes {len(entry.parameters)} arguments, not {len(arguments)}")
    values: list[int | float] = []
    for place, (code, argument) in enumerate(zip(entry.parameters, arguments, strict=True)):
        if code.replace("w", "p") != _code(argument):
            raise KernelError(f"kernel {kernel.name}: argument {place} is {KINDS[code]}, not {argument!r}")
        if isinstance(argument, Tensor):
            if argument.device.type != "cpu":
                raise KernelError(f"kernel {kernel.name}: argument {place} is on {argument.device}")
            values.append(argument.data_ptr())
        else:
            values.append(argument or 0)
    try:
        return entry.packing.pack(*values)
    except struct.error as error:
        raise KernelError(f"kernel {kernel.name}: {error}") from None


def _extent(x: Tensor) -> int:
    """Bytes from the first to behind the last element."""
    return (sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1) * x.element_size()


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of intervals [first, last)."""
    union: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if union and first <= union[-1][1]:
            union[-1] = (union[-1][0], max(last, union[-1][1]))
        else:
            union.append((first, last))
    return union


def _code(argument: Argument) -> str:
    if argument is None or isinstance(argument, Tensor):
        return "p"
    return "f" if isinstance(argument, float) else "i"

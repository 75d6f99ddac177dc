"""NVIDIA's run-time compiler, which needs neither a GPU nor a driver; `cuda-bindings` finds its library.

A cubin is machine code for one architecture: no PTX is kept, no driver compiles anything.
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from fwd.errors import KernelError

WAY_OUT = "run `pip install 'fwd[cuda]'`, or give in CACHE_DIRECTORY what `fwd kernels build` made elsewhere"
OPTIONS = ("-std=c++17", "-ftz=true", "--ptxas-options=-v")  # -v: registers and spills stand in the log
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '\w+'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
WARNING = re.compile(r"^.*\bwarning *[#:].*$", re.MULTILINE)
ERROR = re.compile(r"^.*\b(?:error|fatal)\b.*$", re.MULTILINE)


class Usage(msgspec.Struct, frozen=True):
    """What one kernel takes: registers a thread, bytes of stack, of spills and of static shared memory."""

    registers: int
    stack: int
    spills: int
    shared: int


def version() -> str:
    """The compiler's version, "13.0"; raises `KernelError` where there is none."""
    return ".".join(map(str, _call("nvrtcVersion")))


def compile_cubin(source: bytes, name: str, options: Sequence[str]) -> tuple[bytes, str]:
    """Compile one file; return the cubin and the log. Raises `KernelError` with the first line of what is wrong."""
    (program,) = _call("nvrtcCreateProgram", source, name.encode(), 0, None, None)
    try:
        encoded = [option.encode() for option in options]
        failed = _nvrtc().nvrtcCompileProgram(program, len(encoded), encoded)[0]
        log = _text("ProgramLog", program).decode(errors="replace").strip("\0 \n")
        if failed:
            raise KernelError(f"{name} does not compile: {_first_error(log) or failed.name}")
        return _text("CUBIN", program), log
    finally:
        _call("nvrtcDestroyProgram", program)


def usage(log: str) -> dict[str, Usage]:
    """What each kernel takes, by the log of a build; a function that is not inlined counts for the kernel before it."""
    _, *parts = ENTRY.split(log)
    return {name: _usage(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def warnings(log: str) -> list[str]:
    """The lines that warn."""
    return [line.strip() for line in WARNING.findall(log)]


def _usage(text: str) -> Usage:
    frames = [tuple(map(int, found)) for found in SPILLS.findall(text)]
    return Usage(
        registers=max(map(int, REGISTERS.findall(text)), default=0),
        stack=sum(stack for stack, _, _ in frames),
        spills=sum(stores + loads for _, stores, loads in frames),
        shared=sum(map(int, SHARED.findall(text))),
    )


def _first_error(log: str) -> str:
    found = ERROR.search(log)
    return " ".join(found[0].split()) if found else ""


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc  # noqa: PLC0415  # an optional package
    except ImportError:
        raise KernelError(f"cuda-bindings is not installed, by which kernels are built: {WAY_OUT}") from None
    return nvrtc


def _call(function: str, *arguments: Any) -> tuple[Any, ...]:
    """Call it; return what it gives beside its status. Raises `KernelError` for a bad one, or without the library."""
    try:
        status, *values = getattr(_nvrtc(), function)(*arguments)
    except RuntimeError:  # the library is looked for at the first call
        raise KernelError(f"NVRTC is not installed, which builds kernels: {WAY_OUT}") from None
    if status:
        raise KernelError(f"{function} of NVRTC failed: {status.name}")
    return tuple(values)


def _text(kind: str, program: Any) -> bytes:
    """The log or the cubin: asked for its size, then copied into a buffer of that size."""
    (size,) = _call(f"nvrtcGet{kind}Size", program)
    buffer = bytes(size)  # which is written to; of size 1 it is shared, and then the text is this zero
    _call(f"nvrtcGet{kind}", program, buffer)
    return buffer

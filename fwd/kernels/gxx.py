"""The text of `cuda/` as a library for the CPU: g++, and a cache of what it built. No torch here."""

import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from fwd.errors import KernelError
from fwd.kernels import sources

LIBRARY = "kernels.so"
TARGET = "nv/target"  # a header that NVRTC brings itself
FLAGS = (
    "-std=c++17",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-semantic-interposition",
    "-fPIC",
    "-DFWD_HOST",
    "-w",  # the device compiler's warnings are the ones that count
)
EXTENSIONS = ("avx2", "fma", "f16c")  # of the CPU, used where it has them
ANNOTATED = ("-DFWD_SANITIZE",)  # the runtime tells the sanitizer of its fibers
SANITIZERS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fsanitize-recover=address,undefined")
# What `__global__` is here (cuda/host/crt/host_defines.h), in preprocessed text.
KERNEL = re.compile(
    r'extern "C"(?:\s|#[^\n]*\n)+__attribute__\(\(visibility\("default"\), used\)\)(?:\s|#[^\n]*\n)+void\s+(\w+)\s*\('
)


@cache
def build(source: Path, *, sanitize: bool = False, optimization: int = 2) -> Path:
    """The library of a source, from the cache or else compiled; looked at once in a process.

    Raises `KernelError` without a compiler or CUDA's headers, for text that does not compile, an unwritable cache.
    """
    home, toolkit = sources.home(), sources.toolkit(TARGET)
    folders = [*dict.fromkeys((source.parent, home)), home / "host"]
    compiler, version = _compiler()
    flags = _flags(sanitize and source.suffix == ".cu", sanitize, optimization)

    def place() -> Path:
        name = sources.digest(sources.closure(source, (*folders, toolkit)), *flags, version)
        return sources.cache("host") / f"{source.stem}-{name[:32]}"

    before = place()
    if (before / LIBRARY).is_file():
        return before / LIBRARY
    library = _compile(compiler, source, (*flags, *(f"-I{folder}" for folder in folders), "-isystem", str(toolkit)))
    if place() != before:
        raise KernelError(f"{source.name} changed while it was built: start again")
    try:
        sources.publish(before, {LIBRARY: library})
    except OSError as error:
        raise KernelError(
            f"the kernel cache {before.parent} cannot be written ({error}): set CACHE_DIRECTORY"
        ) from None
    return before / LIBRARY


def _flags(instrument: bool, sanitize: bool, optimization: int) -> tuple[str, ...]:
    """How a library is compiled; the runtime of sanitized kernels is not instrumented itself."""
    extensions = (f"-m{each}" for each in EXTENSIONS if each in _cpu())
    sanitizers = SANITIZERS if instrument else ANNOTATED if sanitize else ()
    return (*FLAGS, f"-O{optimization}", *extensions, *sanitizers)


def sanitizer_environment(*, halt: bool = True) -> dict[str, str]:
    """The environment of a process whose launchers sanitize and that exits with 99 at the first report if `halt`.

    Raises `KernelError` without a compiler.
    """
    compiler, _ = _compiler()
    library = _command(compiler, "-print-file-name=libasan.so").stdout.strip()
    return {
        **os.environ,
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": f"detect_leaks=0:detect_stack_use_after_return=0:halt_on_error={int(halt)}:exitcode=99",
        "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error={int(halt)}:exitcode=99",
    }


def _compile(compiler: str, source: Path, flags: tuple[str, ...]) -> bytes:
    """Preprocess, add a table of the kernels found, compile."""
    with tempfile.TemporaryDirectory(prefix="fwd-") as draft:
        text, library = Path(draft) / "kernels.ii", Path(draft) / LIBRARY
        _run(source, compiler, "-E", "-x", "c++", *flags, str(source), "-o", str(text))
        names = dict.fromkeys(KERNEL.findall(text.read_text(encoding="utf-8", errors="replace")))
        with text.open("a", encoding="utf-8") as stream:
            stream.write(_table(names) if names else "")
        _run(source, compiler, "-shared", *flags, str(text), "-o", str(library))
        return library.read_bytes()


def _table(names: Iterable[str]) -> str:
    """The text that exports kernels, with what their parameters are."""
    entry = '    {{"{0}", host::Entry<&{0}>::parameters, &host::Entry<&{0}>::call}},\n'
    rows = "".join(entry.format(name) for name in names)
    return f"""
namespace fwd {{
extern "C" __attribute__((visibility("default"), used)) const host::Export fwd_host_kernels[] = {{
{rows}    {{nullptr, nullptr, nullptr}},
}};
}}
"""


def _run(source: Path, *command: str) -> None:
    done = _command(*command)
    if done.returncode != 0:
        wrong = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise KernelError(f"{source.name} does not compile for the CPU: {wrong}")


@cache
def _compiler() -> tuple[str, str]:
    """The path of the C++ compiler and its version."""
    if platform.machine() != "x86_64":
        raise KernelError(f"kernels are executed on x86-64 CPUs, not on {platform.machine()}: use --device cpu")
    wanted = os.environ.get("CXX", "g++")
    path = shutil.which(wanted)
    if path is None:
        raise KernelError(f"the C++ compiler {wanted} is not found: install g++ or set CXX")
    return path, _command(path, "--version").stdout.partition("\n")[0]


def _command(*command: str) -> subprocess.CompletedProcess[str]:
    """Run the compiler, in English."""
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(  # noqa: S603 -- the compiler that `CXX` names
        command, env=environment, capture_output=True, text=True, errors="replace", check=False
    )


@cache
def _cpu() -> frozenset[str]:
    """What the CPU can do, in the words of /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())

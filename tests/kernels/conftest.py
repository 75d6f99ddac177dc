"""Where the kernels' tests run: on the CPU in several orders over several poisons, and on a GPU with `-m gpu`."""

import functools
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from agreement import same_bits
from torch import Tensor

from fwd.kernels import sources
from fwd.kernels.cuda import CudaLauncher, probe, usable
from fwd.kernels.gxx import sanitizer_environment
from fwd.kernels.host import HostLauncher
from fwd.kernels.launch import Launcher

ROOT = Path(__file__).resolve().parents[2]
LAUNCHES = 3
POISONS = (0xFF, 0x3F)  # NaN and −1; about 0.75 and 10⁹


class Execution:
    """Gives launchers; `folder` stands for `cuda/`."""

    def __init__(self, name: str, tmp: Path, folder: Path | None = None):
        self.name, self.tmp, self.folder = name, tmp, folder

    @property
    def launcher(self) -> Launcher:
        """A fresh one."""
        return self.launchers(1)[0]

    def launchers(self, count: int = LAUNCHES) -> list[Launcher]:
        """Fresh ones of different seeds and poisons; the launches of every third overlap."""
        if self.name == "cuda":
            return [_of_gpu()] * count
        how = {"folder": self.folder, "optimization": 1} if self.folder else {}
        return [HostLauncher(i + 1, POISONS[i % 2], dependent=i % 3 == 2, **how) for i in range(count)]

    def everywhere(self, run: Callable[[Launcher], object], count: int = LAUNCHES) -> object:
        """What `run(launcher)` returns (tensors, or tuples and lists of them), the same bits from every launcher."""
        results = [run(launcher) for launcher in self.launchers(count)]
        for other in results[1:]:
            assert_same(results[0], other)
        return results[0]

    def mutated(self, source: str, old: str, new: str) -> "Execution":
        """The same with a text of `cuda/` changed, the first time it occurs."""
        if self.name != "host":
            pytest.skip("planted bugs are for host execution: a GPU may not survive them")
        folder = self.tmp / f"mutant{len(list(self.tmp.iterdir()))}"
        shutil.copytree(self.folder or sources.home(), folder, ignore=shutil.ignore_patterns("host"))
        text = (folder / source).read_text()
        assert old in text, f"{source} does not hold {old!r} any more: change the test"
        (folder / source).write_text(text.replace(old, new, 1))
        return Execution(self.name, self.tmp, folder)

    def mutant(self, source: str, old: str, new: str) -> Launcher:
        """A launcher of `mutated`."""
        return self.mutated(source, old, new).launcher


@functools.cache
def _of_gpu() -> Launcher:
    return CudaLauncher()


@functools.cache
def _absent() -> str | None:
    return usable(probe())


def assert_same(one: object, other: object, path: str = "result") -> None:
    assert type(one) is type(other), path
    if isinstance(one, Tensor):
        assert same_bits(one, other), (
            f"{path} {tuple(one.shape)} depends on thread order or on what was in memory before"
        )
    elif isinstance(one, tuple | list):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}[{i}]")
    else:
        assert one == other, path


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def execution(request, tmp_path) -> Execution:
    """What kernels of this test are launched by."""
    if request.param == "cuda" and (reason := _absent()):
        pytest.skip(reason)
    return Execution(request.param, tmp_path)


@pytest.fixture
def sanitized() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a Python script under the address and undefined-behaviour sanitizers; its launchers say `sanitize=True`.

    At the first report it ends with 99 if `halt`. A clean run ends with 0 and an empty stderr.
    """

    def run(script: str, *, halt: bool = True) -> subprocess.CompletedProcess[str]:
        paths = [str(ROOT / "tests/kernels"), str(ROOT / "tests"), str(ROOT)]
        before = f"import sys; sys.path[:0] = {paths!r}\n"
        return subprocess.run(
            [sys.executable, "-c", before + textwrap.dedent(script)],
            env=sanitizer_environment(halt=halt),
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
            cwd=ROOT,
        )

    return run

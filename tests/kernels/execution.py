"""Where the kernels' tests run: on the CPU in several orders over several poisons, or on a GPU."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from agreement import same_bits
from torch import Tensor

from fwd.kernels import sources
from fwd.kernels.cuda import CudaLauncher, probe, usable
from fwd.kernels.host import HostLauncher
from fwd.kernels.launch import Launcher

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
def absent() -> str | None:
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

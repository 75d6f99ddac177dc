"""The memory of this machine: how much of it there is for us, and how a load takes it."""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

MOUNTS = (Path("sys/fs/cgroup"), Path("sys/fs/cgroup/unified"), Path("sys/fs/cgroup/memory"))
LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
CACHES = ("inactive_file", "active_file")  # the page cache a group holds, which it gives up before it runs out


def available(root: Path = Path("/")) -> int:
    """Return bytes that can be taken without swapping, in any of the groups this process is in (cgroups 1 and 2)."""
    return min([_estimate(root), *(_left(group) for group in _groups(root))])


@contextlib.contextmanager
def blocks_apart() -> Iterator[None]:
    """Map each block from 64 KiB on by itself, so that what is freed leaves no holes in the heap (mallopt(3)).

    Afterwards the heap serves blocks up to 32 MiB and keeps what is freed, for the same blocks of the next step.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 64 << 10)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)


def _estimate(root: Path) -> int:
    """`MemAvailable` of proc(5), which counts the page cache as free; it is in KiB."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def _groups(root: Path) -> Iterator[Path]:
    """The memory groups of this process and all above them; in a container only their own roots may be there."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            inner = Path(path.lstrip("/"))
            yield from (root / mount / above for mount in MOUNTS for above in (inner, *inner.parents))


def _left(group: Path) -> int:
    """Bytes left under the limit of one group; without bound where it sets none."""
    for limit, usage in LIMITS:
        found = _number(group / limit)
        if found is not None:
            return max(found - (_number(group / usage) or 0) + _cached(group), 0)
    return 1 << 63


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _cached(group: Path) -> int:
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    found = {name: int(value) for name, value in (line.split() for line in lines)}
    return sum(found.get(f"total_{name}", found.get(name, 0)) for name in CACHES)  # total_: cgroup 1, with children

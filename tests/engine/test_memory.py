"""What is available: the machine's estimate, or less where a control group of either version, or one above, says so."""

import subprocess
import sys

import pytest

from fwd.engine.memory import available

GIB = 1 << 30


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def machine(tmp_path):
    """A root with 8 GiB available; `write` adds groups to it."""
    write(tmp_path / "proc/meminfo", f"MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: {8 << 20} kB\n")
    write(tmp_path / "proc/self/cgroup", "4:cpu,memory:/slice/unit\n1:name=systemd:/other\n0::/slice/unit\n")
    return tmp_path


def v2(folder, limit, used=0, cached=0):
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon 7\ninactive_file {cached}\nactive_file 5\n")


def v1(folder, limit, used, cached):
    write(folder / "memory.limit_in_bytes", f"{limit}\n")
    write(folder / "memory.usage_in_bytes", f"{used}\n")
    write(
        folder / "memory.stat", f"inactive_file 1\nactive_file 1\ntotal_inactive_file {cached}\ntotal_active_file 0\n"
    )


def test_without_groups_it_is_the_kernels_estimate(machine):
    assert available(machine) == 8 * GIB


def test_a_group_without_a_limit_changes_nothing(machine):
    v2(machine / "sys/fs/cgroup/slice/unit", "max")
    v1(machine / "sys/fs/cgroup/memory/slice/unit", 2**63 - 4096, 0, 0)
    assert available(machine) == 8 * GIB


@pytest.mark.parametrize("place", ["slice/unit", "slice", "."])
def test_the_narrowest_group_counts_and_gives_up_its_page_cache(machine, place):
    v2(machine / "sys/fs/cgroup/slice/unit", 7 * GIB)
    v2(machine / "sys/fs/cgroup" / place, 4 * GIB, 3 * GIB, GIB)
    assert available(machine) == 2 * GIB + 5


def test_groups_of_the_first_version(machine):
    v1(machine / "sys/fs/cgroup/memory/slice", 4 * GIB, 3 * GIB, GIB)
    assert available(machine) == 2 * GIB


def test_in_a_container_the_group_is_the_root_of_its_mount(machine):
    write(machine / "proc/self/cgroup", "0::/\n")
    v2(machine / "sys/fs/cgroup", 3 * GIB, GIB)
    assert available(machine) == 2 * GIB + 5


def test_a_group_over_its_limit_leaves_nothing(machine):
    v2(machine / "sys/fs/cgroup", GIB, 2 * GIB)
    assert available(machine) == 0


def test_this_machine():
    assert available() > 64 << 20


def test_blocks_that_are_freed_while_a_model_loads_leave_no_holes():
    """In a process of its own: every second of many blocks is freed, in the heap they would stay."""
    code = (
        "import numpy as np\n"
        "from fwd.engine.memory import blocks_apart\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1])\n"
        "before = resident()\n"
        "with blocks_apart():\n"
        "    large = np.ones(2 << 20); del large\n"  # glibc itself would serve such blocks from the heap from now on
        "    kept = [np.ones(64 << 10) for _ in range(256)][::2]\n"
        "print((resident() - before) * 4096 / sum(block.nbytes for block in kept))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(found.stdout) < 1.2

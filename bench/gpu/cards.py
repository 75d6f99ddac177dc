"""Which GPU this is, and what its data sheet says. `python -m gpu.cards` prints it as JSON.

It is asked in a process of its own, so that a bench that only starts others keeps no memory of the device.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from fwd.errors import KernelError
from fwd.kernels.gpu import probe, usable

QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,memory.used"


class Sheet(NamedTuple):
    """Bytes a second of the memory, and dense bf16 operations a second, as NVIDIA states them."""

    bandwidth: float
    matmul: float


# The first that stands in the device's name.
SHEETS = {
    "H100 PCIe": Sheet(2.0e12, 756e12),
    "H100 NVL": Sheet(3.9e12, 835e12),
    "H100": Sheet(3.35e12, 989e12),
    "H200 NVL": Sheet(4.8e12, 835e12),
    "H200": Sheet(4.8e12, 989e12),
    "GB200": Sheet(8.0e12, 2500e12),
    "B200": Sheet(8.0e12, 2250e12),
}


def key(name: str) -> str:
    """Which of `SHEETS` a device is by its name; empty for one that is not in the table."""
    return next((key for key in SHEETS if key in name), "")


def sheet(name: str) -> Sheet | None:
    """The data sheet of a device by its name; None for one that is not in the table."""
    return SHEETS.get(key(name))


def describe() -> dict[str, Any]:
    """Name, driver, capability, memory, multiprocessors, L2 and clocks of the first GPU, its settings left alone.

    Raises `KernelError` where there is none.
    """
    code = [sys.executable, "-m", "gpu.cards"]
    done = subprocess.run(code, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it gave no reason"]
        raise KernelError(f"no GPU to measure: {lines[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def memory_used() -> int | None:
    """Bytes in use on the first GPU, by all processes; None where nvidia-smi does not say."""
    number = _smi("memory.used", "nounits").strip()
    return int(number) << 20 if number.isdigit() else None


def _facts() -> dict[str, Any]:
    import torch  # noqa: PLC0415  # seconds

    if reason := usable(probe()):
        raise SystemExit(reason)
    seen = torch.cuda.get_device_properties(0)
    return {
        "name": seen.name,
        "capability": [seen.major, seen.minor],
        "memory": seen.total_memory,
        "multiprocessors": seen.multi_processor_count,
        "l2": seen.L2_cache_size,
        "torch_cuda": torch.version.cuda,
        **_driver(),
    }


def _driver() -> dict[str, Any]:
    """What the driver says; without nvidia-smi the version from /proc."""
    values = [part.strip() for part in _smi(QUERY).strip().split(",")]
    found = dict(zip(QUERY.split(","), values, strict=False))
    return {"driver": found.pop("driver_version", "") or _proc_version(), "state": found}


def _smi(fields: str, *more: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", f"--format={','.join(('csv', 'noheader', *more))}", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _proc_version() -> str:
    path = Path("/proc/driver/nvidia/version")
    text = path.read_text() if path.exists() else ""
    match = re.search(r"Kernel Module\D*([\d.]+)", text)
    return match[1] if match else ""


if __name__ == "__main__":
    print(json.dumps(_facts()))

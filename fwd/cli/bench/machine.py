"""What a result was measured on, and the file it is kept in."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import fwd

PACKAGES = ("torch", "transformers", "aiohttp", "msgspec", "tokenizers")


def facts() -> dict[str, Any]:
    """Time, machine, versions and commit; the commit is empty outside a checkout."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("describe", "--always", "--dirty"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "fwd": fwd.__version__, **dict(_versions())},
    }


def save(result: dict[str, Any], folder: Path) -> Path:
    """Write `DATE-COMMIT-WHAT.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    day = result["when"][:19].replace(":", "")
    path = folder / f"{day}-{result['commit'] or 'wheel'}-{result['what']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process (the first field of schedstat is nanoseconds on a CPU)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def _versions() -> list[tuple[str, str]]:
    found = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    return [(name, found[name]) for name in PACKAGES if name in found]


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(fwd.__file__).parent), *arguments]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # constant arguments
    except OSError:
        return ""
    return found.stdout.strip()


assert sys.platform == "linux", "/proc is read here"

"""The parts of one run of `bench/gpu.sh` in one JSON: `python -m gpu.collect FOLDER --save DIR`.

The folder holds for each part NAME.part (exit code and seconds), NAME.log, and in NAME/ the report that it saved; of
the tests `tests.xml`. {"what": "gpu", …, "parts": {NAME: {"code", "seconds", …}}, "failed": [NAME]}: a part has
"numbers", "failures" and "skipped" as in `gpu.report`, the tests have "counts"; what ended badly has the "tail" of its
log.
"""

import argparse
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from fwd.cli.bench import machine
from gpu import cards
from gpu.report import DRY, RESULTS, facts

COMMON = {"what", "dry", "quick", "note", "gpu", "seconds", "when", "commit", "cpu", "cores", "load", "versions"}
TAIL = 4000
NOTHING_RAN = 5  # pytest's exit code; in a dry run nothing marked gpu can run


def part(folder: Path, name: str) -> dict[str, Any]:
    """What one part left."""
    code, seconds = map(int, (folder / f"{name}.part").read_text().split())
    found: dict[str, Any] = {"code": code, "seconds": seconds}
    for path in sorted((folder / name).glob("*.json")):
        found |= {key: value for key, value in json.loads(path.read_text()).items() if key not in COMMON}
    if name == "tests":
        found |= {"counts": counts(folder / "tests.xml")}
    if code:
        found["tail"] = (folder / f"{name}.log").read_text(errors="replace")[-TAIL:]
    return found


def counts(path: Path) -> dict[str, int]:
    """How many tests ran and how they ended; zeros where pytest did not come to its end."""
    suites = list(ET.parse(path).iter("testsuite")) if path.exists() else []
    names = ("tests", "failures", "errors", "skipped")
    return {name: sum(int(suite.get(name, 0)) for suite in suites) for name in names}


def collect(folder: Path, *, dry: bool, quick: bool) -> dict[str, Any]:
    """Everything."""
    names = [path.stem for path in sorted(folder.glob("*.part"), key=lambda path: path.stat().st_mtime_ns)]
    parts = {name: part(folder, name) for name in names}
    gpu = None if dry else cards.describe()
    found = {"what": "gpu", "dry": dry, "quick": quick, **facts(), "gpu": gpu, "parts": parts}
    failed = [name for name, each in parts.items() if each["code"] not in ({0, NOTHING_RAN} if dry else {0})]
    return {**found, **({"note": DRY} if dry else {}), "failed": failed}


def main() -> int:
    """Save, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--save", type=Path, default=RESULTS, metavar="FOLDER")
    chosen = parser.parse_args()
    found = collect(chosen.folder, dry=chosen.dry, quick=chosen.quick)
    print(machine.save(found, chosen.save))
    if found["failed"]:
        print(f"failed: {', '.join(found['failed'])}", file=sys.stderr)
    return int(bool(found["failed"]))


if __name__ == "__main__":
    sys.exit(main())

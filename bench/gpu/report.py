"""The result of one bench: numbers with their ceilings, what failed, what was left out, and the file they are kept in.

{"what", "dry", "quick", "when", "commit", "versions", …, "gpu": {…} or null, "complete", "numbers": […], "failures":
[{"name", "why"}], "skipped": [{"name", "why"}], "seconds"}; a number is {"name", "unit", "ceiling", "against", "value",
"share", "quartiles": [25 %, 75 %], "range": [least, most], "samples"} and what belongs to it. `value` is the median,
`share` how much of what the ceiling allows was reached, whether more is better or less; both null without a ceiling.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from fwd.cli.bench import machine
from fwd.errors import FwdError

RESULTS = Path(__file__).resolve().parents[1] / "results"
DRY = "a dry run without a GPU: its numbers say that the bench works and nothing else"
PACKAGES = ("cupy-cuda13x", "cuda-bindings", "nvidia-cuda-nvrtc", "triton", "numpy")
TIMES = {"µs", "ms", "s"}


class Report:
    """Gathers, prints as it goes, the ceiling first, and saves. One failure leaves the others alone."""

    def __init__(self, what: str, chosen: argparse.Namespace, gpu: dict[str, Any] | None) -> None:
        self._began = time.monotonic()
        self._folder, self.failed = chosen.save, False
        self._found: dict[str, Any] = {"what": what, "dry": gpu is None, "quick": chosen.quick, **facts(), "gpu": gpu}
        self._found |= {"complete": False, "numbers": [], "failures": [], "skipped": []}
        if gpu is None:
            self._found["note"] = DRY
            print(DRY)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def add(
        self,
        name: str,
        unit: str,
        samples: Sequence[float],
        *,
        ceiling: float | None = None,
        against: str = "",
        lower: bool | None = None,
        **more: Any,
    ) -> float:
        """Keep a number and return its median; `lower` is better where not said for times only."""
        number = summary(samples, ceiling, lower=unit in TIMES if lower is None else lower)
        self._keep("numbers", {"name": name, "unit": unit, "against": against, **number, **more})
        print(line(name, unit, against, number), flush=True)
        return float(number["value"])

    def note(self, **more: Any) -> None:
        """Keep facts that are no numbers."""
        self._found |= more

    def skip(self, name: str, why: str) -> None:
        """Say what was left out."""
        self._keep("skipped", {"name": name, "why": why})
        print(f"{name}: left out: {why}", flush=True)

    def fail(self, name: str, why: str) -> None:
        """Say what failed; the bench goes on and ends with exit code 1."""
        self.failed = True
        self._keep("failures", {"name": name, "why": why})
        print(f"{name}: FAILED: {why}", flush=True)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Run a part of the bench; what it raises is kept as a failure."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # whatever it is, the other parts are still worth their time
            self.fail(name, f"{type(error).__name__}: {error}"[:2000])

    def finish(self) -> int:
        """Say where it is saved; return the exit code."""
        self._found["complete"] = True
        print(self._save())
        return int(self.failed)

    def _keep(self, kind: str, entry: dict[str, Any]) -> None:
        """Save at once: whoever ends a bench that takes too long loses nothing of what it found."""
        self._found[kind].append(entry)
        self._save()

    def _save(self) -> Path:
        self._found["seconds"] = self.seconds
        return machine.save(self._found, self._folder)


def facts() -> dict[str, Any]:
    """Time, machine, versions, commit; `FWD_COMMIT` names it where there is no repository."""
    found = machine.facts()
    found["versions"] |= {name: version for name in PACKAGES if (version := _version(name))}
    found["commit"] = found["commit"] or os.environ.get("FWD_COMMIT", "")
    return found


def summary(samples: Sequence[float], ceiling: float | None, *, lower: bool) -> dict[str, Any]:
    """Median, share of the ceiling and spread."""
    value = statistics.median(samples)
    parts = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [value] * 3
    found: dict[str, Any] = {"ceiling": ceiling or None, "value": value, "share": None}
    if ceiling:
        found["share"] = ceiling / value if lower and value else value / ceiling
    spread = {"quartiles": [parts[0], parts[2]], "range": [min(samples), max(samples)]}
    return {**found, **spread, "samples": len(samples)}


def line(name: str, unit: str, against: str, number: dict[str, Any]) -> str:
    """One number as it is printed: the ceiling first."""
    most = f"{against} {number['ceiling']:,.4g} {unit}; " if number["ceiling"] else ""
    share = f" ({number['share']:.0%})" if number["share"] is not None else ""
    low, high = number["quartiles"]
    return f"{name}: {most}{number['value']:,.4g} {unit}{share}, quartiles {low:,.4g} to {high:,.4g}"


def options(description: str | None, devices: Sequence[str]) -> argparse.ArgumentParser:
    """The options that all benches take. `--device` other than the first is for dry runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=devices, default=devices[0], help="other than cuda: a dry run")
    parser.add_argument("--tiny", action="store_true", help="shapes that take no time, for dry runs")
    parser.add_argument("--quick", action="store_true", help="fewer samples and points")
    parser.add_argument("--save", type=Path, default=RESULTS, metavar="FOLDER")
    return parser


def run(main: Callable[[], int]) -> None:
    """End with the exit code of `main`; what nothing can be measured without ends in one line."""
    try:
        sys.exit(main())
    except FwdError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""

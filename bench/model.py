"""How long a step takes by arithmetic, without a GPU: `python bench/model.py`. A prediction, never a measurement.

    seconds of a step = bytes / bandwidth + launches · seconds of a launch

Bytes are those that `fwd plan` counts, without what pads matrices; rows are sequences of their own at the same context,
and each chooses its experts for itself. What a launch costs is what is left of the decode steps of `decode.py`; at best
it is what `roofline.py` finds for an empty kernel. What is in no result of that GPU is assumed, and said to be.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import readme
import roofline
from gpu import cards
from gpu.configs import TRUE
from gpu.report import RESULTS, facts
from gpu.shapes import launches, spec

from fwd.cli.bench import machine
from fwd.engine.ceilings import STEP_ROWS, Ceiling, ceilings
from fwd.engine.device import GPUS
from fwd.engine.plan import plan
from fwd.errors import ConfigError

CONTEXT = 4096
FORMULA = "seconds of a step = bytes / bandwidth + launches · seconds of a launch"


class Constant(NamedTuple):
    """One number of the formula and where it is from."""

    value: float
    origin: str


class Constants(NamedTuple):
    """What is known of a GPU: bytes a second, seconds that a launch takes of a step, and the least it may take."""

    bandwidth: Constant
    launch: Constant
    least: Constant

    def seconds(self, size: int, count: int, launch: Constant) -> float:
        """The formula."""
        return size / self.bandwidth.value + count * launch.value


# Of the data sheet's bandwidth others reach 92 % on Hopper and 85 % on Blackwell. A launch in a graph, overlapping the
# one before it, takes their decoders about 2 µs, and 1 µs where most of its weights are fetched ahead.
ASSUMED = {"h100": 3.08e12, "h200": 4.42e12, "b200": 6.8e12}
LAUNCH, LEAST = 2e-6, 1e-6


def constants(gpu: str) -> Constants:
    """Measured on that GPU where there are results of one, else assumed."""
    known = measured(gpu)
    read, edge = known.get(roofline.READ), known.get(roofline.EDGE)
    bandwidth = Constant(read["value"] * 1e9, "measured") if read else Constant(ASSUMED[gpu], "assumed")
    rest = list(_rests(known, bandwidth.value)) if read else []
    return Constants(
        bandwidth,
        Constant(max(0.0, statistics.median(rest)), "measured") if rest else Constant(LAUNCH, "assumed"),
        Constant(edge["value"] / 1e6, "measured") if edge else Constant(LEAST, "assumed"),
    )


def measured(gpu: str) -> dict[str, dict[str, Any]]:
    """All numbers of the runs on that GPU by name, the newest of each."""
    runs = [run for run in readme.results("gpu") if cards.key(run["gpu"]["name"]) == gpu.upper()]
    return {
        number["name"]: number for run in runs for part in run["parts"].values() for number in part.get("numbers", ())
    }


def _rests(known: dict[str, dict[str, Any]], bandwidth: float) -> Iterator[float]:
    """What is left for each launch of the steps of one row that were measured."""
    for number in known.values():
        if number.get("way") == "engine" and number["rows"] == 1 and number["model"] in TRUE:
            seconds = 1 / number["value"] - number["step_bytes"] / bandwidth
            yield seconds / launches(spec(number["model"]))


def predicted(model: str, gpu: str, known: Constants) -> list[dict[str, Any]]:
    """A number for each count of rows; raises `ConfigError` where the model does not fit."""
    planned = plan(spec(model), GPUS[gpu], context=CONTEXT, max_seqs=max(STEP_ROWS))
    return [_number(model, gpu, ceiling, known) for ceiling in ceilings(planned, GPUS[gpu].bandwidth)]


def _number(model: str, gpu: str, ceiling: Ceiling, known: Constants) -> dict[str, Any]:
    count = launches(spec(model))
    seconds, least = (known.seconds(ceiling.bytes, count, launch) for launch in (known.launch, known.least))
    tokens_per_s = ceiling.rows / seconds
    return {
        "name": f"{model} on {gpu.upper()}, rows {ceiling.rows}",
        "model": model,
        "gpu": gpu,
        "rows": ceiling.rows,
        "step_bytes": ceiling.bytes,
        "launches": count,
        "us": seconds * 1e6,
        "unit": "tokens/s",
        "value": tokens_per_s,
        "at_best": ceiling.rows / least,
        "against": "data sheet",
        "ceiling": ceiling.tokens_per_s,
        "share": tokens_per_s / ceiling.tokens_per_s,
    }


def _line(number: dict[str, Any]) -> str:
    """The ceiling first."""
    return (
        f"  {number['name']}: {number['against']} {number['ceiling']:,.0f} {number['unit']}; "
        f"{number['step_bytes'] / 1e9:.2f} GB, {number['launches']} launches, {number['us']:,.0f} µs: "
        f"{number['value']:,.0f} {number['unit']} ({number['share']:.0%}), at best {number['at_best']:,.0f}"
    )


def predict() -> dict[str, Any]:
    """Everything, printed as it goes."""
    print(f"a prediction, not a measurement: {FORMULA}; contexts of {CONTEXT} tokens")
    found: dict[str, Any] = {"formula": FORMULA, "context": CONTEXT, "constants": {}, "numbers": [], "skipped": []}
    for gpu in GPUS:
        known = constants(gpu)
        found["constants"][gpu] = {name: each._asdict() for name, each in known._asdict().items()}
        print(f"{gpu.upper()}: {_said(known)}")
        for model in TRUE:
            _add(found, model, gpu, known)
    return found


def _said(known: Constants) -> str:
    return (
        f"{known.bandwidth.value / 1e12:.2f} TB/s ({known.bandwidth.origin}), "
        f"{known.launch.value * 1e6:.1f} µs a launch ({known.launch.origin}), "
        f"{known.least.value * 1e6:.1f} µs at best ({known.least.origin})"
    )


def _add(found: dict[str, Any], model: str, gpu: str, known: Constants) -> None:
    try:
        numbers = predicted(model, gpu, known)
    except ConfigError as error:
        found["skipped"].append({"name": f"{model} on {gpu.upper()}", "why": error.message})
        print(f"  {model} on {gpu.upper()}: left out: {error.message}")
        return
    found["numbers"] += numbers
    print("\n".join(map(_line, numbers)))


def main() -> int:
    """Predict, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, default=RESULTS, metavar="FOLDER")
    chosen = parser.parse_args()
    print(machine.save({"what": "model", "predicted": True, **facts(), **predict()}, chosen.save))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What speculation would give on GPUs, without one: `python bench/speculation.py`. A prediction, never a measurement.

The controller that serves decides over a clock that is told how long steps take: by the formula of `model.py` on the
bytes that rows of one sequence must read, of a mixture the experts of rows that choose each for itself. What drafters
guess is drawn by the acceptances below. Beside it stands what each drafter would give at each fixed length.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import model
from gpu.report import RESULTS, facts
from gpu.shapes import launches, spec
from traces import MOST, Clock, Guesses, Kind, Machine, Trace, fixed, request_of, run, written

from fwd.cli.bench import machine
from fwd.engine.speculate.speculator import JointSpeculator

MODELS = ("gpt-oss-120b", "llama-8b")
GPUS = ("h200", "b200")
PLACES = 4000  # of a trace
PART = 400  # of one kind in the trace that switches
GAP = 50e-6  # what the host may take of a step that does not run ahead
SEED = 7


class Neural(NamedTuple):
    """A drafter with weights: seconds for a draft and for the first of them more, and its acceptances by kind."""

    each: float
    first: float
    rates: dict[str, tuple[float, float]]

    def seconds(self, count: int) -> float:
        """What so many drafts take."""
        return self.first + self.each * count if count else 0.0


# Published acceptances at temperature 1: EAGLE-3 0.81 at the first place of mathematics and 0.53 of chat, a block
# drafter 0.88, and 0.72 … 0.63 over the block of chat; ids a pass of 4.2 and 4.5 on code, 2.7 and 3.1 on chat. One pass
# of EAGLE takes 0.25 ms there, a block of any length 0.45 ms.
DRAFTERS = {
    "eagle": Neural(
        0.25e-3, 0.0, {"chat": (0.56, 0.66), "code": (0.76, 0.76), "edit": (0.80, 0.80), "adversarial": (0.04, 0.04)}
    ),
    "dflash": Neural(
        0.0, 0.45e-3, {"chat": (0.72, 0.63), "code": (0.82, 0.74), "edit": (0.86, 0.80), "adversarial": (0.04, 0.04)}
    ),
}
TEXTS = {"chat": (0.06, 4.0, 0.2), "code": (0.10, 8.0, 0.3), "edit": (0.5, 40.0, 0.4), "adversarial": (0.0, 1.0, 0.8)}
TRACES = (*TEXTS, "switching")


@cache
def trace_of(text: str, drafter: str) -> Trace:
    """What is written, and what would be guessed of it."""
    kinds = {name: Kind(*TEXTS[name], DRAFTERS[drafter].rates[name]) for name in TEXTS}
    names = [text] if text in TEXTS else list(TEXTS)
    parts = [(kinds[names[at % len(names)]], PART) for at in range(PLACES // PART)]
    return written(parts, SEED)


@cache
def machine_of(name: str, gpu: str, drafter: str) -> Machine:
    """Seconds of a step by the rows of one sequence at `model.CONTEXT` tokens."""
    shape, known = spec(name), model.constants(gpu)
    cells = shape.kv_bytes(model.CONTEXT, "bfloat16")
    sizes = [shape.step_bytes(rows, 0, "bfloat16") + cells for rows in range(MOST + 2)]
    seconds = [known.seconds(size, launches(shape), known.launch) for size in sizes]
    return Machine(seconds.__getitem__, DRAFTERS[drafter].seconds, GAP)


class Fixed(NamedTuple):
    """One drafter and length for the whole text, and the tokens a second."""

    name: str
    count: int
    rate: float


def best_fixed(trace: Trace, at: Machine, drafter: str) -> Fixed:
    """The best of all, off among them."""
    found = [Fixed("off", 0, fixed(trace, at, free=True, count=0))]
    for count in range(1, MOST + 1):
        found += [Fixed("suffix", count, fixed(trace, at, free=True, count=count))]
        found += [Fixed(drafter, count, fixed(trace, at, free=False, count=count))]
    return max(found, key=lambda each: each.rate)


def controlled(trace: Trace, at: Machine, drafter: str, streams: int = 1) -> float:
    """Tokens a second that the controller gives."""
    clock, traces = Clock(), dict.fromkeys(range(1, streams + 1), trace)
    drafters = [Guesses(name, traces, free=name == "suffix", clock=clock, machine=at) for name in ("suffix", drafter)]
    speculator = JointSpeculator(drafters[:1], drafters[1], ahead=True, clock=clock)
    return run(speculator, [request_of(number, trace) for number in traces], at, clock)


def number(name: str, gpu: str, drafter: str, text: str) -> dict[str, Any]:
    """Off, the best fixed choice and the controller on one text."""
    trace, at = trace_of(text, drafter), machine_of(name, gpu, drafter)
    off, best, rate = (
        fixed(trace, at, free=True, count=0),
        best_fixed(trace, at, drafter),
        controlled(trace, at, drafter),
    )
    return {
        "name": f"{name} on {gpu.upper()}, suffix and {drafter}, {text}",
        "model": name,
        "gpu": gpu,
        "drafter": drafter,
        "text": text,
        "unit": "tokens/ms",
        "off": off / 1e3,
        "fixed": best.rate / 1e3,
        "fixed_choice": f"{best.name} {best.count}".removesuffix(" 0"),
        "value": rate / 1e3,
        "against_off": rate / off,
        "against_fixed": rate / best.rate,
    }


def numbers(models: Sequence[str] = MODELS, gpus: Sequence[str] = GPUS) -> Iterator[dict[str, Any]]:
    """One for each model, GPU, drafter and text."""
    for name in models:
        for gpu in gpus:
            for drafter in DRAFTERS:
                for text in TRACES:
                    yield number(name, gpu, drafter, text)


def _line(each: dict[str, Any]) -> str:
    return (
        f"  {each['name']}: off {each['off']:.2f} {each['unit']}, best fixed {each['fixed']:.2f} "
        f"({each['fixed_choice']}): {each['value']:.2f}, {each['against_off']:.2f} × off, "
        f"{each['against_fixed']:.2f} × best fixed"
    )


def main() -> int:
    """Simulate, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, default=RESULTS, metavar="FOLDER")
    chosen = parser.parse_args()
    print(f"a prediction, not a measurement: {model.FORMULA}; traces of {PLACES} places drawn with seed {SEED}")
    found = []
    for each in numbers():
        print(_line(each), flush=True)
        found.append(each)
    result = {"what": "speculation", "predicted": True, "formula": model.FORMULA, "seed": SEED, "gap": GAP}
    result |= {"context": model.CONTEXT, "places": PLACES, "texts": TEXTS, "numbers": found}
    result["drafters"] = {name: drafter._asdict() for name, drafter in DRAFTERS.items()}
    print(machine.save({**facts(), **result}, chosen.save))
    return 0


if __name__ == "__main__":
    sys.exit(main())

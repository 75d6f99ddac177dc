"""Every kernel by itself at true shapes, cold L2, beside torch's own op: `python bench/kernels.py [--model MODEL]`.

The floor of a launch is the bytes that it must read over the bandwidth that roofline.py measured, or for prefill its
operations over the matrix rate. Launches follow each other in one graph, as in a step, over copies of their weights.
"""

import statistics
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import roofline
import torch
from gpu import cards, timing
from gpu.case import Case
from gpu.cases import Cases
from gpu.configs import TRUE, tiny
from gpu.report import Report, options, run
from gpu.shapes import spec

from fwd.kernels.ops import Draw

DRAWS = {
    "greedy": Draw(temperature=0.0),
    "temperature": Draw(temperature=1.0),
    "top-k 50, top-p 0.9": Draw(temperature=1.0, top_k=50, top_p=0.9),
}
TINY_L2 = 1 << 16


class Points(NamedTuple):
    """What is measured."""

    models: tuple[str, ...]
    rows: tuple[int, ...]
    context: int  # of the steps with any number of rows
    contexts: tuple[int, ...]  # of attention with one row
    chunk: int
    prefills: tuple[int, ...]  # ends of chunks
    repeats: int


TINY = Points(("tiny",), (1, 2), 64, (16, 100), 64, (64, 128), 2)
QUICK = Points(("llama-1b",), (1, 8), 4096, (128, 4096), 512, (4096,), 20)
WHOLE = Points(
    ("llama-1b", "llama-8b"), (1, 2, 4, 8, 16), 4096, (128, 4096, 32 << 10, 128 << 10), 512, (512, 4096, 32 << 10), 50
)


class Bench:
    """Times cases and keeps what they took."""

    def __init__(self, report: Report, device: str, limits: dict[str, float], repeats: int) -> None:
        self.report, self.repeats, self.clock = report, repeats, timing.clock(device)
        self.bandwidth, self.matmul = limits.get(roofline.READ, 0.0), limits.get(roofline.MATMUL, 0.0)

    def step(self, label: str, cases: Iterable[Case]) -> None:
        """All kernels of a step, and their sum."""
        totals = {"floor": 0.0, "ours": 0.0, "torch": 0.0}
        for case in cases:
            found = self.case(label, case)
            for name in totals:
                totals[name] += case.per_step * found[name]
        whole = f"{label}: all kernels of a step"
        self._add(whole, [totals["ours"]], totals["floor"], totals["torch"] * 1e6, kernel="step")

    def case(self, label: str, case: Case) -> dict[str, float]:
        """One kernel: seconds of its floor, of ours and of torch's."""
        rate, amount = (self.matmul, case.operations) if case.operations else (self.bandwidth, case.read)
        floor = amount / rate if rate else 0.0
        torch_s = 0.0
        with self.report.part(f"{label}: {case.name}: torch"):  # ours counts without it
            torch_s = statistics.median(self.clock.samples(case.theirs, self.repeats))
        more = {"kernel": case.name, "torch_call": case.call, "bytes": case.read, "operations": case.operations}
        samples = self.clock.samples(case.ours, self.repeats)
        ours = self._add(f"{label}: {case.name}", samples, floor, torch_s * 1e6, **more)
        return {"floor": floor, "ours": ours, "torch": torch_s}

    def _add(self, name: str, seconds: list[float], floor: float, torch_us: float, **more: object) -> float:
        micros = [each * 1e6 for each in seconds]
        more |= {"torch_us": torch_us, "over_torch": torch_us / statistics.median(micros)}
        ours = self.report.add(name, "µs", micros, ceiling=floor * 1e6, against="floor", **more) / 1e6
        print(f"  torch {torch_us:,.4g} µs, ours is {more['over_torch']:.2f} × as fast", flush=True)
        return ours


def step_cases(cases: Cases, rows: int, context: int) -> Iterator[Case]:
    """The kernels of a step, the greedy sampler among them."""
    yield cases.embed(rows)
    yield from cases.decode(rows, context)
    yield cases.sampler(rows, DRAWS["greedy"], "greedy")


def measure(bench: Bench, model: str, cases: Cases, points: Points) -> None:
    """One model."""
    for rows in points.rows:
        label = f"{model}, rows {rows}, context {points.context}"
        with bench.report.part(label):
            bench.step(label, step_cases(cases, rows, points.context))
    for context in points.contexts:
        label = f"{model}, rows 1, context {context}"
        with bench.report.part(f"{label}: attention"):
            bench.case(label, cases.most_attention(1, context))
    label = f"{model}, prefill chunk of {points.chunk}"
    with bench.report.part(label):
        for case in cases.products(points.chunk):
            bench.case(label, case)
    for end in () if cases.model.mla else points.prefills:  # over latents it is the decode kernel's
        with bench.report.part(f"{label}: attention up to {end}"):
            bench.case(label, cases.prefill_attention(points.chunk, end // points.chunk - 1))
    for name, draw in DRAWS.items():
        with bench.report.part(f"{model}: sample, {name}"):
            bench.case(f"{model}, rows 1", cases.sampler(1, draw, name))


@torch.inference_mode()
def main() -> int:
    """Measure, print, save."""
    parser = options(__doc__, ("cuda", "host"))
    parser.add_argument("--model", choices=TRUE, help="one alone")
    roofline.add_option(parser)
    chosen = parser.parse_args()
    gpu = cards.describe() if chosen.device == "cuda" else None
    points = TINY if chosen.tiny else QUICK if chosen.quick else WHOLE
    report = Report(f"kernels-{chosen.model}" if chosen.model else "kernels", chosen, gpu)
    bench = Bench(report, chosen.device, roofline.limits(report, chosen), points.repeats)
    for model in (tiny(chosen.model) if chosen.tiny else chosen.model,) if chosen.model else points.models:
        with report.part(model):
            cases = Cases(timing.launcher(chosen.device), spec(model), gpu["l2"] if gpu else TINY_L2)
            measure(bench, model, cases, points)
        if gpu:
            torch.cuda.empty_cache()
    return report.finish()


if __name__ == "__main__":
    run(main)

"""Decode, measured in the whole daemon: `python bench/decode.py MODEL`.

The model has true shapes and random weights. Rows are requests that run beside each other, each with a prompt of its
own; the rate counts the tokens of all of them while all decode. The ceiling is the bytes that a step must read, as
`fwd plan` counts them, over the bandwidth that roofline.py measured.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import roofline
from gpu import cards
from gpu.configs import TRUE, tiny
from gpu.report import Report, options, run
from gpu.serving import Served, model_folder, prompt, serving
from gpu.shapes import spec, step_bytes
from gpu.streams import Run, by_http, by_socket

HTTP_GOAL = 0.98  # of the engine's own rate (DESIGN §6)
PREFILL_GOAL = 0.6  # of the measured matrix rate
DENSE = (1.1, "goal")  # a step of 8 rows over one of 1; experts are read by the rows that choose them


class Points(NamedTuple):
    """What is measured."""

    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    tokens: int
    rounds: int


TINY = Points((32, 96), (1, 2), 64, 1)
QUICK = Points((128, 4096), (1, 8), 256, 3)
WHOLE = Points((128, 4096, 32 << 10, 128 << 10), (1, 2, 4, 8), 256, 5)


class Job(NamedTuple):
    """A model on a device, and how many seconds it may take."""

    model: str
    device: str
    seconds: float
    points: Points
    skewed: bool  # its routers prefer some experts

    @property
    def name(self) -> str:
        """Of its numbers."""
        return f"{self.model}-skewed" if self.skewed else self.model


class Bench:
    """One model in one daemon."""

    def __init__(self, report: Report, job: Job, served: Served, limits: dict[str, float]) -> None:
        self.report, self.served = report, served
        self.job, self.name, self.points, self.spec = job, job.name, job.points, spec(job.model)
        self.bandwidth, self.matmul = limits.get(roofline.READ, 0.0), limits.get(roofline.MATMUL, 0.0)
        self.steps: dict[tuple[int, int], float] = {}

    def point(self, context: int, rows: int) -> None:
        """Prefill the prompts, which stay in the cache, then decode after them in turns through socket and HTTP."""
        prompts = [prompt(self.job.model, row, context) for row in range(rows)]
        for row, ids in enumerate(prompts):
            self._prefill(row, ids)
        tokens, served = self.points.tokens, self.served
        runs: dict[str, list[Run]] = {"socket": [], "http": []}
        for turn in range(self.points.rounds + 1):
            found = by_socket(served.client, prompts, tokens), by_http(served.port, prompts, tokens)
            for way, each in zip(runs, found, strict=True) if turn else ():
                runs[way].append(each)
        self._decoded(context, rows, runs)

    def verify_cost(self) -> None:
        """What a step of many rows costs over one of a single row, at each context."""
        most = max(self.points.rows)
        for context in self.points.contexts:
            one, many = self.steps.get((context, 1)), self.steps.get((context, most))
            if one and many:
                name = f"{self.name}, context {context}: step of {most} rows over step of 1"
                goal, against = (
                    (self._bytes(most, context) / self._bytes(1, context), "bytes") if self.spec.moe else DENSE
                )
                self.report.add(name, "×", [many / one], ceiling=goal, against=against, lower=True)

    def _prefill(self, row: int, ids: Sequence[int]) -> None:
        """Read a prompt; its new tokens give the rate of prefill, against the parameters they are multiplied with."""
        (answer,) = by_socket(self.served.client, [ids], 2).rows
        fresh, ms = len(ids) - answer.timing.cached_tokens, answer.timing.prefill_ms
        # Of one prompt, and where it is long enough to say something.
        if row or fresh < self.served.engine.chunk or not ms:
            return
        self.report.add(
            f"{self.name}, prefill up to {len(ids)}",
            "tokens/s",
            [fresh / ms * 1e3],
            ceiling=self.matmul / (2 * (self.spec.active_parameters() - self.spec.vocab * self.spec.hidden)),
            against="matrix rate, attention not counted,",
            goal=PREFILL_GOAL,
            fresh=fresh,
        )

    def _bytes(self, rows: int, context: int) -> int:
        """Of a step in the middle of the answers."""
        return step_bytes(self.spec, rows, context + self.points.tokens // 2, skewed=self.job.skewed)

    def _decoded(self, context: int, rows: int, runs: dict[str, list[Run]]) -> None:
        size = self._bytes(rows, context)
        ceiling = rows * self.bandwidth / size
        label = f"{self.name}, context {context}, rows {rows}"
        print(f"{label}: a step must read {size:,} bytes")
        engine = [run.engine_tokens_per_s for run in runs["socket"]]
        facts = {"model": self.name, "context": context, "rows": rows, "step_bytes": size}
        for way, found in {"engine": engine, **{way: _rates(each) for way, each in runs.items()}}.items():
            against = "measured bandwidth"
            value = self.report.add(
                f"{label}: {way}", "tokens/s", found, ceiling=ceiling, against=against, way=way, **facts
            )
            if way == "socket":
                self.steps[context, rows] = rows / value
        shares = [run.tokens_per_s / run.engine_tokens_per_s for run in runs["http"]]
        self.report.add(f"{label}: HTTP over the engine", "×", shares, ceiling=HTTP_GOAL, against="goal")


def _rates(runs: Sequence[Run]) -> list[float]:
    return [run.tokens_per_s for run in runs]


def combinations(points: Points, capacity: int, report: Report, seconds: float) -> Iterator[tuple[int, int]]:
    """The points that the KV pool of `capacity` tokens holds, while there is time; the others are left out by name."""
    for context, rows in itertools.product(points.contexts, points.rows):
        name = f"context {context}, rows {rows}"
        if rows * (context + points.tokens) > capacity:
            report.skip(name, f"the KV pool holds {capacity} tokens")
        elif report.seconds > seconds:
            report.skip(name, f"no time was left of {seconds:.0f} s")
        else:
            yield context, rows


def measure(report: Report, job: Job, limits: dict[str, float]) -> None:
    """One daemon: its start, then all points that it holds."""
    points = job.points
    with (
        model_folder(job.model, job.device, skewed=job.skewed) as folder,
        memory(report, job.name) as note,
        serving(folder, job.device, max(points.rows)) as served,
    ):
        start(report, job, served)
        bench = Bench(report, job, served, limits)
        capacity = served.engine.pages * served.engine.page_size
        for context, rows in combinations(points, capacity, report, job.seconds):
            with report.part(f"context {context}, rows {rows}"):
                bench.point(context, rows)
        bench.verify_cost()
        note(sum(served.engine.memory.values()))


def start(report: Report, job: Job, served: Served) -> None:
    """From exec to the first token, the load included."""
    report.note(engine={key: getattr(served.engine, key) for key in served.engine.__struct_fields__})
    first = by_socket(served.client, [prompt(job.model, 99, 8)], 2)
    report.add(f"{job.name}, start to ready", "s", [served.ready_s])
    report.add(f"{job.name}, start to first token", "s", [first.began + first.first_token_s - served.daemon.started])
    report.skip("GPU idle share", "it needs a trace of the engine's own process")


@contextlib.contextmanager
def memory(report: Report, name: str) -> Iterator[Callable[[int], None]]:
    """Compare what the driver says is in use before and after with what is planned."""
    before = cards.memory_used()

    def note(planned: int) -> None:
        after = cards.memory_used()
        if before is None or after is None:
            report.skip(f"{name}, device memory", "nvidia-smi does not say how much is used")
        else:
            used = (after - before) / 1e9
            against = "plan, without the driver's own"
            report.add(f"{name}, device memory", "GB", [used], ceiling=planned / 1e9, against=against, lower=True)

    yield note


def main() -> int:
    """Measure, print, save."""
    parser = options(__doc__, ("cuda", "host", "cpu"))
    parser.add_argument("model", choices=TRUE, nargs="?", default="llama-1b")
    parser.add_argument("--skewed", action="store_true", help="routers that prefer some experts")
    parser.add_argument("--seconds", type=float, default=420.0, help="begin no further point after so many")
    roofline.add_option(parser)
    chosen = parser.parse_args()
    gpu = cards.describe() if chosen.device == "cuda" else None
    points = TINY if chosen.tiny else QUICK if chosen.quick else WHOLE
    model = tiny(chosen.model) if chosen.tiny else chosen.model
    job = Job(model, chosen.device, chosen.seconds, points, chosen.skewed)
    report = Report(f"decode-{job.name}", chosen, gpu)
    with report.part(job.name):
        measure(report, job, roofline.limits(report, chosen))
    return report.finish()


if __name__ == "__main__":
    run(main)

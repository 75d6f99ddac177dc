"""Others on the same weights in the same run: `python bench/peers.py MODEL`.

Beside the daemon, read through its socket: transformers' generate with a static cache and compile, and a plain decoder
in torch under torch.compile. Each runs alone in a process of its own, one sequence at a time.
"""

import json
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import roofline
from gpu import cards
from gpu.configs import DENSE
from gpu.report import Report, options, run
from gpu.serving import model_folder, prompt, serving
from gpu.shapes import spec
from gpu.streams import by_socket

PEERS = {"transformers": "gpu.hugging", "torch.compile": "gpu.decoder"}
OURS = "fwd"


class Points(NamedTuple):
    """What is measured."""

    contexts: tuple[int, ...]
    tokens: int
    rounds: int


TINY = Points((32,), 12, 1)
QUICK = Points((128,), 128, 3)
WHOLE = Points((128, 4096), 256, 5)


class Job(NamedTuple):
    """A model's folder on a device."""

    name: str
    folder: Path
    device: str
    points: Points


def theirs(job: Job, module: str, context: int, seconds: float) -> list[float]:
    """Tokens per second of each round, measured by the module; raises what it ended with."""
    numbers = {"--context": context, "--tokens": job.points.tokens, "--rounds": job.points.rounds}
    flags = [str(part) for pair in numbers.items() for part in pair]
    device = "cuda" if job.device == "cuda" else "cpu"
    command = [sys.executable, "-m", module, str(job.folder), "--device", device, *flags]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False, timeout=max(1.0, seconds))
    if done.returncode:
        raise RuntimeError(f"{module} ended with {done.returncode}: {done.stderr.strip()[-1000:]}")
    return list(json.loads(done.stdout.splitlines()[-1]))


def ours(job: Job) -> dict[int, list[float]]:
    """The same by the daemon, through its socket, at each context."""
    found = {}
    with serving(job.folder, job.device, 1) as served:
        for context in job.points.contexts:
            prompts = [prompt(job.name, 0, context)]
            runs = [by_socket(served.client, prompts, job.points.tokens) for _ in range(job.points.rounds + 1)]
            found[context] = [each.tokens_per_s for each in runs[1:]]
    return found


def compare(report: Report, job: Job, limits: dict[str, float], seconds: float) -> None:
    """Everybody's rates, then what the daemon's is over each."""
    rates: dict[tuple[str, int], list[float]] = {}
    with report.part(f"{job.name}: {OURS}"):
        rates |= {(OURS, context): found for context, found in ours(job).items()}
    for peer, module in PEERS.items():
        for context in job.points.contexts:
            with report.part(f"{job.name}, context {context}: {peer}"):
                rates[peer, context] = theirs(job, module, context, seconds - report.seconds)
    for (who, context), found in rates.items():
        size = spec(job.name).step_bytes(1, context + job.points.tokens // 2, "bfloat16")
        ceiling = limits.get(roofline.READ, 0.0) / size
        label = f"{job.name}, context {context}: {who}"
        facts = {"model": job.name, "context": context, "who": who, "step_bytes": size}
        report.add(label, "tokens/s", found, ceiling=ceiling, against="measured bandwidth", **facts)
    for (who, context), found in rates.items():
        if who != OURS and (mine := rates.get((OURS, context))):
            ratio = statistics.median(mine) / statistics.median(found)
            report.add(f"{job.name}, context {context}: {OURS} over {who}", "×", [ratio])


def flashinfer(report: Report) -> None:
    """Its decode attention is a peer of one kernel, where it is installed."""
    absent = find_spec("flashinfer") is None
    report.skip("FlashInfer", "it is not installed" if absent else "its kernels alone are no decoder")


def main() -> int:
    """Measure, print, save."""
    parser = options(__doc__, ("cuda", "host", "cpu"))
    parser.add_argument("model", choices=DENSE, nargs="?", default="llama-1b")
    parser.add_argument("--seconds", type=float, default=500.0, help="for everything")
    roofline.add_option(parser)
    chosen = parser.parse_args()
    gpu = cards.describe() if chosen.device == "cuda" else None
    points = TINY if chosen.tiny else QUICK if chosen.quick else WHOLE
    name = "tiny" if chosen.tiny else chosen.model
    report = Report(f"peers-{name}", chosen, gpu)
    flashinfer(report)
    with report.part(name), model_folder(name, chosen.device) as folder:
        limits = roofline.limits(report, chosen)
        compare(report, Job(name, folder, chosen.device, points), limits, chosen.seconds)
    return report.finish()


if __name__ == "__main__":
    run(main)

"""What the GPU can do at all: read cold memory, multiply, start a kernel after a kernel: `python bench/roofline.py`.

Every other bench states its numbers as shares of these. Reads use the loads of the kernels (`load_stream`) over buffers
that together are several times the L2; matrices are random, since zeros take less power and run faster.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu import cards, timing
from gpu.report import Report, options, run
from torch import Tensor

from fwd.kernels import roofline as kernels
from fwd.kernels.launch import Launcher

READ = "read bandwidth, cold"  # the numbers that other benches ask for
MATMUL = "bf16 matrix rate"
EDGE = "dependent launch, one more kernel in a graph"
EDGE_GOAL = 1.0  # µs: what a step's budget assumes for the better of its two cases
TINY_L2 = 1 << 16


class Scale(NamedTuple):
    """How much is measured."""

    reads: tuple[int, ...]  # bytes of one launch; the last is the ceiling of all benches
    matmuls: tuple[tuple[int, int, int], ...]  # rows, inputs, outputs; the first is the ceiling
    chain: int
    repeats: int


TINY = Scale((1 << 16, 1 << 18), ((64, 128, 96),), 4, 2)
QUICK = Scale((64 << 20, 1 << 30), ((8192, 8192, 8192),), 1000, 20)
WHOLE = Scale(
    tuple(size << 20 for size in (2, 8, 16, 64, 128, 1024)),
    ((8192, 8192, 8192), (512, 4096, 28672), (512, 14336, 4096), (512, 2048, 16384), (512, 8192, 2048)),
    2000,
    100,
)


def main() -> int:
    """Measure, print, save."""
    parser = options(__doc__, ("cuda", "host"))
    chosen = parser.parse_args()
    gpu = cards.describe() if chosen.device == "cuda" else None
    report = Report("roofline", chosen, gpu)
    sheet = cards.sheet(gpu["name"]) if gpu else None
    scale = TINY if chosen.tiny else QUICK if chosen.quick else WHOLE
    with report.part("reads"):
        reads(report, chosen.device, scale, gpu["l2"] if gpu else TINY_L2, sheet and sheet.bandwidth)
    with report.part("matrix products"):
        products(report, chosen.device, scale, sheet and sheet.matmul)
    with report.part("edges"):
        edges(report, chosen.device, scale)
    with report.part("meetings"):
        meetings(report, chosen.device, scale)
    return report.finish()


def reads(report: Report, device: str, scale: Scale, l2: int, ceiling: float | None) -> None:
    """GB/s of launches that read so many bytes each, one after the other in a graph."""
    launcher, clock = timing.launcher(device), timing.clock(device)
    for size in scale.reads:
        pool = _words(launcher, size, timing.copies(size, l2))
        found = clock.samples([_read(launcher, part) for part in pool], scale.repeats)
        name = READ if size == scale.reads[-1] else f"read bandwidth, cold, {size >> 10} KiB a launch"
        rates = [size / seconds / 1e9 for seconds in found]
        report.add(name, "GB/s", rates, ceiling=ceiling and ceiling / 1e9, against="data sheet", bytes=size)


def _read(launcher: Launcher, part: Tensor) -> timing.Work:
    return lambda: kernels.read_stream(launcher, part)


def _words(launcher: Launcher, size: int, copies: int) -> list[Tensor]:
    words = torch.randint(-(1 << 31), 1 << 31, (size // 4,), dtype=torch.int32, device=launcher.device)
    return [words.clone() for _ in range(copies)]


def products(report: Report, device: str, scale: Scale, ceiling: float | None) -> None:
    """Dense bf16 operations a second of torch's own matrix product, on random numbers."""
    clock = timing.clock(device)
    for rows, inputs, outputs in scale.matmuls:
        x, weight = (
            torch.randn(shape, device=device if device == "cuda" else "cpu", dtype=torch.bfloat16)
            for shape in ((rows, inputs), (outputs, inputs))
        )
        found = clock.samples([lambda x=x, weight=weight: x @ weight.T] * 8, scale.repeats)
        rates = [2 * rows * inputs * outputs / seconds / 1e12 for seconds in found]
        first = (rows, inputs, outputs) == scale.matmuls[0]
        name = MATMUL if first else f"bf16 matrix rate, {rows} × {inputs} × {outputs}"
        report.add(name, "TFLOP/s", rates, ceiling=ceiling and ceiling / 1e12, against="data sheet")


def edges(report: Report, device: str, scale: Scale) -> None:
    """What one more empty kernel of the house costs in a graph, dependent launches allowed or not."""
    for dependent in (True, False):
        launcher = timing.launcher(device, dependent=dependent)
        steps = torch.zeros(1, dtype=torch.int32, device=launcher.device)
        chain = [lambda launcher=launcher, steps=steps: kernels.empty_step(launcher, steps)] * scale.chain
        found = timing.clock(device).samples(chain, scale.repeats)
        if dependent and not launcher.dependent:
            report.skip("dependent launch", f"launches are plain on {launcher.name}")
            continue
        _edge(report, EDGE if dependent else "plain launch, one more kernel in a graph", found)


def meetings(report: Report, device: str, scale: Scale) -> None:
    """What one more meeting of all blocks costs inside a kernel: long launches less short ones."""
    launcher, clock = timing.launcher(device), timing.clock(device)
    state, steps = (torch.zeros(1, dtype=torch.int32, device=launcher.device) for _ in range(2))
    few, many = (
        clock.samples([lambda rounds=rounds: kernels.meet(launcher, state, steps, rounds)], scale.repeats)
        for rounds in (1, 1 + scale.chain)
    )
    found = [(long - short) / scale.chain for long, short in zip(many, few, strict=True)]
    _edge(report, "meeting of all blocks in a kernel", found)


def _edge(report: Report, name: str, seconds: Sequence[float]) -> None:
    report.add(name, "µs", [each * 1e6 for each in seconds], ceiling=EDGE_GOAL, against="goal")


def limits(report: Report, chosen: argparse.Namespace) -> dict[str, float]:
    """Bytes a second of `READ` and operations a second of `MATMUL`, from the report given or measured now.

    It is measured in a process of its own, which leaves no memory in use. What is not known is left out: then the
    numbers of `report` have no ceilings.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = chosen.roofline or _measured(chosen, Path(folder))
        found: dict[str, Any] = json.loads(path.read_text()) if path else {"numbers": []}
    medians = {number["name"]: number["value"] for number in found["numbers"]}
    known = {name: medians[name] * unit for name, unit in ((READ, 1e9), (MATMUL, 1e12)) if name in medians}
    for name in {READ, MATMUL} - set(known):
        report.skip(name, "roofline.py did not find it: no ceilings by it")
    return known


def _measured(chosen: argparse.Namespace, folder: Path) -> Path | None:
    device = "cuda" if chosen.device == "cuda" else "host"
    flags = ["--quick", "--device", device, *(["--tiny"] if chosen.tiny else []), "--save", str(folder)]
    subprocess.run([sys.executable, __file__, *flags], check=False)
    return next(folder.glob("*-roofline.json"), None)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Let a bench take the roofline of the same run."""
    parser.add_argument("--roofline", type=Path, metavar="FILE", help="saved by roofline.py (default: measured first)")


if __name__ == "__main__":
    run(main)

"""Instructions a weight in the main loop of each kernel that streams weights: `python bench/instructions.py [--write]`.

Counted in the machine code of NVRTC's builds, which needs no GPU but `cuobjdump`, of CUDA_HOME, the PATH or triton's
wheel; the table is bench/instructions.json. An instruction of the loop counts once, whether or not it is jumped over. A
warp's product of 16 outputs, 16 inputs and 8 rows has 8 weights a lane, and weights are used once for all columns of 8
rows. The budget is what a card issues while it reads a weight: multiprocessors · 128 lanes · clock / (bytes a second /
bytes a weight).
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fwd.errors import KernelError
from fwd.kernels.builds import ARCHES, BUILDS
from fwd.kernels.jit import Jit

TABLE = Path(__file__).with_name("instructions.json")
FAMILIES = ("gemv", "qkv", "experts", "latent_qkv")  # of files in cuda/: those that stream weights
NONE = {"embed", "latent_rows"}  # of their kernels: what multiplies nothing
TOOL = "cuobjdump"
MARGIN = 0.03  # of a count, for another version of the compiler
WEIGHTS, ROWS = 8, 8  # of a lane, of a product of tensor cores
# Bits a weight with its scales, as `fwd.kernels.packing` streams it.
BITS = {"bf16": 16.0, "fp8": 8.03, "mxfp4": 4.25, "nvfp4": 4.5, "int4_32": 4.75, "int4_128": 4.25}
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
FUNCTION = re.compile(r"^\s+Function : (\w+)$", re.MULTILINE)
BRANCH = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)$")

Counts = dict[str, dict[str, dict[str, float]]]  # architecture → file → kernel


class Card(NamedTuple):
    """What a GPU issues and reads (research of issue 6: clocks under load, bytes as measured by others)."""

    multiprocessors: int
    clock: float
    bandwidth: float


CARDS = {"sm_90a": Card(132, 1.755e9, 4.8e12), "sm_100a": Card(148, 1.85e9, 7.67e12)}  # H200, B200


def budget(arch: str, bits: float) -> float:
    """Instructions of a lane a weight while the card reads so many bits."""
    card = CARDS[arch]
    return card.multiprocessors * 128 * card.clock * bits / 8 / card.bandwidth


def format_of(source: str) -> str:
    """Which weights the kernels of a file take."""
    stem = source.removesuffix(".cu")
    return next((name for name in BITS if stem.endswith(f"_{name}")), "bf16")


def family_of(source: str) -> str:
    """Which kernels stand in a file."""
    return source.removesuffix(".cu").removesuffix(f"_{format_of(source)}")


def wanted() -> dict[str, list[str]]:
    """The kernels that are counted, by file."""
    files = {source: kernels for source, kernels in BUILDS.items() if family_of(source) in FAMILIES}
    return {source: [name for name in kernels if name not in NONE] for source, kernels in files.items()}


def tool() -> Path | None:
    """The disassembler, if there is one."""
    places = [Path(os.environ["CUDA_HOME"], "bin", TOOL)] if os.environ.get("CUDA_HOME") else []
    if found := shutil.which(TOOL):
        places.append(Path(found))
    if spec := importlib.util.find_spec("triton"):
        places += [Path(each, "backends/nvidia/bin", TOOL) for each in spec.submodule_search_locations or ()]
    return next((place for place in places if place.is_file()), None)


def loop(text: str) -> list[str]:
    """The instructions of a kernel's main loop: of those that hold products and no such loop, the one with most."""
    code = [(int(place, 16), line.strip()) for place, line in LINE.findall(text)]
    loops = {}
    for place, line in code:
        branch = BRANCH.search(line)
        if branch and (first := int(branch[1], 16)) < place:
            body = [each for at, each in code if first <= at <= place]
            if _products(body):
                loops[first, place] = body
    inner = [body for span, body in loops.items() if not any(_within(other, span) for other in loops)]
    return max(inner, key=lambda body: (_products(body), -len(body)), default=[])


def _within(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return span != other and other[0] <= span[0] and span[1] <= other[1]


def per_weight(kernel: str, body: list[str]) -> float:
    """Instructions a weight of a loop; the kernel's name ends with its rows, where it is not for 8."""
    columns = 2 if kernel.endswith("16") else 1
    return round(len(body) * columns / (WEIGHTS * _products(body)), 2)


def counts(jit: Jit, disassembler: Path) -> Counts:
    """All counts, from builds in the cache or new ones."""
    return {arch: {source: dict(_of_file(jit, disassembler, source, arch)) for source in wanted()} for arch in ARCHES}


def _of_file(jit: Jit, disassembler: Path, source: str, arch: str) -> Iterator[tuple[str, float]]:
    command = (str(disassembler), "-sass", str(jit.build(source, arch).path))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    _, *parts = FUNCTION.split(done.stdout)
    texts = dict(zip(parts[::2], parts[1::2], strict=True))
    for kernel in wanted()[source]:
        body = loop(texts.get(kernel, ""))
        if not _products(body):
            raise KernelError(f"{source}: {TOOL} shows no loop of products in {kernel}: {done.stderr.strip()[-200:]}")
        yield kernel, per_weight(kernel, body)


def _products(body: list[str]) -> int:
    return sum("HMMA" in line for line in body)


def main() -> None:
    """Print each count beside the budget, and write the table if told to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    given = parser.parse_args()
    disassembler = tool()
    if disassembler is None:
        raise SystemExit(f"{TOOL} is not found: set CUDA_HOME, or install triton")
    found = counts(Jit(), disassembler)
    for arch, files in found.items():
        for source, kernels in files.items():
            most = budget(arch, BITS[format_of(source)])
            told = ", ".join(f"{kernel} {count:.2f}" for kernel, count in kernels.items())
            print(f"{arch} {source} (budget {most:.1f}): {told}")
    if given.write:
        TABLE.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What a plan needs to know of a device, also of one that is not in this machine. No torch here."""

import sys
from dataclasses import dataclass, replace
from typing import Literal

from fwd.kernels.gpu import Facts


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan needs to know of a device. Sizes in bytes, `bandwidth` in bytes a second (0: to be measured).

    `pool` bounds a KV pool of which no size is asked for and that leaves `spare` as well; `reserve` stays free.
    """

    name: str
    memory: int
    bandwidth: float
    chunk: int  # rows of a prefill chunk
    pool: int
    graphs: int
    reserve: int
    kind: Literal["cpu", "host", "cuda"] = "cuda"
    spare: int = 0

    @property
    def kernels(self) -> bool:
        """Decode steps are launches of kernels, else the reference's."""
        return self.kind != "cpu"

    @property
    def gpu(self) -> bool:
        """It has a memory of its own."""
        return self.kind == "cuda"


def cpu(memory: int) -> Device:
    """This machine with `memory` bytes available.

    The reserve holds Python and torch (0.2 GiB once imported), the ids of open requests and oneDNN's scratch pads.
    """
    return Device("cpu", memory, bandwidth=0.0, chunk=64, pool=1 << 30, graphs=0, reserve=512 << 20, kind="cpu")


def host(memory: int) -> Device:
    """The same, with the kernels executed by the CPU."""
    return replace(cpu(memory), name="host", kind="host")


def gpu(facts: Facts) -> Device:
    """The GPU of this machine, with the memory that nobody holds now and the bandwidth that its clocks give."""
    named = next((known.bandwidth for name, known in GPUS.items() if name in facts.name.lower()), 0.0)
    return _gpu(facts.name, facts.free, facts.bandwidth or named)


def _gpu(name: str, memory: float, bandwidth: float) -> Device:
    """Assumed until measured: 20 MB a captured graph, and 1 GiB for the context, its modules and library workspaces.

    The spare is what others may take before an engine that died is followed by one of the same sizes.
    """
    graphs = 2 * 5 * 20_000_000  # buckets 1, 2, 4, 8, 16, for both places of the ring
    spare = 256 << 20
    return Device(
        name, int(memory), bandwidth, chunk=512, pool=sys.maxsize, graphs=graphs, reserve=1 << 30, spare=spare
    )


# Memory is about what the driver reports of an idle device, bandwidth what the data sheet says.
GPUS = {
    "h100": _gpu("h100", 85.0e9, 3.35e12),
    "h200": _gpu("h200", 150.1e9, 4.8e12),
    "b200": _gpu("b200", 191.5e9, 8.0e12),
}

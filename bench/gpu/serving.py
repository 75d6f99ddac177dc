"""Synthetic model folders and daemons that serve them, for benches that measure whole answers."""

import contextlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fwd.cli.bench.http import free_port
from fwd.cli.common import wait_ready
from fwd.cli.private import Private, private_daemon
from fwd.engine.memory import available
from fwd.errors import EngineError
from fwd.protocol.client import Client
from fwd.protocol.values import EngineInfo
from gpu.configs import MODELS
from gpu.shapes import spec
from gpu.streams import MODEL

SHM = Path("/dev/shm")
SEED = 20261124
ROOM = 4 << 30  # bytes for all else: of memory for who draws and who loads, layer by layer
QUEUE = 1 << 22  # tokens that may wait: many prompts of 128k at once
WORDS = 300  # the first id that is a word in every tokenizer here


@dataclass(frozen=True)
class Served:
    """A ready daemon on a model."""

    daemon: Private
    client: Client
    port: int
    engine: EngineInfo
    ready_s: float


@contextlib.contextmanager
def model_folder(name: str, device: str, *, skewed: bool = False) -> Iterator[Path]:
    """A folder with random weights, in memory where there is room; drawn by a process of its own."""
    size = spec(name).weight_bytes() + ROOM
    place = SHM if SHM.is_dir() and min(shutil.disk_usage(SHM).free, available() - ROOM) > size else None
    with tempfile.TemporaryDirectory(prefix="fwd-bench-", dir=place) as folder:
        target = Path(folder) / name
        drawn = "cuda" if device == "cuda" else "cpu"
        command = [sys.executable, "-m", "gpu.checkpoint", name, str(target), "--device", drawn]
        command += ["--skewed"] if skewed else []
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
        if done.returncode:
            raise EngineError(f"no checkpoint: {done.stderr.strip()[-500:]}")
        yield target


@contextlib.contextmanager
def serving(folder: Path, device: str, max_seqs: int) -> Iterator[Served]:
    """`fwd serve` on the folder, ready, on a socket and a port of its own."""
    port, settings = free_port(), folder / "fwd.toml"
    settings.write_text(f"max_queue = {QUEUE}\n")
    flags = ("--device", device, "--max-seqs", str(max_seqs), "--http", f"127.0.0.1:{port}", "--name", MODEL)
    more = ("--config", str(settings), "--log-level", "error")
    with private_daemon(str(folder), *flags, *more) as daemon, daemon.connect() as client:
        status = wait_ready(client)
        assert status.engine, "a daemon that is ready has an engine"
        yield Served(daemon, client, port, status.engine, time.perf_counter() - daemon.started)


def prompt(name: str, row: int, length: int) -> list[int]:
    """The ids of a row: longer prompts of the same row begin with the shorter ones."""
    rng = random.Random(SEED + row)
    vocab = MODELS[name]["vocab_size"]
    return [rng.randrange(WORDS, vocab) for _ in range(length)]

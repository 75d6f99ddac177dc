"""How fast a checkpoint is loaded and what memory that takes: `python bench/load.py`.

Writes checkpoints of random weights with true shapes, in shards. The ceiling is a plain read of the same files with the
same number of threads into buffers that are used again. It takes turns with what is measured, from the disk (the page
cache gives the files up before) and from the page cache. `read` takes all tensors into place and hashes every byte, so
SHA-256 on all cores is a second ceiling, and it is shown without hashing, too; `load` builds the model for the CPU.
Each is a fresh process; memory is what is resident above what it had before. Saves into bench/results.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from unittest import mock

import torch
from gpu.checkpoint import header
from gpu.configs import MODELS, Config, tiny
from gpu.tensors import Drawn, tensors

from fwd.cli.bench import machine
from fwd.engine.memory import blocks_apart
from fwd.models import reader
from fwd.models.checkpoint import Checkpoint
from fwd.models.config import parse_spec
from fwd.models.load import load
from fwd.models.reader import LEAF, THREADS
from fwd.models.safetensors import INDEX

GOAL = 0.9  # of the plain read
SHARD = 1 << 30  # bytes, about
BLOCK = 64 << 20  # random bytes that are written again and again
SEED = 20261126
CHILD = "--child"
BYTES_OF = {"F8_E4M3": 0x77, "F32": 0x3F, "BF16": 0x3F}  # and-masks: no NaN, nothing infinite
CASES = {"8B-like bf16": ("llama-8b", 6), "8B-like nvfp4": ("llama-8b-nvfp4", 20)}  # a model, as many layers of it


def config(case: str, *, dry: bool) -> Config:
    """The config.json of a case, or of its shrunken twin."""
    name, layers = CASES[case]
    return MODELS[tiny(name)] if dry else MODELS[name] | {"num_hidden_layers": layers, "vocab_size": 32768}


def write(folder: Path, model: Config) -> list[Path]:
    """Write the model in shards of about `SHARD` bytes, in the order of names as writers do; return the files."""
    (folder / "config.json").write_text(json.dumps(model))
    noise = random.Random(SEED).randbytes(BLOCK)
    shards = list(_shards(sorted(tensors(parse_spec(model)), key=attrgetter("name"))))
    places = {}
    for number, held in enumerate(shards, 1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(path, held, noise)
        places |= dict.fromkeys((tensor.name for tensor in held), path.name)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return sorted(folder.glob("*.safetensors"))


def _shards(given: Iterable[Drawn]) -> Iterator[list[Drawn]]:
    held: list[Drawn] = []
    for tensor in given:
        held.append(tensor)
        if sum(each.nbytes for each in held) >= SHARD:
            yield held
            held = []
    if held:
        yield held


def _write_shard(path: Path, held: list[Drawn], noise: bytes) -> None:
    with path.open("wb") as file:
        file.write(header(held))
        for tensor in held:
            _write_tensor(file.write, tensor, noise)
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(put: Callable[[bytes], object], tensor: Drawn, noise: bytes) -> None:
    left, mask = tensor.nbytes, BYTES_OF.get(tensor.dtype)
    block = noise if mask is None else noise[: 1 << 20].translate(bytes(value & mask for value in range(256)))
    while left:
        left -= len(block[:left]) if put(block[:left]) else 0


def forget(files: list[Path]) -> None:
    """Let the page cache give the files up."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(files: list[Path]) -> dict[str, float]:
    """Seconds, CPU seconds to read the files with the loader's threads, into one buffer each."""
    opened = [os.open(path, os.O_RDONLY) for path in files]
    parts = iter([(fd, at) for fd in opened for at in range(0, os.fstat(fd).st_size, LEAF)])
    lock, buffers = Lock(), [bytearray(LEAF) for _ in range(THREADS)]

    def work(buffer: bytearray) -> None:
        while True:
            with lock:
                part = next(parts, None)
            if part is None:
                return
            os.preadv(part[0], [buffer], part[1])

    threads = [Thread(target=work, args=(buffer,)) for buffer in buffers]
    began, spent = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took, cpu = time.perf_counter() - began, time.process_time() - spent
    for fd in opened:
        os.close(fd)
    return {"seconds": took, "cpu": cpu}


def hash_rate() -> float:
    """Bytes a second that all cores hash."""
    data, cores = bytes(BLOCK), os.cpu_count() or 1
    threads = [Thread(target=lambda: hashlib.sha256(data).digest()) for _ in range(cores)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return cores * len(data) / (time.perf_counter() - began)


def read_all(folder: Path) -> Any:
    """Take every tensor as it is stored."""
    with Checkpoint(folder, lambda _done, _total: None) as checkpoint:
        tensors = [checkpoint.raw(name) for name in checkpoint.entries]
        checkpoint.finish(lambda _name: False)
        return tensors, checkpoint.digest()


def read_unhashed(folder: Path) -> Any:
    """The same with a hash that costs nothing, to see what the rest does."""
    with mock.patch.object(reader.hashlib, "sha256", _NoHash):
        return read_all(folder)


class _NoHash:
    def __init__(self, _data: bytes = b"") -> None:
        pass

    def update(self, data: memoryview) -> None:
        """Do nothing."""

    def digest(self) -> bytes:
        """Return nothing much."""
        return bytes(32)

    def hexdigest(self) -> str:
        """The same."""
        return ""


def load_model(folder: Path) -> Any:
    """What `fwd serve --device cpu` does: weights are packed on the way, the head is float32."""
    return load(folder, device="cpu", context=1024)


WORK: dict[str, Callable[[Path], Any]] = {"read": read_all, "read unhashed": read_unhashed, "load": load_model}


def work_here(what: str, folder: Path) -> dict[str, float]:
    """Do one of `WORK` in this process: seconds, CPU seconds, memory that is resident after it and at most."""
    torch.zeros(1024, 1024) @ torch.zeros(1024, 1024)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    began, spent = time.perf_counter(), time.process_time()
    with blocks_apart():
        result = WORK[what](folder)
    took, cpu = time.perf_counter() - began, time.process_time() - spent
    stays, peak = _status("VmRSS") - before, _status("VmHWM") - before
    del result
    return {"seconds": took, "cpu": cpu, "stays": stays, "peak": peak}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def work_apart(what: str, folder: Path) -> dict[str, float]:
    """`work_here` in a process of its own."""
    command = [sys.executable, __file__, CHILD, what, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout))


def measure(name: str, folder: Path, rounds: int, *, dry: bool) -> dict[str, Any]:
    """Write one checkpoint; plain reads, reads and loads in turns, from the disk and from the page cache."""
    files = write(folder, config(name, dry=dry))
    total = sum(path.stat().st_size for path in files)
    print(f"{name}: {total / 1e9:.2f} GB in {len(files)} files; to reach: {GOAL:.0%} of a plain read, weights + 1 GiB")
    result: dict[str, Any] = {"bytes": total, "files": len(files)}
    for where in ("disk", "page cache"):
        samples: dict[str, list[dict[str, float]]] = {"plain": [], **{what: [] for what in WORK}}
        for _, what in itertools.product(range(rounds), samples):
            if where == "disk":
                forget(files)
            samples[what].append(plain_read(files) if what == "plain" else work_apart(what, folder))
        result[where] = samples
        for what in WORK:
            print(f"  {where}, {what}: {told(total, samples['plain'], samples[what])}")
    return result


def told(total: int, plain: list[dict[str, float]], found: list[dict[str, float]]) -> str:
    """One line: the ceiling, the median, the share, CPU, memory."""
    ceiling, rate = (total / statistics.median(run["seconds"] for run in runs) for runs in (plain, found))
    cpu = statistics.median(run["cpu"] for run in found) / total * 1e9
    extra, peak = max(run["peak"] - run["stays"] for run in found), max(run["peak"] for run in found)
    return (
        f"plain read {ceiling / 1e6:,.0f} MB/s, {rate / 1e6:,.0f} MB/s, {rate / ceiling:.0%}; {cpu:.2f} CPU seconds a "
        f"GB; memory {peak / 2**30:.2f} GiB at most, {extra / 2**20:,.0f} MiB more than stays"
    )


def main() -> None:
    """Measure, print, save."""
    if sys.argv[1:2] == [CHILD]:
        print(json.dumps(work_here(sys.argv[2], Path(sys.argv[3]))))
        return
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--tiny", action="store_true", help="a few MB, to try the bench")
    options.add_argument("--folder", help="where the checkpoints are written for the time being")
    options.add_argument("--save", default=str(Path(__file__).parent / "results"))
    chosen = options.parse_args()
    result = {"what": "load", **machine.facts(), "goal": GOAL, "threads": THREADS, "hash": hash_rate()}
    print(f"SHA-256 on all cores: {result['hash'] / 1e6:,.0f} MB/s; {THREADS} threads read")
    for name in CASES:
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            result[name] = measure(name, Path(folder), chosen.rounds, dry=chosen.tiny)
    print(machine.save(result, Path(chosen.save)))


if __name__ == "__main__":
    main()

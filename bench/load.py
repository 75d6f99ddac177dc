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
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from threading import Lock, Thread
from typing import Any, NamedTuple
from unittest import mock

from fwd.cli.bench import machine
from fwd.models import reader
from fwd.models.reader import LEAF, THREADS
from fwd.models.safetensors import BITS, INDEX

GOAL = 0.9  # of the plain read
SHARD = 1 << 30  # bytes, about
BLOCK = 64 << 20  # random bytes that are written again and again
SEED = 20261126
CHILD = "--child"
BYTES_OF = {"F8_E4M3": 0x77, "F32": 0x3F, "BF16": 0x3F}  # and-masks: no NaN, nothing infinite
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")

Tensor = tuple[str, tuple[int, ...]]  # dtype, shape


class Shapes(NamedTuple):
    """Sizes of a model of the dense family."""

    layers: int
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 32768


def config(shapes: Shapes, **more: Any) -> dict[str, Any]:
    """Its config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": shapes.layers,
        "hidden_size": shapes.hidden,
        "intermediate_size": shapes.intermediate,
        "num_attention_heads": shapes.heads,
        "num_key_value_heads": shapes.kv_heads,
        "head_dim": shapes.hidden // shapes.heads,
        "vocab_size": shapes.vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **more,
    }


def matrices(shapes: Shapes) -> Iterator[tuple[str, int, int]]:
    """Each linear layer of the blocks: module, outputs, inputs."""
    hidden, kv = shapes.hidden, shapes.hidden // shapes.heads * shapes.kv_heads
    for layer in range(shapes.layers):
        at = f"model.layers.{layer}."
        yield from (
            (f"{at}self_attn.{name}_proj", rows, hidden)
            for name, rows in zip("qkvo", (hidden, kv, kv, hidden), strict=True)
        )
        yield from ((f"{at}mlp.{name}_proj", shapes.intermediate, hidden) for name in ("gate", "up"))
        yield f"{at}mlp.down_proj", hidden, shapes.intermediate


def plain_parts(shapes: Shapes) -> dict[str, Tensor]:
    """What no checkpoint quantises: norms, embedding, head."""
    names = [f"model.layers.{layer}.{name}" for layer in range(shapes.layers) for name in NORMS]
    tables = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), ("BF16", (shapes.vocab, shapes.hidden)))
    return dict.fromkeys([*names, "model.norm.weight"], ("BF16", (shapes.hidden,))) | tables


def dense(shapes: Shapes) -> dict[str, Tensor]:
    """All tensors in bfloat16."""
    linear = {f"{module}.weight": ("BF16", (rows, columns)) for module, rows, columns in matrices(shapes)}
    return plain_parts(shapes) | linear


def nvfp4(shapes: Shapes) -> dict[str, Tensor]:
    """ModelOpt's layout: two numbers a byte, a scale for 16 of them, one for all."""
    found = plain_parts(shapes)
    for module, rows, columns in matrices(shapes):
        found[f"{module}.weight"] = ("U8", (rows, columns // 2))
        found[f"{module}.weight_scale"] = ("F8_E4M3", (rows, columns // 16))
        found[f"{module}.weight_scale_2"] = ("F32", ())
    return found


MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
CASES: dict[str, tuple[Callable[[Shapes], dict[str, Tensor]], dict[str, Any], Shapes, Shapes]] = {
    "8B-like bf16": (dense, {}, Shapes(6), Shapes(1, 256, 512, 4, 2, 512)),
    "8B-like nvfp4": (nvfp4, {"quantization_config": MODELOPT}, Shapes(20), Shapes(1, 256, 512, 4, 2, 512)),
}


def size(tensor: Tensor) -> int:
    """Its bytes."""
    return prod(tensor[1]) * BITS[tensor[0]] // 8


def write(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> list[Path]:
    """Write the folder in shards of about `SHARD` bytes, in the order of names as writers do; return the files."""
    (folder / "config.json").write_text(json.dumps(settings))
    noise = random.Random(SEED).randbytes(BLOCK)
    shards = list(_shards(tensors))
    places = {}
    for number, names in enumerate(shards, 1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(path, {name: tensors[name] for name in names}, noise)
        places |= dict.fromkeys(names, path.name)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return sorted(folder.glob("*.safetensors"))


def _shards(tensors: dict[str, Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    for name in sorted(tensors):
        names.append(name)
        if sum(size(tensors[each]) for each in names) >= SHARD:
            yield names
            names = []
    if names:
        yield names


def _write_shard(path: Path, tensors: dict[str, Tensor], noise: bytes) -> None:
    ends = [0, *itertools.accumulate(map(size, tensors.values()))]
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        for (name, (dtype, shape)), begin, end in zip(tensors.items(), ends, ends[1:], strict=False)
    }
    body = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(body).to_bytes(8, "little") + body)
        for tensor in tensors.values():
            _write_tensor(file.write, tensor, noise)
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(put: Callable[[bytes], object], tensor: Tensor, noise: bytes) -> None:
    left, mask = size(tensor), BYTES_OF.get(tensor[0])
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
    from fwd.models.checkpoint import Checkpoint  # noqa: PLC0415  # torch: the child only

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
    from fwd.models.load import load  # noqa: PLC0415

    return load(folder, device="cpu", context=1024)


WORK: dict[str, Callable[[Path], Any]] = {"read": read_all, "read unhashed": read_unhashed, "load": load_model}


def work_here(what: str, folder: Path) -> dict[str, float]:
    """Do one of `WORK` in this process: seconds, CPU seconds, memory that is resident after it and at most."""
    import torch  # noqa: PLC0415

    from fwd.engine.memory import blocks_apart  # noqa: PLC0415

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


def measure(name: str, folder: Path, rounds: int, *, tiny: bool) -> dict[str, Any]:
    """Write one checkpoint; plain reads, reads and loads in turns, from the disk and from the page cache."""
    layout, more, full, small = CASES[name]
    shapes = small if tiny else full
    files = write(folder, layout(shapes), config(shapes, **more))
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
            result[name] = measure(name, Path(folder), chosen.rounds, tiny=chosen.tiny)
    print(machine.save(result, Path(chosen.save)))


if __name__ == "__main__":
    main()

"""From a `Load` to a running loop: device, weights, KV pool."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fwd import __version__
from fwd.engine.loop import Loop
from fwd.engine.pages import PagedSpace
from fwd.engine.runner import ModelRunner
from fwd.errors import ConfigError
from fwd.models.load import load as load_model
from fwd.models.load import run_spec
from fwd.models.spec import ModelSpec, read_spec
from fwd.protocol.frames import Channel
from fwd.protocol.messages import EngineInfo, Load, ToEngine

CHUNK = 64
PAGE_SIZE = 16
SMALL_MODEL = 64 << 20


def start(
    load: Load, channel: Channel[ToEngine], progress: Callable[[int, int], None], started: float
) -> tuple[Loop, EngineInfo]:
    """Load the model and build the loop; raises `ModelError` or `ConfigError`. `started` is a monotonic time."""
    folder = Path(load.model)
    spec = run_spec(read_spec(folder), load.dtype)
    if load.kv_dtype not in {"auto", spec.dtype}:
        raise ConfigError(f"kv-dtype: this build keeps the KV cache in the model's {spec.dtype} only")
    context = _context(load, spec)
    pages = _pages(load, context, spec.kv_bytes_per_token())
    threads = load.threads or _threads(spec)
    torch.set_num_threads(threads)
    model = load_model(folder, device=load.device, dtype=load.dtype, context=context, progress=progress)
    runner = ModelRunner(model, pages=pages, page_size=PAGE_SIZE, max_seqs=load.max_seqs, chunk=CHUNK)
    loop = Loop(channel, runner, PagedSpace(pages, PAGE_SIZE), max_seqs=load.max_seqs, chunk=CHUNK)
    info = EngineInfo(
        architecture=spec.architecture,
        parameters=spec.weight_bytes() // model.dtype.itemsize,
        weight_bytes=spec.weight_bytes(),
        weights_hash=model.weights_hash,
        vocab_size=spec.vocab,
        context=context,
        device="cpu",
        dtype=spec.dtype,
        kernel_set=model.ops.name,
        build=f"fwd {__version__}, torch {torch.__version__}",
        chunk=CHUNK,
        page_size=PAGE_SIZE,
        pages=pages,
        kv_bytes=pages * PAGE_SIZE * spec.kv_bytes_per_token(),
        max_seqs=load.max_seqs,
        threads=threads,
        load_ms=(time.monotonic() - started) * 1e3,
        pid=os.getpid(),
    )
    return loop, info


def _context(load: Load, spec: ModelSpec) -> int:
    """The context asked for, or as much of the model's own as the KV pool holds."""
    if load.context > spec.max_context:
        raise ConfigError(f"context: {load.context} is more than the {spec.max_context} tokens of the model")
    fits = load.kv_bytes // spec.kv_bytes_per_token() // PAGE_SIZE * PAGE_SIZE
    context = load.context or min(spec.max_context, fits)
    if not 0 < context <= fits:
        wanted = max(context, PAGE_SIZE)
        needed = -(-wanted // PAGE_SIZE) * PAGE_SIZE * spec.kv_bytes_per_token()
        raise ConfigError(f"kv_bytes: {load.kv_bytes} hold {fits} tokens; raise it to {needed} for {wanted} tokens")
    return context


def _pages(load: Load, context: int, bytes_per_token: int) -> int:
    """Pages of the KV pool: what `kv_bytes` allows and the sequences can use, one whole context at least."""
    most = load.kv_bytes // bytes_per_token // PAGE_SIZE
    return min(most, load.max_seqs * -(-context // PAGE_SIZE))


def _threads(spec: ModelSpec) -> int:
    """One thread where a step is over before a second has woken up, else one a core. Part of what fixes the bits."""
    return 1 if spec.weight_bytes() <= SMALL_MODEL else os.cpu_count() or 1

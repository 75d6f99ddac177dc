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
from fwd.models.spec import ModelSpec, read_spec
from fwd.protocol.frames import Channel
from fwd.protocol.messages import EngineInfo, Load, ToEngine

CHUNK = 64
PAGE_SIZE = 16


def start(
    load: Load, channel: Channel[ToEngine], progress: Callable[[int, int], None], started: float
) -> tuple[Loop, EngineInfo]:
    """Load the model and build the loop; raises `ModelError` or `ConfigError`. `started` is a monotonic time."""
    folder = Path(load.model)
    context = _context(load, read_spec(folder))
    threads = load.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    model = load_model(folder, device=load.device, dtype=load.dtype, context=context, progress=progress)
    spec = model.spec
    if load.kv_dtype not in {"auto", spec.dtype}:
        raise ConfigError(f"kv-dtype: this build keeps the KV cache in the model's {spec.dtype} only")
    pages = _pages(load, context, spec.kv_bytes_per_token())
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
    if load.context > spec.max_context:
        raise ConfigError(f"context: {load.context} is more than the {spec.max_context} tokens of the model")
    return load.context or spec.max_context


def _pages(load: Load, context: int, bytes_per_token: int) -> int:
    """Pages of the KV pool: one whole context at least, else what `kv_bytes` and the sequences can use."""
    tokens = max(context, min(load.max_seqs * context, load.kv_bytes // bytes_per_token))
    return -(-tokens // PAGE_SIZE)

"""The ceiling: memory bandwidth as a big copy finds it, and the bytes a decode step must read."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

COPY_BYTES = 256 << 20
COPIES = 8
RunDtype = Literal["float32", "bfloat16"]


def bandwidth() -> dict[str, Any]:
    """GB/s of the best of some copies between two buffers that no cache holds, read and written bytes counted."""
    import torch  # noqa: PLC0415  # seconds

    source, target = torch.ones(COPY_BYTES // 4), torch.empty(COPY_BYTES // 4)
    best = min(_seconds(lambda: target.copy_(source)) for _ in range(COPIES))
    how = (
        f"the best of {COPIES} copies of {COPY_BYTES >> 20} MiB by {torch.get_num_threads()} threads, "
        "read + written; weights that fit the last cache can be read faster"
    )
    return {"gb_per_s": 2 * COPY_BYTES / best / 1e9, "how": how}


def step_bytes(folder: Path, dtype: RunDtype, context: int) -> int:
    """Bytes one step of one sequence must read: every weight it uses, and the KV cache of `context` tokens."""
    from fwd.models.config import read_spec  # noqa: PLC0415  # the engine half, only where it is needed

    return replace(read_spec(folder), dtype=dtype).step_bytes(1, context, dtype)


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started

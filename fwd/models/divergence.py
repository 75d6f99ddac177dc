"""What it costs a model that some of its weights become FP8: how far its distributions move, on the start of a text."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fwd.errors import ConfigError
from fwd.kernels.rows import Cells, Rows
from fwd.kernels.sizes import MAX_ROWS
from fwd.models.layout import groups
from fwd.models.load import load
from fwd.models.model import Model

WINDOW, PAGE = 512, 16  # tokens
MEMORY = 1 << 30  # bytes of distributions that are kept at most, but for one window's


def divergence(
    folder: Path, ids: Sequence[int], *, device: str, dtype: str, requant: Sequence[str], head: Sequence[int] = ()
) -> tuple[float, int]:
    """Return the mean of KL(as it is ‖ requantised) in nats a token, exactly, and after how many tokens it was taken.

    Windows of the text, none longer than the model's context, are read one by one, each behind nothing but `head`, what
    a text begins with. The two models are loaded one after the other.
    """
    plain = load(folder, device=device, dtype=dtype, context=WINDOW)
    room = max(1, min(WINDOW, plain.spec.max_context) - len(head))
    count = room * max(1, MEMORY // (4 * WINDOW * plain.spec.vocab))
    starts = range(0, min(len(ids), count), room)
    windows = [torch.tensor([*head, *ids[start : start + room]]) for start in starts]
    before = [_logprobs(plain, window).cpu() for window in windows]
    if not all(bool(found.isfinite().all()) for found in before):
        raise ConfigError("requant: the model as it is has distributions that are not finite on this text")
    del plain
    other = load(folder, device=device, dtype=dtype, context=WINDOW, requant=requant)
    total = sum(
        float((found.exp() * (found - _logprobs(other, window).cpu())).sum(dtype=torch.float64))
        for window, found in zip(windows, before, strict=True)
    )
    tokens = sum(map(len, windows))
    return total / tokens, tokens


@torch.inference_mode()
def _logprobs(model: Model, ids: Tensor) -> Tensor:
    """The distribution after each token of a window, in one chunk: float32 [tokens, vocab]."""
    device, kinds = model.ops.device, groups(model.spec.cache)
    cache = model.new_cache([WINDOW // PAGE] * len(kinds), PAGE, model.spec.dtype)  # type: ignore[arg-type]
    positions = torch.arange(WINDOW, device=device)
    live = positions < len(ids)
    tables = torch.arange(WINDOW // PAGE, dtype=torch.int32, device=device)[None]
    rows = Rows(
        positions,
        torch.where(live, 0, -1),
        torch.full_like(positions, -1),
        (Cells(torch.where(live, positions, -1), tables),) * len(kinds),
        chunk=0,
    )
    padded = torch.nn.functional.pad(ids, (0, WINDOW - len(ids))).to(device)
    hidden = model.forward(padded, rows, cache)
    parts = [model.logits(hidden[start : start + MAX_ROWS]) for start in range(0, len(ids), MAX_ROWS)]
    return torch.cat(parts)[: len(ids)].log_softmax(dim=-1)

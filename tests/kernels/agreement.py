"""How far two results are apart, in one number, and whether they are the same bits."""

import torch
from torch import Tensor


def difference(x: Tensor, y: Tensor) -> float:
    """Return 1 − 2Σxy/(Σx²+Σy²) in float64: 0 for equal tensors, ½ for x = 0, ∞ where either holds NaN or infinity."""
    assert x.shape == y.shape, f"{tuple(x.shape)} against {tuple(y.shape)}"
    x, y = x.detach().double().cpu(), y.detach().double().cpu()
    if not (x.isfinite().all() and y.isfinite().all()):
        return float("inf")
    total = (x * x + y * y).sum().item()
    return 1 - 2 * (x * y).sum().item() / total if total else 0.0


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN included."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(_bytes(x), _bytes(y))


def _bytes(x: Tensor) -> Tensor:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8)

"""Plain weights made FP8 when they are loaded: e4m3 with a scale a row, each the nearest number there is."""

import torch

from fwd.kernels.qtensor import QTensor

LARGEST = 448.0  # of e4m3
_ROWS = 1024  # that are made at a time


def to_fp8(weight: QTensor) -> QTensor:
    """Return a plain matrix [out, in] as fp8, block (1, in): scale = max|row| / 448, 1 where that is 0."""
    outputs, inputs = weight.shape
    data = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.data.device)
    scales = torch.empty(outputs, 1, dtype=torch.float32, device=weight.data.device)
    for start in range(0, outputs, _ROWS):
        rows = weight.data[start : start + _ROWS].float()
        scale = rows.abs().amax(dim=1, keepdim=True) / LARGEST
        scale = torch.where(scale == 0, 1.0, scale)
        scales[start : start + _ROWS] = scale
        data[start : start + _ROWS] = (rows / scale).clamp(-LARGEST, LARGEST).to(data.dtype)
    return QTensor(data, "fp8", weight.shape, block=(1, inputs), scales=scales)

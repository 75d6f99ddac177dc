"""The lines of a device: what it keeps of each running sequence from step to step, and what a step tells it of a row.

The history that penalties are about is counted by the device itself, so it is sent once, when a sequence gets its line.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fwd.engine.request import Request
from fwd.engine.sampler import draw, mask_of
from fwd.engine.scheduler import Span
from fwd.engine.step import CPU, Step, staging
from fwd.kernels.drawing import BIASED, FIELDS, PENALTIES, Drawing, fill_row, kinds_of, line_bias, line_counts
from fwd.kernels.ops import Draw, Mask
from fwd.kernels.sizes import MAX_ROWS, mask_words


@dataclass(slots=True)
class _Line:
    """Whose it is, and what of it the device knows: its history, and how many ids its bias bans (−1: no bias yet)."""

    request: Request | None = None
    counted: bool = False
    banned: int = -1


class Lines:
    """`count` lines with counts int32 and bias float32 [lines, vocab] on the device; a sequence keeps its line.

    Beside them are the masks of the rows of one step: who has any is not run ahead, so the next step finds them read.
    """

    def __init__(self, count: int, vocab: int, device: torch.device) -> None:
        self._lines = [_Line() for _ in range(count)]
        self._requests: list[Request] = []  # of the latest step
        self._given: list[int] = []  # and their lines
        self._counts = _Rewritten(count, vocab, torch.int32, device)
        self._bias = _Rewritten(count, vocab, torch.float32, device)
        self._masks = _Masks(vocab, device)

    def assign(self, spans: Sequence[Span]) -> list[int]:
        """The line of each span's request; those of requests that have none are given away."""
        requests = [span.request for span in spans]
        if requests != self._requests:
            known = dict(zip(map(id, self._requests), self._given, strict=True))
            kept = {known.get(id(request), -1) for request in requests}
            free = [line for line in range(len(self._lines)) if line not in kept]
            self._given = [known[id(each)] if id(each) in known else free.pop() for each in requests]
            self._requests = requests
        return self._given

    def drawing(self, step: Step) -> Drawing:
        """What the sampler is told of the rows of a step, whose block holds `FIELDS`."""
        rows = {name: step.block.tensors[name] for name in FIELDS}
        return Drawing(**rows, counts=self._counts.tensor, bias=self._bias.tensor, masks=self._masks.tensor)

    def owns(self, line: int, request: Request) -> bool:
        """Whether the device knows of the request what it was told last."""
        return self._lines[line].request is request

    def fill(self, step: Step, row: int, line: int, request: Request, place: int) -> bool:
        """Have the row draw what comes at `place`; True if nothing but its place changes from now on."""
        if self._lines[line].request is not request:
            self._lines[line] = _Line(request)
        known = self._lines[line]
        wanted = draw(request, place, history=not known.counted, mask=mask_of(request, place))
        kinds = kinds_of(wanted)
        if kinds & PENALTIES and not known.counted:
            self._counts.rewrite(line, *line_counts(wanted))
            known.counted = True
        if kinds & BIASED:
            self._rebias(line, known, wanted)
        fill_row(step.block.arrays, row, wanted, kinds)
        return not wanted.banned

    def constrain(self, row: int, mask: Mask) -> None:
        """Have the row of what is launched next draw no other id."""
        self._masks.write(row, mask)

    def upload(self) -> None:
        """Bring the masks to the device."""
        self._masks.upload()

    def _rebias(self, line: int, known: _Line, wanted: Draw) -> None:
        """Tell the device the bias of a line: at first, and once more when its answer is long enough to end."""
        if known.banned != len(wanted.banned):
            self._bias.rewrite(line, *line_bias(wanted))
            known.banned = len(wanted.banned)


class _Masks:
    """int32 [rows, ⌈vocab/32⌉] on the device: those of the rows up to the last that has one are brought there."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self._host = staging(MAX_ROWS * mask_words(vocab), torch.int32, device).view(MAX_ROWS, -1)
        self.tensor = self._host if device == CPU else self._host.to(device)
        self._rows = self._host.numpy().view(np.uint32)
        self._end = 0

    def write(self, row: int, mask: Mask) -> None:
        self._rows[row] = mask
        self._end = max(self._end, row + 1)

    def upload(self) -> None:
        if self._end and self.tensor is not self._host:
            self.tensor[: self._end].copy_(self._host[: self._end], non_blocking=True)
        self._end = 0


class _Rewritten:
    """A tensor [lines, vocab] on the device, of which the host rewrites whole lines."""

    def __init__(self, lines: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros((lines, vocab), dtype=dtype, device=device)
        self._host = staging(vocab, dtype, device)
        self._sent = torch.cuda.Event() if device != CPU else None  # type: ignore[no-untyped-call]

    def rewrite(self, line: int, ids: NDArray[np.int64], values: NDArray[np.generic]) -> None:
        """Have zeros but for `values` at `ids` in the line of what is launched next.

        It waits until the line that was sent before is fetched, which is so unless several sequences come at once.
        """
        if self._sent:
            self._sent.synchronize()
        self._host.zero_().numpy()[ids] = values
        self.tensor[line].copy_(self._host, non_blocking=True)
        if self._sent:
            self._sent.record()

"""Executes scheduled work with the kernels of a device: steps in a ring, each launched whole, read when it is done."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from fwd.engine.graphs import Eager, Graphs
from fwd.engine.lines import Lines
from fwd.engine.pages import Copy
from fwd.engine.plan import Plan
from fwd.engine.request import Prefilled
from fwd.engine.ring import Slot
from fwd.engine.runner import Committed, Follower, Prefiller, features_of, new_taps
from fwd.engine.scheduler import BUCKETS, Chunk, Span
from fwd.engine.step import CPU, new_tables
from fwd.engine.workspaces import RING
from fwd.errors import EngineError
from fwd.kernels.device import DeviceOps
from fwd.kernels.ops import Draw
from fwd.kernels.sizes import MAX_ROWS
from fwd.models.model import Model


class DeviceRunner(Prefiller):
    """Launches a step before the one before it is read: its ids are read where that one leaves them.

    Raises `EngineError` from any call once something has gone wrong on the device, which is heard of late; while it is
    made, what torch raises.
    """

    ahead = True

    def __init__(self, model: Model, ops: DeviceOps, plan: Plan) -> None:
        self._ops = ops
        self.deferred = ops.device != CPU
        if ops.device != CPU:
            _leave_default_stream()
        super().__init__(model, plan)
        tables = new_tables(plan, plan.max_seqs, ops.device)
        lines = Lines(plan.max_seqs, plan.spec.vocab, ops.device)
        self._slots = [Slot(plan, tables, lines, ops.device) for _ in range(RING)]
        self._taps = [new_taps(model, plan, MAX_ROWS) for _ in range(RING)]
        self._launched = self._collected = 0
        self._steps = self._prepared()

    def follow(self, follower: Follower) -> None:  # noqa: D102
        super().follow(follower)
        if self._ops.device != CPU:
            follower.rehearse(self._prefill.first_row()[1], features_of(self._chunk_taps))

    def copy(self, copies: Sequence[Copy]) -> None:  # noqa: D102
        with device_errors():
            super().copy(copies)

    def prefill(self, chunk: Chunk) -> Prefilled:  # noqa: D102
        with device_errors():
            return super().prefill(chunk)

    def launch(self, spans: Sequence[Span]) -> None:
        """Launch one decode step."""
        assert self._launched < self._collected + RING, "the ring is full"
        self._launched += 1
        place = self._launched % RING
        with device_errors():
            self._tell(spans)
            size = self._slots[place].fill(spans, self._launched)
            self._steps.launch(place, size)
            self._slots[place].launched()

    def collect(self) -> Committed:
        """Wait for the oldest step that is not collected: what it commits."""
        assert self._collected < self._launched, "nothing is in flight"
        self._collected += 1
        place = self._collected % RING
        with device_errors():
            return self._told(self._slots[place].collect(self._collected), self._taps[place])

    @torch.inference_mode()
    def _run(self, place: int, size: int) -> None:
        """Launch every kernel of a step: nothing here depends on what is in the buffers."""
        slot = self._slots[place]
        ids, rows = slot.ids[size], slot.rows[size]
        logits = self._model.logits(self._model.forward(ids, rows, self._cache, self._taps[place]))
        self._ops.draw(logits, ids, rows, slot.drawing, slot.outcome, step=slot.number)

    @torch.inference_mode()
    def _try_chunk(self) -> None:
        """Have libraries choose their products and take what these need, before a request does."""
        ids, rows = self._prefill.first_row()
        hidden = self._model.forward(ids, rows, self._cache, self._chunk_taps)
        self._draw(hidden[:1], [Draw()])

    def _prepared(self) -> Eager | Graphs:
        """The steps, once each kernel has run: those of a step on padding, on a GPU those of a chunk on one row."""
        if self._ops.device != CPU:
            self._try_chunk()
            return Graphs(self._run, [(place, size) for place in range(RING) for size in BUCKETS])
        self._run(0, 1)
        return Eager(self._run)


def _leave_default_stream() -> None:
    """Nothing is captured on it. What was loaded is there before anything is launched, what that took is given back."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def device_errors() -> Iterator[None]:
    """What torch says of the device ends the engine, in one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise EngineError(f"the device failed: {reason}; a new engine is started") from error

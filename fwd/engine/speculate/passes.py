"""Passes of a draft model on the target's device, over buffers that are allocated once; on a GPU captured as graphs.

What the rows of a pass came to and the ids that they drew stay there, and the next pass takes them up.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from fwd.engine.graphs import Eager, Graphs
from fwd.engine.pages import Copy
from fwd.engine.plan import Plan
from fwd.engine.request import Request
from fwd.engine.sampler import draw, penalized
from fwd.engine.scheduler import BUCKETS
from fwd.engine.speculate.items import INPUTS, KEPT, KINDS, MINUS, Kind, passes_of
from fwd.engine.step import CPU, Block, Table, bucket
from fwd.kernels.device import DeviceOps
from fwd.kernels.drawing import DRAWN, FIELDS, fill_row, kinds_of, new_drawing, new_outcome
from fwd.kernels.ops import Draw
from fwd.kernels.rows import Cells, Rows
from fwd.kernels.sizes import MAX_ROWS
from fwd.models.draft.model import DraftModel
from fwd.models.layout import groups


class Row(NamedTuple):
    """What one row computes: an id of a request, which has a line here, for the cell of a position."""

    line: int
    request: Request
    position: int
    id: int
    end: int = 0  # the last position of its block


class Passes:
    """Runs a draft model for up to `plan.max_seqs` sequences, each of which has a line of its own.

    absorb: rows write their KV. begin: so do rows, of which the last of each line then draws. go_on: a line has one
    row, for the id that it drew in the pass before. block: all rows of a block but its anchor draw.
    """

    def __init__(self, model: DraftModel, plan: Plan) -> None:
        device, spec = model.ops.device, model.spec
        self._model, self._page_size, self._groups = model, plan.page_size, len(groups(spec.cache))
        self._cache = model.new_cache(plan.units[0], plan.page_size, plan.kv)
        self._table = Table(plan.max_seqs, -(-plan.context // plan.page_size), device)
        self._block = Block({**dict.fromkeys(INPUTS, torch.int64), **FIELDS}, MAX_ROWS, device)
        self._sent = torch.cuda.Event() if device != CPU else None  # type: ignore[no-untyped-call]
        self._features = torch.zeros(plan.max_seqs * KEPT, spec.features, dtype=model.dtype, device=device)
        self._hidden = torch.zeros(MAX_ROWS, spec.hidden, dtype=model.dtype, device=device)
        self._ids = torch.zeros(MAX_ROWS, dtype=torch.int64, device=device)
        self._drawn = torch.zeros(MAX_ROWS, MAX_ROWS, dtype=torch.int64, device=device)  # [passes, lines]
        self._chunk_ids = torch.zeros(plan.chunk, dtype=torch.int64, device=device)
        self._sampler = _Sampler(model.ops, self._block, plan.spec.vocab) if isinstance(model.ops, DeviceOps) else None
        self._block.arrays["parents"].fill(-1)
        self._pad(0)
        self._block.upload()
        self._steps = self._prepared()

    def copy(self, copies: Iterable[Copy]) -> None:
        """Copy pages as the target's first group does, of which ours are the same."""
        pages = [(source, target) for group, source, target in copies if group == 0]
        self._cache.copy((group, *page) for page in pages for group in range(self._groups))

    @torch.inference_mode()
    def chunk(self, ids: Sequence[int], rows: Rows, features: Tensor | None) -> None:
        """Absorb the `rows` of a chunk of the target: `ids` [C], `features` [C, …] where there are taps."""
        self._chunk_ids.copy_(torch.tensor(ids))
        hidden = None if features is None else self._model.fuse(features)
        ours = replace(rows, cells=rows.cells[:1] * self._groups, records=None)
        self._model.absorb(self._chunk_ids, hidden, ours, self._cache)

    def keep(self, line: int, position: int, features: Tensor) -> None:
        """Keep the features [rows, …] of a line's positions from `position` on, to be absorbed."""
        first = position % KEPT
        head = min(len(features), KEPT - first)
        for place, part in ((first, features[:head]), (0, features[head:])):
            if len(part):
                begin = line * KEPT + place
                self._features[begin : begin + len(part)].copy_(part)

    def absorb(self, rows: Sequence[Row]) -> None:
        """Write the KV of any number of rows, in order."""
        for first in range(0, len(rows), MAX_ROWS):
            self._run("absorb", rows[first : first + MAX_ROWS])

    def chains(self, rows: Sequence[Row], counts: Sequence[int]) -> list[list[int]]:
        """Draw `counts[i]` ids for the i-th line of the rows, the most first; a line's rows stand together.

        The last of them is that from which the first id is drawn.
        """
        lasts = [place for place, row in enumerate(rows) if row.line not in {each.line for each in rows[place + 1 :]}]
        lines = [rows[place] for place in lasts]
        for number in range(counts[0]):
            drawing = lines[: sum(count > number for count in counts)]
            wanted = self._draws(drawing, number)
            if number == 0:
                self._run("begin", rows, wanted, lasts)
            else:
                self._run("go_on", [row._replace(position=row.position + number) for row in drawing], wanted)
            self._drawn[number, : len(drawing)].copy_(self._ids[: len(drawing)])
        found: list[list[int]] = self._drawn.t().tolist()
        return [ids[:count] for ids, count in zip(found, counts, strict=False)]

    def blocks(self, rows: Sequence[Row]) -> list[list[int]]:
        """Draw the ids of the masks of each line's block, the first row of which is its anchor."""
        self._run("block", rows, self._draws(rows))
        ids: list[int] = self._ids[: len(rows)].tolist()
        found = groupby(zip(rows, ids, strict=True), key=lambda each: each[0].line)
        return [[drawn for _, drawn in block][1:] for _, block in found]

    def _draws(self, rows: Sequence[Row], number: int = -1) -> list[Draw | None]:
        """How rows draw: as the target will, by the ids before; those of a block know none beside the committed ones.

        Where rows have drawn `number` times, what they drew is fetched only if penalties want it.
        """
        if number < 0:
            return [_draft(row.request, row.position - row.request.length) for row in rows]
        if not any(penalized(row.request) for row in rows):
            return [_draft(row.request, number) for row in rows]
        known: list[list[int]] = self._drawn[:number].t().tolist()
        return [_draft(row.request, number, ids) for row, ids in zip(rows, known, strict=False)]

    @torch.inference_mode()
    def _run(
        self, kind: Kind, rows: Sequence[Row], draws: Sequence[Draw | None] = (), lasts: Sequence[int] = ()
    ) -> None:
        if self._sent:
            self._sent.synchronize()  # what was filled in before is fetched once the pass before it is done
        size, there = bucket(len(rows), self._model.ops.row_block), self._told(draws)
        for place, row in enumerate(rows):
            self._fill(place, row)
        self._pad(len(rows))
        self._block.arrays["lasts"][: len(lasts)] = lasts
        self._block.upload()
        if self._sent:
            self._sent.record()
        self._steps.launch(KINDS.index(kind), size)
        if not there:
            self._sample(size, draws)

    def _fill(self, place: int, row: Row) -> None:
        arrays, table = self._block.arrays, row.request.tables[0]
        page, offset = divmod(row.position, self._page_size)
        self._table.write(row.line, table)
        values = (row.id, row.position, row.line, table.pages[page] * self._page_size + offset, row.end)
        for name, value in zip(("ids", "positions", "sequences", "slots", "ends"), values, strict=True):
            arrays[name][place] = value
        arrays["sources"][place] = row.line * KEPT + row.position % KEPT

    def _pad(self, count: int) -> None:
        for name in INPUTS:
            self._block.arrays[name][0 if name == "lasts" else count :] = -1 if name in MINUS else 0

    def _told(self, draws: Sequence[Draw | None]) -> bool:
        """Tell the sampler of a pass what is drawn; False where it must be drawn after it."""
        kinds = [kinds_of(wanted) if wanted else 0 for wanted in draws]
        if self._sampler is None or any(kind & ~DRAWN for kind in kinds):
            return not draws
        self._block.arrays["kinds"].fill(0)
        for place, wanted in enumerate(draws):
            if wanted:
                fill_row(self._block.arrays, place, wanted, DRAWN)
        return True

    def _sample(self, size: int, draws: Sequence[Draw | None]) -> None:
        wanted = {place: each for place, each in enumerate(draws) if each}
        logits = self._model.logits(self._hidden[:size])[list(wanted)]
        ids = self._model.ops.sample(logits, list(wanted.values())).ids
        self._ids[list(wanted)] = ids.to(self._ids.device)

    @torch.inference_mode()
    def _pass(self, kind: int, size: int) -> None:
        """Launch every kernel of a pass: nothing here depends on what is in the buffers."""
        rows = self._rows(size)
        hidden = self._hidden_of(KINDS[kind], rows, size)
        if hidden is None:
            return
        self._hidden[:size].copy_(hidden)
        if self._sampler:
            self._ids[:size].copy_(self._sampler.draw(self._model.logits(self._hidden[:size]), rows))

    def _hidden_of(self, kind: Kind, rows: Rows, size: int) -> Tensor | None:
        inputs, taps = self._block.tensors, bool(self._model.spec.taps)
        ids, model, cache = inputs["ids"][:size], self._model, self._cache
        match kind:
            case "go_on":
                return model.forward(self._ids[:size], self._hidden[:size] if taps else None, rows, cache)
            case "block":
                return model.draft(ids, inputs["ends"][:size], rows, cache)
        fused = model.fuse(self._features.index_select(0, inputs["sources"][:size])) if taps else None
        if kind == "absorb":
            model.absorb(ids, fused, rows, cache)
            return None
        return model.forward(ids, fused, rows, cache).index_select(0, inputs["lasts"][:size])

    def _rows(self, size: int) -> Rows:
        """New ones each time: the reference keeps what it found out about those that it has met."""
        of = {name: self._block.tensors[name][:size] for name in ("positions", "sequences", "parents", "slots")}
        cells = (Cells(of["slots"], self._table.tensor),) * self._groups
        return Rows(of["positions"], of["sequences"], of["parents"], cells)

    def _prepared(self) -> Eager | Graphs:
        if self._model.ops.device == CPU:
            return Eager(self._pass)
        kinds = [KINDS.index(kind) for kind in passes_of(self._model.spec)]
        return Graphs(self._pass, [(kind, size) for kind in kinds for size in BUCKETS])


class _Sampler:
    """Draws in a pass as a step of the target does, but commits nothing."""

    def __init__(self, ops: DeviceOps, block: Block, vocab: int) -> None:
        self._ops, self._ids = ops, block.tensors["ids"]
        fields = {name: block.tensors[name] for name in FIELDS}
        self._drawing = replace(new_drawing(ops.device, 0, 0, vocab), **fields)
        self._outcome = new_outcome(MAX_ROWS, 0, ops.device)
        self._step = torch.zeros(1, dtype=torch.int64, device=ops.device)

    def draw(self, logits: Tensor, rows: Rows) -> Tensor:
        """What rows draw of logits [rows, vocab]: int64 [rows]."""
        ids = self._ids[: len(logits)]
        self._ops.draw(logits, ids, rows, self._drawing, self._outcome, step=self._step)
        return self._outcome.ids[: len(logits)]


def _draft(request: Request, number: int, known: Sequence[int] = ()) -> Draw | None:
    """How the id is drawn that comes after the known ones of a request and `number` drafts; None: it is known."""
    if number < 0:
        return None
    wanted = draw(request, request.length + number - len(known), known)
    wanted.top_logprobs = -1
    return wanted

"""The sampler, verify and commit on a device: two launches, the same ones whatever the rows ask for (`cuda/sample.cu`).

Draws what `fwd.kernels.sampling` draws. Log-probabilities are within 1e-5 of its.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fwd.kernels.drawing import (
    BIASED,
    DRAWN,
    FIELDS,
    GIVEN,
    MASKED,
    PENALTIES,
    Drawing,
    Outcome,
    fill_row,
    kinds_of,
    line_bias,
    line_counts,
    new_outcome,
)
from fwd.kernels.launch import Kernel, Launcher
from fwd.kernels.ops import Draw, Mask, Sampled, Top
from fwd.kernels.rows import Rows
from fwd.kernels.sizes import LEVELS, MAX_ROWS, MAX_TOPS, SCANNED, mask_words

MAX_VOCAB = 1 << 19  # a thread of the last block of a row for each chunk

_SCAN, _SELECT = Kernel("sample.cu", "sample_scan"), Kernel("sample.cu", "sample_select")
_SCAN_THREADS, _SELECT_THREADS = 256, 512
_PIECE = 4096  # logits of a block of the second launch, at least
_BLOCKS = 128  # of the second launch: no more than the smallest GPU has multiprocessors
_SCAN_SHARED, _SELECT_SHARED = 640 + MAX_TOPS * 8, 640 + 12 * (LEVELS + 1984)


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """What the blocks of the sampler leave for each other; the histograms and counters are zeros between launches."""

    partials: Tensor  # int64 [rows, chunks, 3], `Partial`
    chunk_tops: Tensor  # int64 [rows, chunks, MAX_TOPS]
    values: Tensor  # float32 [rows, vocab], tempered logits of rows with thresholds
    results: Tensor  # int64 [rows, 3], `Result`
    top_ids: Tensor  # int32 [rows, MAX_TOPS]
    top_logprobs: Tensor  # float32 [rows, MAX_TOPS]
    level_counts: Tensor  # int32 [rows, levels], zeros
    level_masses: Tensor  # int64 [rows, levels], zeros
    arrivals: Tensor  # int32 [rows], zeros
    done: Tensor  # int32 [1], zeros

    @classmethod
    def new(cls, launcher: Launcher, vocab: int, *, rows: int = MAX_ROWS) -> "Workspace":
        """Return the workspace for up to `rows` rows of `vocab` logits."""
        assert 0 < rows <= MAX_ROWS, f"{rows} rows"
        assert 0 < vocab <= MAX_VOCAB, f"a vocabulary of {vocab}"

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=launcher.device)

        return cls(
            launcher.empty((rows, chunks(vocab), 3), torch.int64),
            launcher.empty((rows, chunks(vocab), MAX_TOPS), torch.int64),
            launcher.empty((rows, vocab), torch.float32),
            launcher.empty((rows, 3), torch.int64),
            launcher.empty((rows, MAX_TOPS), torch.int32),
            launcher.empty((rows, MAX_TOPS), torch.float32),
            zeros(rows, LEVELS),
            zeros(rows, LEVELS, dtype=torch.int64),
            zeros(rows),
            zeros(1),
        )


class _Token(NamedTuple):
    """What one row of an eager call draws."""

    draw: Draw
    given: int  # its id, where the kinds say GIVEN
    kinds: int


class _Call(NamedTuple):
    """What both launches are given beside the logits and the workspace."""

    ids: Tensor  # int64 [rows], as the next two
    sequences: Tensor
    parents: Tensor
    drawing: Drawing
    outcome: Outcome
    next_ids: Tensor | None = None  # None: nothing is committed
    step: Tensor | None = None
    lines: int = 0


def chunks(vocab: int) -> int:
    """Blocks of a row in the first launch; their sums are joined in order, so a row's bits depend on it."""
    return -(-vocab // SCANNED)


def pieces(vocab: int, rows: int) -> int:
    """Blocks of a row in the second launch: all run at once. Only integers are summed, so nothing depends on them."""
    return max(1, min(-(-vocab // _PIECE), _BLOCKS // rows))


def draw(
    launcher: Launcher,
    workspace: Workspace,
    logits: Tensor,
    ids: Tensor,
    rows: Rows,
    *,
    drawing: Drawing,
    outcome: Outcome,
    next_ids: Tensor,
    step: Tensor,
) -> None:
    """Draw a token for each row of logits float32 [rows, vocab] that draws, verify drafts, commit, stamp.

    `ids` int64 [rows] are the tokens that the rows computed: drafts count as output for the rows below them, and hold
    while they equal what was drawn. `next_ids` int64 [lines] becomes the last committed token of each line that commits
    any; `drawing.counts` gains what rows with penalties commit; `step` int64 [1] goes into the stamp. `outcome` may lie
    in pinned memory of the host. Buffers may hold more rows than `logits`.
    """
    lines = len(outcome.accepted)
    assert len(next_ids) == lines <= len(drawing.counts), f"{len(next_ids)}, {lines}, {len(drawing.counts)} lines"
    assert outcome.last.shape == outcome.accepted.shape
    for tensor in (ids, rows.sequences, rows.parents, next_ids, step):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
    call = _Call(ids, rows.sequences, rows.parents, drawing, outcome, next_ids, step, lines)
    _launch(launcher, workspace, logits, call)


def sample(launcher: Launcher, workspace: Workspace, logits: Tensor, draws: Sequence[Draw]) -> Sampled:
    """Draw one id per row of logits float32 [rows, vocab], any number of rows: `Ops.sample`."""
    tokens = [_Token(draw, 0, kinds_of(draw)) for draw in draws]
    return _eagerly(launcher, workspace, logits, tokens)


def score(launcher: Launcher, workspace: Workspace, logits: Tensor, ids: Sequence[int], tops: Sequence[int]) -> Sampled:
    """Return the log-probabilities of given `ids` and of the `tops[i]` most likely (−1: none): `Ops.score`."""
    assert all(0 <= token < logits.shape[1] for token in ids), "an id that is not in the vocabulary"
    greedy = (Draw(temperature=0.0, top_logprobs=top) for top in tops)
    tokens = [_Token(draw, token, DRAWN | GIVEN) for draw, token in zip(greedy, ids, strict=True)]
    scored = _eagerly(launcher, workspace, logits, tokens)
    return Sampled(torch.tensor(ids), scored.logprobs, scored.finite, scored.tops)


def _eagerly(launcher: Launcher, workspace: Workspace, logits: Tensor, tokens: Sequence[_Token]) -> Sampled:
    """Draw a block of rows at a time and read what came of it; each row is a sequence, nothing is committed."""
    assert len(logits) == len(tokens), f"{len(logits)} rows of logits, {len(tokens)} to draw"
    size, vocab = len(workspace.results), logits.shape[1]
    parts = []
    for first in range(0, len(tokens), size):
        block = tokens[first : first + size]
        drawing = _drawing(launcher.device, vocab, block)
        outcome = new_outcome(len(block), 0, launcher.device)
        ids = torch.tensor([token.given for token in block], dtype=torch.int64, device=launcher.device)
        lines = torch.arange(len(block), device=launcher.device)
        call = _Call(ids, lines, torch.full_like(lines, -1), drawing, outcome)
        _launch(launcher, workspace, logits[first : first + size], call)
        parts.append(_read(outcome, block, vocab))
    return _joined(parts)


def _drawing(device: torch.device, vocab: int, tokens: Sequence[_Token]) -> Drawing:
    """What rows draw, each a line of its own; counts, bias and masks only as far down as some row reads them."""
    arrays = {name: torch.zeros(len(tokens), dtype=dtype).numpy() for name, dtype in FIELDS.items()}
    for row, token in enumerate(tokens):
        fill_row(arrays, row, token.draw, token.kinds)
    fields = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    counts = _table([line_counts(token.draw) for token in _lines(tokens, PENALTIES)], vocab, torch.int32)
    bias = _table([line_bias(token.draw) for token in _lines(tokens, BIASED)], vocab, torch.float32)
    masks = _masks([token.draw.mask for token in _lines(tokens, MASKED)], mask_words(vocab))
    return Drawing(**fields, counts=counts.to(device), bias=bias.to(device), masks=masks.to(device))


def _lines(tokens: Sequence[_Token], kind: int) -> Sequence[_Token]:
    """Those of which the kernel looks at a line, and all before them."""
    return tokens[: max((line + 1 for line, token in enumerate(tokens) if token.kinds & kind), default=0)]


def _table(lines: Sequence[tuple[NDArray[np.int64], NDArray[np.generic]]], vocab: int, dtype: torch.dtype) -> Tensor:
    table = torch.zeros((len(lines), vocab), dtype=dtype)
    for line, (ids, values) in enumerate(lines):
        table[line, torch.from_numpy(ids)] = torch.from_numpy(values)
    return table


def _masks(rows: Sequence[Mask | None], words: int) -> Tensor:
    table = np.zeros((len(rows), words), np.uint32)
    for row, mask in enumerate(rows):
        if mask is not None:
            table[row] = mask
    return torch.from_numpy(table.view(np.int32))


def _check(workspace: Workspace, logits: Tensor, call: _Call) -> None:
    rows, vocab = logits.shape
    drawing, outcome = call.drawing, call.outcome
    assert logits.dtype == torch.float32, f"logits are {logits.dtype}"
    assert logits.is_contiguous()
    assert 0 < rows <= min(len(workspace.results), len(drawing.kinds), len(outcome.ids)), f"{rows} rows of logits"
    assert vocab == workspace.values.shape[1], f"{vocab} logits, a workspace for {workspace.values.shape[1]}"
    assert drawing.counts.shape[1:] == drawing.bias.shape[1:] == (vocab,)
    assert drawing.masks.shape[1:] == (mask_words(vocab),)
    assert drawing.masks.dtype == torch.int32
    for name, dtype in FIELDS.items():
        assert getattr(drawing, name).dtype == dtype, name


def _launch(launcher: Launcher, workspace: Workspace, logits: Tensor, call: _Call) -> None:
    _check(workspace, logits, call)
    (rows, vocab), space, outcome = logits.shape, workspace, call.outcome
    fields = (getattr(call.drawing, name) for name in FIELDS)
    drawn = (call.ids, call.sequences, call.parents, *fields, call.drawing.counts, call.drawing.bias)
    results = (space.results, space.top_ids, space.top_logprobs)
    launcher.launch(
        _SCAN,
        (chunks(vocab), rows, 1),
        _SCAN_THREADS,
        _SCAN_SHARED,
        *(logits, *drawn, call.drawing.masks),
        *(space.partials, space.chunk_tops, space.values, *results, space.arrivals, vocab),
    )
    launcher.launch(
        _SELECT,
        (pieces(vocab, rows), rows, 1),
        _SELECT_THREADS,
        _SELECT_SHARED,
        *(logits, *drawn),
        *(space.values, *results, space.level_counts, space.level_masses, space.arrivals, space.done),
        *(outcome.ids, outcome.logprobs, outcome.finite, outcome.top_ids, outcome.top_logprobs),
        *(outcome.accepted, outcome.last, None if call.step is None else outcome.stamp),
        *(call.next_ids, call.step, call.lines, vocab),
    )


def _read(outcome: Outcome, tokens: Sequence[_Token], vocab: int) -> Sampled:
    finite = outcome.finite.cpu() != 0
    ids, logprobs = outcome.top_ids.tolist(), outcome.top_logprobs.tolist()
    tops: list[Top | None] = []
    for row, token in enumerate(tokens):
        count = min(token.draw.top_logprobs, vocab)
        tops.append(Top(ids[row][:count], logprobs[row][:count]) if count >= 0 and finite[row] else None)
    return Sampled(outcome.ids.cpu(), outcome.logprobs.cpu(), finite, tops)


def _joined(parts: Sequence[Sampled]) -> Sampled:
    return Sampled(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.finite for part in parts]),
        [top for part in parts for top in part.tops],
    )

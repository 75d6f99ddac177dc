"""How the rows of a step draw on a device and what comes of it: buffers at fixed addresses, filled and read outside.

The rows of a sequence stand together, in the order of its chain or tree. The first of them that is `drawn` is the last
known token (the root), those after it are drafts; those before it are known tokens that only write KV.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fwd.kernels.ops import Draw
from fwd.kernels.sampling import single
from fwd.kernels.sizes import MAX_TOPS, mask_words

DRAWN = 1  # kinds: the row's token is wanted
PENALTIES = 2  # kinds: `counts` of its line are read, and gain what is committed
BIASED = 4  # kinds: `bias` of its line is added
GIVEN = 8  # kinds: the row's token is its id of the step: only the log-probability is wanted
MASKED = 16  # kinds: `masks` of the row are read

IN_PROMPT = 1 << 30  # of `counts`

FIELDS: Mapping[str, torch.dtype] = {  # the tensors of `Drawing` that have an element for each row
    "seeds": torch.int64,
    "places": torch.int64,
    "temperatures": torch.float32,
    "top_ps": torch.float32,
    "min_ps": torch.float32,
    "repetitions": torch.float32,
    "presences": torch.float32,
    "frequencies": torch.float32,
    "top_ks": torch.int32,
    "tops": torch.int32,
    "kinds": torch.int32,
}
Arrays = Mapping[str, NDArray[np.generic]]  # of the same names, on the host


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """What each row draws, [rows] each, and what is kept of each line (`Rows.sequences`), which is one sequence."""

    seeds: Tensor  # int64, the bits of a uint64
    places: Tensor  # int64, index of the drawn token in prompt + output (`Draw.position`)
    temperatures: Tensor  # float32
    top_ps: Tensor  # float32
    min_ps: Tensor  # float32
    repetitions: Tensor  # float32, penalties as in `Draw`
    presences: Tensor  # float32
    frequencies: Tensor  # float32
    top_ks: Tensor  # int32
    tops: Tensor  # int32, of most likely ids wanted (≤ MAX_TOPS); −1: none
    kinds: Tensor  # int32, DRAWN | PENALTIES | BIASED | MASKED; 0: a padding row or one that only writes KV
    counts: Tensor  # int32 [lines, vocab]: times the id stands in the output, bit 30 set if it stands in the prompt
    bias: Tensor  # float32 [lines, vocab]: added to logits; −inf: never drawn
    masks: Tensor  # int32 [rows, ⌈vocab/32⌉], bits as in `Mask`


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a step gave. `ids` … `top_logprobs` are per row (undefined where `kinds` is 0), `accepted` per line.

    A row that is not finite commits nothing and ends its line: `accepted` counts the tokens before it, none if it is
    the root.
    """

    ids: Tensor  # int64 [rows]; of a row that is not finite: 0
    logprobs: Tensor  # float32 [rows], of the raw logits; of a row that is not finite: NaN
    finite: Tensor  # int32 [rows], 0: the row's logits held NaN or infinity
    top_ids: Tensor  # int32 [rows, MAX_TOPS]: logit descending, then id ascending; the first `tops`, at most vocab
    top_logprobs: Tensor  # float32 [rows, MAX_TOPS]
    accepted: Tensor  # int32 [lines], tokens that the line commits: 1 + accepted drafts, 0: no row drew
    last: Tensor  # int32 [lines], row whose token is the last committed one; −1: none
    stamp: Tensor  # int64 [1], number of the step: written after all else


def new_drawing(device: torch.device, rows: int, lines: int, vocab: int) -> Drawing:
    """Return buffers in which no row draws and no line has counts or bias."""
    fields = {name: torch.zeros(rows, dtype=dtype, device=device) for name, dtype in FIELDS.items()}
    counts = torch.zeros((lines, vocab), dtype=torch.int32, device=device)
    bias = torch.zeros((lines, vocab), dtype=torch.float32, device=device)
    masks = torch.zeros((rows, mask_words(vocab)), dtype=torch.int32, device=device)
    return Drawing(**fields, counts=counts, bias=bias, masks=masks)


def drawing_bytes(rows: int, lines: int, vocab: int) -> int:
    """Bytes of a `Drawing`."""
    return rows * (sum(dtype.itemsize for dtype in FIELDS.values()) + mask_words(vocab) * 4) + lines * vocab * 8


def new_outcome(rows: int, lines: int, device: torch.device, *, pinned: bool = False) -> Outcome:
    """Return buffers for what a step gives, zeros; `pinned`: in memory of the host that a GPU writes to."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=None if pinned else device, pin_memory=pinned)

    return Outcome(
        zeros(rows, dtype=torch.int64),
        zeros(rows, dtype=torch.float32),
        zeros(rows),
        zeros(rows, MAX_TOPS),
        zeros(rows, MAX_TOPS, dtype=torch.float32),
        zeros(lines),
        zeros(lines),
        zeros(1, dtype=torch.int64),
    )


def kinds_of(draw: Draw) -> int:
    """Return the kinds of a row that draws so."""
    penalties = (draw.repetition_penalty, draw.presence_penalty, draw.frequency_penalty) != (1.0, 0.0, 0.0)
    return DRAWN | PENALTIES * penalties | BIASED * bool(draw.bias or draw.banned) | MASKED * (draw.mask is not None)


def fill_row(arrays: Arrays, row: int, draw: Draw, kinds: int) -> None:
    """Write what one row draws into the arrays of `FIELDS` on the host; `kinds` as of `kinds_of`, or 0."""
    assert draw.top_logprobs <= MAX_TOPS, f"{draw.top_logprobs} of {MAX_TOPS} most likely ids"
    arrays["seeds"][row] = (draw.seed & (1 << 63) - 1) - (draw.seed & 1 << 63)
    arrays["places"][row] = draw.position
    arrays["temperatures"][row] = single(draw.temperature)
    arrays["top_ps"][row] = single(draw.top_p)
    arrays["min_ps"][row] = single(draw.min_p)
    arrays["repetitions"][row] = single(draw.repetition_penalty)
    arrays["presences"][row] = single(draw.presence_penalty)
    arrays["frequencies"][row] = single(draw.frequency_penalty)
    arrays["top_ks"][row] = min(draw.top_k, 2**31 - 1)
    arrays["tops"][row] = draw.top_logprobs
    arrays["kinds"][row] = kinds


def line_counts(draw: Draw) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return the ids of a line that have counts (of `seen` and `counts`, each once) and what stands for them."""
    values = dict.fromkeys(draw.seen, IN_PROMPT) | dict(draw.counts)
    return np.array(list(values), dtype=np.int64), np.array(list(values.values()), dtype=np.int32)


def line_bias(draw: Draw) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the ids of a line that are biased or banned and what is added to their logits."""
    values = {token: single(bias) for token, bias in draw.bias.items()} | dict.fromkeys(draw.banned, -np.inf)
    return np.array(list(values), dtype=np.int64), np.array(list(values.values()), dtype=np.float32)

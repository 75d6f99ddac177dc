"""How the rows of a step draw on a device and what comes of it: buffers at fixed addresses, filled and read outside.

The rows of a sequence stand together, in the order of its chain or tree. The first of them that is `drawn` is the last
known token (the root), those after it are drafts; those before it are known tokens that only write KV.
"""

from dataclasses import dataclass

from torch import Tensor

MAX_TOPS = 20

DRAWN = 1  # kinds: the row's token is wanted
PENALTIES = 2  # kinds: `counts` of its line are read
BIASED = 4  # kinds: `bias` of its line is added


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
    kinds: Tensor  # int32, DRAWN | PENALTIES | BIASED; 0: a padding row or one that only writes KV
    counts: Tensor  # int32 [lines, vocab]: times the id stands in the output, bit 30 set if it stands in the prompt
    bias: Tensor  # float32 [lines, vocab]: added to logits; −inf: never drawn


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a step gave. `ids` … `top_logprobs` are per row (undefined where `kinds` is 0), `accepted` per line."""

    ids: Tensor  # int64 [rows]; of a row that is not finite: 0
    logprobs: Tensor  # float32 [rows], of the raw logits
    finite: Tensor  # int32 [rows], 0: the row's logits held NaN or infinity
    top_ids: Tensor  # int32 [rows, MAX_TOPS]: logit descending, then id ascending
    top_logprobs: Tensor  # float32 [rows, MAX_TOPS]
    accepted: Tensor  # int32 [lines], tokens that the line commits: 1 + accepted drafts, 0: no row drew
    last: Tensor  # int32 [lines], row whose token is the last committed one; −1: none
    stamp: Tensor  # int64 [1], number of the step: written after all else

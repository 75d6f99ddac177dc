"""Whether a drafter foresees anything of what its target says: asked once, when it is loaded.

A head with a wrong layer, rotation or norm loads like any other and foresees nothing. So the target goes on greedily
from a few prompts that lead through the vocabulary, and the drafter is to say each next id.
"""

from collections import Counter
from dataclasses import dataclass

import structlog
import torch
from torch import Tensor

from fwd.kernels.kv import KVCache
from fwd.kernels.ops import Ops
from fwd.kernels.rows import Cells, Rows
from fwd.models.draft.model import DraftModel
from fwd.models.layout import KVFormat, State, groups
from fwd.models.model import Model
from fwd.models.taps import Taps

TEXTS, PROMPT = 4, 8  # texts, and ids that each begins with
LEAST = 8  # places that a verdict is given on
STEPS, FEW = 12, 4  # ids that follow; of a model that is slow here
AT_ONCE = 4  # positions of each text in a pass
STRIDE = 7919  # from id to id of a prompt
PAGE = 16
SLOW = 1 << 30  # bytes of weights that a CPU reads for each id

log = structlog.get_logger("fwd.models")


@dataclass(frozen=True, slots=True)
class Trial:
    """How many ids there were to say, how many were right, and how many the most frequent of them would have been.

    Ids that follow the same one again are not counted.
    """

    places: int
    right: int
    frequent: int
    vocab: int

    @property
    def useless(self) -> bool:
        """Chance is as good, or always the same id is better; of few ids nothing is said."""
        return self.places >= LEAST and self._worse

    @property
    def _worse(self) -> bool:
        return self.right * self.vocab <= self.places or self.right < self.frequent


def notes(target: Model, draft: DraftModel, context: int) -> tuple[str, ...]:
    """Try a drafter on the target's own text and return what users should know of it, which is logged as well.

    `context` is the positions that both are loaded for. Takes some tens of passes, and gives its memory back.
    """
    room, states = context - draft.spec.block, any(isinstance(layout, State) for layout in target.spec.cache)
    if room < PROMPT + FEW or states or target.ops.name == "host":  # where kernels are examined, too slowly for this
        return ()
    found = trial(target, draft, min(room, PROMPT + _steps(target)))
    if not found.useless:
        return ()
    log.warning(
        "drafter_useless",
        drafter=draft.spec.kind,
        folder=str(draft.spec.folder),
        right=found.right,
        of=found.places,
        most_frequent=found.frequent,
    )
    said = (
        f"{draft.spec.kind}: {found.right} of {found.places} ids of the target foreseen, {found.frequent} by one alone"
    )
    return (f"{said}: its layers, rotation or norms may be another target's",)


@torch.inference_mode()
def trial(target: Model, draft: DraftModel, length: int) -> Trial:
    """Let a drafter say each id of texts of `length` ids that follows a prompt; a block drafter, some of them."""
    texts, features = _spoken(target, draft, length)
    said = _blocks(draft, texts, features) if draft.spec.kind == "dflash" else _ids(draft, texts, features)
    pairs = {(text, place): tuple(texts[text, place - 1 : place + 1].tolist()) for text, place in said}
    # Greedy texts go round in circles, and what comes again tells nothing: a pair of ids counts where it comes first.
    first = {pair: where for where, pair in sorted(pairs.items(), reverse=True) if where[1] >= PROMPT}
    frequent = Counter(truth for _, truth in first).most_common(1)
    right = sum(truth == said[where] for (_, truth), where in first.items())
    return Trial(len(first), right, frequent[0][1] if frequent else 0, target.spec.vocab)


def _steps(target: Model) -> int:
    slow = target.ops.device.type == "cpu" and target.spec.weight_bytes() > SLOW
    return FEW if slow else STEPS


def _spoken(target: Model, draft: DraftModel, length: int) -> tuple[Tensor, Tensor]:
    """Texts int64 [TEXTS, length], and the drafter's features of all their positions but the last."""
    ops, spec, device = target.ops, target.spec, target.ops.device
    texts = torch.zeros(TEXTS, length, dtype=torch.int64, device=device)
    texts[:, :PROMPT] = (torch.arange(TEXTS * PROMPT, device=device) * STRIDE + 1).view(TEXTS, PROMPT) % spec.vocab
    features = torch.zeros(TEXTS, length, draft.spec.features, dtype=target.dtype, device=device)
    buffer = torch.zeros(TEXTS * AT_ONCE, draft.spec.features, dtype=target.dtype, device=device)
    taps = Taps(draft.spec.taps, buffer) if draft.spec.taps else None
    count = len(groups(spec.cache))
    cache = target.new_cache([TEXTS * _pages(length)] * count, PAGE, _format(target.dtype))
    begin = 0
    while begin < length - 1:
        end = begin + (AT_ONCE if begin < PROMPT else 1)
        rows = _rows(range(TEXTS), range(begin, end), length, count, ops)
        hidden = target.forward(_flat(texts, begin, end), rows, cache, taps)
        features[:, begin:end] = buffer[: len(hidden)].view(TEXTS, end - begin, -1)
        if end >= PROMPT:
            texts[:, end] = target.logits(hidden).view(TEXTS, end - begin, -1)[:, -1].argmax(-1)
        begin = end
    return texts, features


def _ids(draft: DraftModel, texts: Tensor, features: Tensor) -> dict[tuple[int, int], int]:
    """What the drafter says, by text and place: row by row, each with what is known."""
    (_, length), shift, said = texts.shape, draft.spec.shift, dict[tuple[int, int], int]()
    count, cache = len(groups(draft.spec.cache)), draft.new_cache(TEXTS * _pages(length), PAGE, _format(draft.dtype))
    for begin in range(0, length - 1 - shift, AT_ONCE):
        end = min(begin + AT_ONCE, length - 1 - shift)
        rows = _rows(range(TEXTS), range(begin, end), length, count, draft.ops)
        hidden = draft.fuse(_flat(features, begin, end)) if draft.spec.taps else None
        ids = _flat(texts, begin + shift, end + shift)
        found = draft.logits(draft.forward(ids, hidden, rows, cache)).argmax(-1).view(TEXTS, -1).tolist()
        said |= {
            (text, begin + place + 1 + shift): id_ for text, each in enumerate(found) for place, id_ in enumerate(each)
        }
    return said


def _blocks(draft: DraftModel, texts: Tensor, features: Tensor) -> dict[tuple[int, int], int]:
    """The same of a block drafter: what it says first in every AT_ONCE-th block."""
    (_, length), said = texts.shape, dict[tuple[int, int], int]()
    span = length + draft.spec.block
    count, cache = len(groups(draft.spec.cache)), draft.new_cache(TEXTS * _pages(span), PAGE, _format(draft.dtype))
    for begin in range(0, length - 1, AT_ONCE):
        for text in range(TEXTS) if begin >= PROMPT - 1 else ():
            rows = _rows(range(text, text + 1), range(begin, begin + draft.spec.block), span, count, draft.ops)
            found = _block(draft, int(texts[text, begin]), rows, cache)
            said |= {(text, place): id_ for place, id_ in enumerate(found, begin + 1) if place < length}
        end = min(begin + AT_ONCE, length - 1)
        rows = _rows(range(TEXTS), range(begin, end), span, count, draft.ops)
        draft.absorb(_flat(texts, begin, end), draft.fuse(_flat(features, begin, end)), rows, cache)
    return said


def _block(draft: DraftModel, anchor: int, rows: Rows, cache: KVCache) -> list[int]:
    """The first ids that a block drafter says behind an anchor, all before which is absorbed."""
    ids = torch.full_like(rows.positions, draft.spec.mask)
    ids[0] = anchor
    ends = torch.where(rows.sequences < 0, 0, rows.positions[0] + draft.spec.block - 1)
    found: list[int] = draft.logits(draft.draft(ids, ends, rows, cache)).argmax(-1).tolist()
    return found[1 : min(draft.spec.block, AT_ONCE + 1)]


def _rows(texts: range, places: range, span: int, count: int, ops: Ops) -> Rows:
    """Rows of places of some texts, of `span` places at most, for `count` groups that all have the same pages."""
    pages = _pages(span)
    positions = torch.tensor([place for _ in texts for place in places], device=ops.device)
    sequences = torch.tensor([text for text in texts for _ in places], device=ops.device)
    tables = torch.arange(TEXTS * pages, dtype=torch.int32, device=ops.device).view(TEXTS, pages)
    cells = Cells(sequences * pages * PAGE + positions, tables)
    return Rows(positions, sequences, torch.full_like(positions, -1), (cells,) * count).padded(ops.row_block)


def _flat(of: Tensor, begin: int, end: int) -> Tensor:
    """What stands at some places of each text [TEXTS, length, …], as the rows of a pass."""
    return of[:, begin:end].flatten(0, 1).contiguous()


def _pages(places: int) -> int:
    return -(-places // PAGE)


def _format(dtype: torch.dtype) -> KVFormat:
    return "float32" if dtype == torch.float32 else "bfloat16"

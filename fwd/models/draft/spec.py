"""What the engine knows of a draft model before any weight is read. No torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fwd.models.layout import CacheLayout

DraftKind = Literal["model", "mtp", "eagle", "dflash"]


@dataclass(frozen=True, slots=True)
class DraftSizes:
    """Bytes that a draft model takes where ops are kernels, or where they are the reference.

    What it shares with the target (embedding, head) is not among them.
    """

    weights: int  # all it keeps: matrices as they are packed, norms, tables; without its RoPE table
    packing: int  # what is there beside them while one of them is packed
    width: int  # numbers of a row in a layer, at its widest: what goes in and out of attention and MLP
    spaces: int = 0  # what its launches leave for each other in shapes that the target does not have
    logits: int = 0  # bytes of a row of logits on the way to the target's vocabulary, beside the target's own


@dataclass(frozen=True, slots=True)
class DraftSpec:
    """A draft model of a target, as its config says; made for that target and refused for others.

    Where `shift` is 0 a row at position p has id t_p; where it is 1, id t_{p+1} and the target's feature f_p. A dflash
    has shift 1 too: a row of its context has f_p and needs no id.
    """

    kind: DraftKind
    folder: Path
    shift: Literal[0, 1]
    block: int  # rows of one pass that drafts all ids (dflash: the anchor's and masks'); 1: one id a pass
    taps: tuple[int, ...]  # blocks of the target after which hidden rows are features; (): none; the last: layers − 1
    features: int  # numbers of a feature: len(taps) · hidden of the target
    hidden: int  # numbers of a hidden row
    cache: tuple[CacheLayout, ...]  # of its layers, which are numbered from 0; no states
    context: int  # positions it was made for
    rotated: int  # numbers of a head that RoPE turns
    reference: DraftSizes
    kernels: DraftSizes
    mask: int = -1  # dflash: the id of a row that is to be guessed
    notes: tuple[str, ...] = ()  # what users should know of it, a line each

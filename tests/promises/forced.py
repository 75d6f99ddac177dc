"""A model that is given ids, in decode steps, on a device."""

import numpy as np
import torch

from fwd.demo import corpus, tokenizer
from fwd.kernels.rows import Cells, Rows
from fwd.models.layout import groups
from fwd.models.load import load

POSITIONS = 192
ROWS = 16
PAGE = 16
GAP = 0.06  # of the reference's two best logits, below which the kernels may choose the other: 2⁻⁸ of logits up to 16
DIFFERENCE = 4e-4  # 1 − 2Σxy / (Σx² + Σy²) of all logits of a position: a few roundings to bfloat16 in each layer


class Forced:
    """A model that is given ids over pages in no order, in decode steps of up to 16 rows."""

    def __init__(self, folder, device, kv="bfloat16"):
        self.model = load(folder, device=device, dtype="bfloat16", context=POSITIONS)
        pages, self.groups = POSITIONS // PAGE, len(groups(self.model.spec.cache))
        self.order = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).to(torch.int32)
        self.cache = self.model.new_cache((pages,) * self.groups, PAGE, kv)

    def step(self, start, ids):
        """Logits [positions, vocab], each id given."""
        positions = torch.arange(start, start + len(ids))
        slots = self.order[positions // PAGE].long() * PAGE + positions % PAGE
        none = torch.full_like(positions, -1)
        cells = (Cells(slots, self.order.view(1, -1)),) * self.groups
        rows = Rows(positions, torch.zeros_like(positions), none, cells)
        return self.model.logits(self.model.forward(torch.tensor(ids), rows, self.cache))

    def logits(self, ids):
        """Of all positions."""
        steps = [self.step(start, ids[start : start + ROWS]) for start in range(0, len(ids), ROWS)]
        return torch.cat(steps).double().numpy()

    def greedy(self, start, token, count):
        """The ids that follow one."""
        found = []
        for position in range(start, start + count):
            token = int(self.step(position, [token]).argmax())
            found.append(token)
        return found


def differences(ours, theirs):
    """1 − 2Σxy / (Σx² + Σy²) of all logits of each position."""
    return 1 - 2 * (ours * theirs).sum(axis=1) / ((ours**2).sum(axis=1) + (theirs**2).sum(axis=1))


def held_out(folder, count):
    """Ids of text that the embedded model has not seen."""
    text = next(source.text for source in corpus.sources() if source.held_out and len(source.text) > 4 * count)
    return tokenizer.load(folder).encode(text).ids[:count]


def assert_alike(ours, theirs):
    """The same token is best, wherever it is not a close call, and all logits are near."""
    best = np.sort(theirs, axis=1)
    same = ours.argmax(axis=1) == theirs.argmax(axis=1)
    assert (same | (best[:, -1] - best[:, -2] < GAP)).all()
    assert same.mean() > 0.95
    assert differences(ours, theirs).max() < DIFFERENCE

"""A model that is given ids, in decode steps, on a device."""

import torch

from fwd.kernels.rows import Cells, Rows
from fwd.models.layout import groups
from fwd.models.load import load

POSITIONS = 320
ROWS = 16
PAGE = 16


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

"""A tree of drafts over a context, of either kind of cache."""

import torch

PARENTS = (-1, 0, 0, 1, 1, 2, 5, 3, -1)  # rows below row 0 at positions base + depth; the last row is another sequence
DEPTHS = (0, 1, 1, 2, 2, 2, 3, 3)


def tree_rows(context, base):
    """The tree over `base` known tokens of sequence 0, drafts in cells that the block table does not name there."""
    page, count = context.shape.page, len(DEPTHS)
    spare = (context.spare[:, None].long() * page + torch.arange(page)).flatten()[:count]
    rows = context.rows([*((0, base) for _ in DEPTHS), (1, 29)])
    rows.positions[:count] += torch.tensor(DEPTHS)
    rows.parents[:] = torch.tensor(PARENTS)
    rows.cells[0].slots[1:count] = spare[1:]
    return rows


def branch(row):
    """The rows from the root to a row."""
    return [*branch(PARENTS[row]), row] if PARENTS[row] >= 0 else [row]

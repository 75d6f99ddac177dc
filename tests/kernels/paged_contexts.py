"""Decode rows over paged contexts: the kernel's result, what windows leave of a context, trees of drafts."""

from contexts import Context, on
from trees import DEPTHS, tree_rows

from fwd.kernels import paged_attention as paged

BOUND = 1e-5  # weights of keys are rounded to bf16 before they meet values; the most seen is 2.5e-6


def attend(launcher, shape, q, rows, kv, sinks=None):
    """The kernel's result; its workspace must be left as it was."""
    device = launcher.device
    workspace = paged.Workspace.new(launcher, shape.heads, shape.kv_heads, shape.head_dim)
    moved = (on(device, thing) for thing in (q, rows, kv))
    out = paged.decode_attention(launcher, workspace, *moved, sinks=on(device, sinks))
    assert not workspace.arrivals.any(), "a counter is not zero"
    return out


def window_only(context):
    """Nothing behind the windows is there any more."""
    if window := context.shape.window:
        for line, length in enumerate(context.lengths):
            context.forget(line, max(0, length - window))
    return context


def last_rows(context):
    return context.rows([(line, length - 1) for line, length in enumerate(context.lengths)])


def tree(shape, base):
    """A context and the rows of a tree over `base` of its tokens."""
    context = Context(shape, (base + 1, 30), spare=12)
    rows = tree_rows(context, base)
    context.write(rows.cells[0].slots[1 : len(DEPTHS)], seed=77)
    return context, rows

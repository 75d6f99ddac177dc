"""Chunks of layers that keep latents, as a GPU takes them: the reference's numbers."""

import pytest
import torch
from agreement import difference
from contexts import on
from latent_contexts import BOUND, EXACT, SHAPES, Context, Layer, cache_on, hidden_of, written

from fwd.kernels import chunk_latents
from fwd.kernels.latent_kernels import Workspace
from fwd.kernels.reference import Reference
from fwd.kernels.rows import Cells, Rows


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[5], SHAPES[6]], ids=str)
def test_a_chunk_agrees_with_the_reference(execution, shape):
    """Rows at its beginning and end are padding; what the products give is the library's."""
    size, first, end = 24, 26, 41  # of chunk 1
    layer, context = Layer(shape), Context(shape, (end,))
    positions = torch.arange(size, 2 * size)
    live = (positions >= first) & (positions < end)
    slots = torch.where(live, context.cell(0, positions.clamp(max=end - 1)), -1)
    sequences, cells = torch.where(live, 0, -1), Cells(slots, context.tables)
    rows = Rows(positions, sequences, torch.full_like(positions, -1), (cells,), chunk=1)
    hidden, device = hidden_of(shape, size), execution.launcher.device
    down, q = products(layer, hidden)

    def run(launcher):
        packed, kv, moved = layer.packed(device), cache_on(device, context.kv), on(device, rows)
        turned = chunk_latents.latent_rows(
            launcher, on(device, down), on(device, q), packed, on(device, layer.rope), rows=moved, kv=kv
        )
        workspace = Workspace.new(launcher, packed)
        out = chunk_latents.prefill_latent_attention(launcher, workspace, turned, packed, rows=moved, kv=kv)
        return turned[live], out[live], *written(kv, moved)

    found = execution.everywhere(run, count=2)
    ops, kv = Reference(), cache_on("cpu", context.kv)
    wanted_q = ops.latent_qkv(hidden, layer.plain, layer.rope, rows, kv)
    wanted = ops.prefill_latent_attention(wanted_q, layer.plain, rows, kv)
    assert difference(found[0], wanted_q[live]) < EXACT
    assert difference(found[1], wanted[live]) < BOUND
    assert max(difference(*pair) for pair in zip(found[2:], written(kv, rows), strict=True)) < 1e-5


def products(layer, hidden):
    """What the library's products give a chunk: `down` and q before its rotation."""

    def normed(x, norm):
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), None, norm.eps) * norm.weight

    plain, x = layer.plain, normed(hidden, layer.plain.norm)
    down = x @ plain.down.data.T
    narrow = x if plain.q_norm is None else normed(down[:, : layer.shape.rank], plain.q_norm)
    return down, (narrow @ plain.query.data.T).view(len(x), layer.shape.heads, -1)

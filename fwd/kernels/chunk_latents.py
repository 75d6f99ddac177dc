"""Latent attention of a prefill chunk on a GPU: its cells and rotated queries, then the kernels of decode rows."""

from dataclasses import replace

import torch
from torch import Tensor

from fwd.kernels import latent_kernels
from fwd.kernels.kv import LatentKV
from fwd.kernels.latent_kernels import Workspace
from fwd.kernels.launch import Kernel, Launcher
from fwd.kernels.ops import Latents
from fwd.kernels.rows import Cells, Rows
from fwd.kernels.sizes import MAX_ROWS

_THREADS = 256


def latent_rows(
    launcher: Launcher, down: Tensor, q: Tensor, layer: Latents, rope: Tensor, *, rows: Rows, kv: LatentKV
) -> Tensor:
    """Write the cells of a chunk and rotate its queries, which are returned.

    `down` bfloat16 [C, q_rank + latent + rope] and q bfloat16 [C, heads, nope + rope] are what the products gave.
    """
    latent_kernels.check(layer, rope, rows, kv)
    (heads, nope, latent), rank = layer.up_key.shape, latent_kernels.query_rank(layer)
    assert down.shape == (len(q), rank + latent + layer.rope), (tuple(down.shape), rank, latent)
    assert q.shape[1:] == (heads, nope + layer.rope), tuple(q.shape)
    assert down.is_contiguous(), down.stride()
    assert q.is_contiguous(), q.stride()
    launcher.launch(
        *(Kernel("latent_qkv.cu", "latent_rows"), (len(q), 1, 1), _THREADS, 0),
        *(down, layer.kv_norm.weight, layer.kv_norm.eps, rope, rows.positions, rows.cells[kv.group].slots),
        *(kv.latents, kv.keys, kv.scales, q),
        *(len(rope), rank, heads, nope, latent, layer.rope // 2),
    )
    return q


def prefill_latent_attention(
    launcher: Launcher, workspace: Workspace, q: Tensor, layer: Latents, *, rows: Rows, kv: LatentKV
) -> Tensor:
    """See `fwd.kernels.ops.LatentOps.prefill_latent_attention`: in the absorbed form, as decode rows, 16 at a time."""
    nope = layer.up_key.shape[1]
    onto_latents = torch.bmm(q[..., :nope].transpose(0, 1), layer.up_key).transpose(0, 1)  # [C, heads, latent]
    absorbed = torch.cat((onto_latents, q[..., nope:]), dim=-1)
    parts = [slice(start, min(start + MAX_ROWS, len(q))) for start in range(0, len(q), MAX_ROWS)]
    return torch.cat(
        [
            latent_kernels.attend(launcher, workspace, absorbed[part], layer, rows=_part(rows, part), kv=kv)
            for part in parts
        ]
    )


def _part(rows: Rows, part: slice) -> Rows:
    cells = tuple(Cells(each.slots[part], each.tables) for each in rows.cells)
    parents = rows.parents[part]
    return replace(rows, positions=rows.positions[part], sequences=rows.sequences[part], parents=parents, cells=cells)

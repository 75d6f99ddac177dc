"""The cases of mixtures of experts and of latent attention; see `gpu.cases`.

Launches of experts share one layer's weights: rows differ from launch to launch, and so do the experts they visit.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from fwd.kernels import expert_kernels, latent_kernels
from fwd.kernels.kv import LatentKV
from fwd.kernels.ops import Active, Experts, Latents, Norm, Routed, Router
from fwd.kernels.qtensor import QTensor
from fwd.models.spec import LAYER, ExpertSpec, LatentSpec
from gpu.case import BF16, PAGE, Case
from gpu.timing import copies

if TYPE_CHECKING:
    from gpu.cases import Cases

LAUNCHES = 4  # that visit experts of their own


class Visit:
    """Rows on their way through a mixture, once, and what the launches that follow need of it."""

    def __init__(self, own: "Cases", router: Router, experts: Experts, rows: int) -> None:
        launcher, model = own.launcher, own.model
        many, top_k = router.weight.shape[0], router.top_k
        self.space = expert_kernels.Workspace.of(launcher, model.hidden, many, top_k)
        self.hidden, self.step = own.random(rows, model.hidden), own.rows(rows, 1)
        self.routed: Routed = expert_kernels.route(launcher, self.space, self.hidden, router, self.step)
        self.active: Active = expert_kernels.expert_gate_up(launcher, self.space, self.routed, experts)
        self.visited = torch.unique(self.routed.experts).long()


def mixture(own: "Cases", moe: ExpertSpec, rows: int) -> Iterator[Case]:
    """Router, gate and up, down of one layer."""
    launcher, (router, experts, plain) = own.launcher, _layer(own, moe)
    visits = [Visit(own, router, experts, rows) for _ in range(LAUNCHES)]
    yield Case(
        "route",
        [lambda v=v: expert_kernels.route(launcher, v.space, v.hidden, router, v.step) for v in visits],
        [lambda v=v: _route(v.hidden, router, plain[0]) for v in visits],
        call="F.rms_norm, F.linear, topk, softmax",
    )
    gate_up, down = ([plain[i](v.visited) for v in visits] for i in (1, 2))
    yield Case(
        "expert_gate_up",
        [lambda v=v: expert_kernels.expert_gate_up(launcher, v.space, v.routed, experts) for v in visits],
        [lambda v=v, weight=weight: _gate_up(v.routed.x, weight) for v, weight in zip(visits, gate_up, strict=True)],
        call="matmul over the experts visited, in bfloat16, F.silu, mul",
    )
    yield Case(
        "expert_down",
        [
            lambda v=v: expert_kernels.expert_down(launcher, v.space, v.active, v.routed, experts, residual=v.hidden)
            for v in visits
        ],
        [
            lambda v=v, weight=weight: v.active.experts[:, 0] @ weight.transpose(1, 2)
            for v, weight in zip(visits, down, strict=True)
        ],
        call="matmul over the experts visited, in bfloat16",
    )


def _layer(own: "Cases", moe: ExpertSpec) -> tuple[Router, Experts, tuple[Tensor, "_Part", "_Part"]]:
    """A router and its experts as kernels stream them; beside them what torch takes: the router, experts by number."""
    model, at = own.model, f"{LAYER.format(moe.layers[0])}mlp."
    names = ("router", "gate_up_proj", "down_proj") if moe.bias else ("gate", "0.gate_proj", "0.down_proj")
    weight = own.matrix("", moe.experts, model.hidden)
    stacks = [
        own.matrix(f"{at}experts.{name}", *shape, count=moe.experts)
        for name, shape in zip(
            names[1:], ((2 * moe.intermediate, model.hidden), (model.hidden, moe.intermediate)), strict=True
        )
    ]
    router = Router(
        norm=own.norm(),
        weight=own.ops.pack(weight),
        bias=own.floats(moe.experts) if moe.bias else None,
        correction=own.floats(moe.experts) * 0.01 if moe.scoring == "sigmoid" else None,
        scoring=moe.scoring,
        top_k=moe.top_k,
        groups=moe.groups,
        top_groups=moe.top_groups,
        normalize=moe.normalize,
        scale=moe.scale,
    )
    shared = [
        own.ops.pack(own.matrix(f"{at}shared_experts.{name}", *shape))
        for name, shape in (("gate_proj", (2 * moe.shared, model.hidden)), ("down_proj", (model.hidden, moe.shared)))
        if moe.shared
    ]
    experts = Experts(
        gate_up=own.ops.pack(stacks[0]),
        gate_up_bias=own.floats(moe.experts, 2 * moe.intermediate) if moe.bias else None,
        down=own.ops.pack(stacks[1]),
        down_bias=own.floats(moe.experts, model.hidden) if moe.bias else None,
        activation="clamped" if moe.bias else "silu",
        shared_gate_up=shared[0] if shared else None,
        shared_down=shared[1] if shared else None,
    )
    return router, experts, (weight.data, _Part(stacks[0]), _Part(stacks[1]))


class _Part:
    """Some matrices of a stack in bfloat16."""

    def __init__(self, stack: QTensor) -> None:
        self._stack = stack

    def __call__(self, numbers: Tensor) -> Tensor:
        return torch.stack([self._stack.expert(int(each)).dequantize().to(BF16) for each in numbers])


def _route(hidden: Tensor, router: Router, weight: Tensor) -> Tensor:
    x = F.rms_norm(hidden, hidden.shape[-1:], router.norm.weight, router.norm.eps)
    return F.linear(x, weight).float().topk(router.top_k).values.softmax(-1)


def _gate_up(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = (x @ weight.transpose(1, 2)).chunk(2, -1)
    return F.silu(gate) * up


def latents(own: "Cases", mla: LatentSpec, rows: int, context: int) -> Iterator[Case]:
    """What is before attention over latents, and attention with the values behind it."""
    launcher, model = own.launcher, own.model
    hidden, step = own.random(rows, model.hidden), own.rows(rows, context)
    first = _latents(own, mla)
    size = first.down.nbytes + first.query.nbytes + first.up_key.nbytes
    layers = [first, *(_latents(own, mla) for _ in range(copies(size, own.l2) - 1))]
    space, cells = latent_kernels.Workspace.new(launcher, first), rows * own.pages(context) * PAGE
    count = copies(rows * context * 2 * (mla.latent + mla.rope), own.l2)
    caches = [LatentKV(own.random(cells, mla.latent), own.random(cells, mla.rope), PAGE) for _ in range(count)]

    def before(layer: Latents) -> Tensor:
        return latent_kernels.latent_qkv(launcher, space, hidden, layer, own.rope, rows=step, kv=caches[0])

    plain = [own.random(layer.down.shape[0], model.hidden) for layer in layers]
    theirs: list[Callable[[], Tensor]] = [lambda weight=weight: F.linear(hidden, weight) for weight in plain]
    yield Case(
        "latent qkv", [lambda layer=layer: before(layer) for layer in layers], theirs, call="F.linear, down alone"
    )
    q = before(first)
    keys = [own.random(rows, 1, context, mla.latent + mla.rope) for _ in range(count)]
    absorbed = own.random(rows, model.heads, 1, mla.latent + mla.rope)
    yield Case(
        "latent attention",
        [
            lambda kv=kv: latent_kernels.decode_latent_attention(launcher, space, q, first, rows=step, kv=kv)
            for kv in caches
        ],
        [
            lambda key=key: F.scaled_dot_product_attention(absorbed, key, key[..., : mla.latent], enable_gqa=True)
            for key in keys
        ],
        call="F.scaled_dot_product_attention",
    )


def _latents(own: "Cases", mla: LatentSpec) -> Latents:
    model, at = own.model, f"{LAYER.format(0)}self_attn."
    down, query = ("q_a_proj", "q_b_proj") if mla.q_rank else ("kv_a_proj_with_mqa", "q_proj")
    head, outputs = mla.nope + mla.rope, mla.q_rank + mla.latent + mla.rope
    return Latents(
        norm=own.norm(),
        down=own.ops.pack(own.matrix(at + down, outputs, model.hidden)),
        q_norm=Norm(own.random(mla.q_rank), 1e-6) if mla.q_rank else None,
        query=own.ops.pack(own.matrix(at + query, model.heads * head, mla.q_rank or model.hidden)),
        kv_norm=Norm(own.random(mla.latent), 1e-6),
        up_key=own.random(model.heads, mla.nope, mla.latent),
        up_value=own.random(model.heads, mla.value, mla.latent),
        rope=mla.rope,
        scale=mla.scale,
    )

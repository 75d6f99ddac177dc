"""Random mixtures whose experts stand in any format, and what kernels and the reference make of rows of them."""

from dataclasses import replace
from typing import NamedTuple

import torch
from layers import to
from mixtures import Mixture, Shape, steps
from quants import damped

from fwd.kernels import expert_kernels as kernels
from fwd.kernels.ops import Active, Experts, Norm, Router
from fwd.kernels.qtensor import QTensor
from fwd.kernels.reference import Reference

SMALL = Shape(64, 8, 2, 48, "softmax", normalize=True)
SHAPES = [
    SMALL,
    Shape(72, 128, 8, 24, "softmax", normalize=True),
    Shape(64, 8, 4, 32, "topk_softmax", biased=True),
    Shape(104, 33, 5, 40, "topk_softmax", biased=True),
    Shape(48, 256, 8, 24, "sigmoid", normalize=True, groups=8, top_groups=4, shared=24, scale=2.5),
    Shape(72, 45, 7, 16, "sigmoid", normalize=True, groups=5, top_groups=2, shared=56, scale=1.8),
    Shape(64, 6, 6, 16, "sigmoid", shared=8),
    Shape(40, 3, 1, 8, "softmax"),
    Shape(8, 1, 1, 8, "topk_softmax", biased=True),
    Shape(24, 384, 8, 8, "sigmoid", normalize=True),
]
# experts, shared: the formats; gpt-oss's hidden size has 90 scale groups a row
FORMATS = [
    ("bf16", "bf16"),
    ("mxfp4", "mxfp4"),
    ("fp8-block", "fp8-channel"),
    ("fp8-tensor", "bf16"),
    ("nvfp4", "nvfp4"),
    ("int4", "int4-zeros"),
    ("int4-128", "mxfp4"),
]
WIDE = Shape(384, 12, 4, 256, "sigmoid", normalize=True, groups=4, top_groups=2, shared=128, biased=False)


def mixture(shape, experts="bf16", shared=None, seed=1, biased=None):
    """A random one in bfloat16, its experts in a form of `quants.FORMS`."""
    found = Mixture(shape, torch.bfloat16, seed)
    many, hidden, inner = shape.experts, shape.hidden, shape.inner
    made = found.experts
    if experts != "bf16":
        gate_up, down = (
            damped(experts, many, 2 * inner, hidden, seed=seed),
            damped(experts, many, hidden, inner, seed=seed + 1),
        )
        made = replace(made, gate_up=gate_up, down=down)
    if shape.shared and (shared or "bf16") != "bf16":
        gate_up = damped(shared, 2 * shape.shared, hidden, seed=seed + 2)
        made = replace(made, shared_gate_up=gate_up, shared_down=damped(shared, hidden, shape.shared, seed=seed + 3))
    if biased:
        biases = found.normal(many, 2 * inner), found.normal(many, hidden)
        made = replace(made, gate_up_bias=biases[0], down_bias=biases[1])
    found.experts = made
    return found


class Packed:
    """A mixture as kernels take it, on a launcher's device."""

    def __init__(self, launcher, given, rows=16):
        self.launcher, shape = launcher, given.shape
        self.router = _each(given.router, launcher.device)
        self.experts = _each(given.experts, launcher.device)
        self.space = kernels.Workspace.of(launcher, shape.hidden, shape.experts, shape.top_k, rows=rows)

    def run(self, hidden, sequences=None, chunk=-1):
        """x, experts, weights, active, shared active, sums of the rows; rows that route nowhere are zeros."""
        launcher, space, device = self.launcher, self.space, self.launcher.device
        rows = steps([0] * len(hidden) if sequences is None else sequences, chunk)
        rows = replace(rows, sequences=rows.sequences.to(device))
        hidden = hidden.to(device).contiguous()
        routed = kernels.route(launcher, space, hidden, self.router, rows)
        active = kernels.expert_gate_up(launcher, space, routed, self.experts)
        total = kernels.expert_down(launcher, space, active, routed, self.experts, residual=hidden.clone())
        assert not space.counters.any(), "counters are left as they were found"
        return cleared(routed, active, total, rows.sequences < 0)


def table(space, visits):
    """Items of a table: expert and the visits in order."""
    words = space.table.tolist()
    order = words[4 + 4 * visits : 4 + 5 * visits]
    items = [words[4 + 4 * item : 7 + 4 * item] for item in range(words[0])]
    return [(expert, order[first : first + count]) for expert, first, count in items]


def table_of(experts, most):
    """The table that rows with these experts have, in items of up to `most`."""
    flat, items = experts.flatten().tolist(), []
    for expert in sorted(set(flat) - {-1}):
        visits = [visit for visit, found in enumerate(flat) if found == expert]
        items += [(expert, visits[first : first + most]) for first in range(0, len(visits), most)]
    return items


def summed(launcher, orders, *, shared, residual):
    """Sums of three experts that give 1e8, 1 and −1e8 in orders of their own, then `shared`, then `residual`."""
    gives, apart, choice = torch.zeros(3, 16, 16), torch.zeros(16, 16), torch.zeros(3, 16)
    gives[:, 0, 0], apart[0, 0] = torch.tensor([1e8, 1.0, -1e8]), 1.0
    down, alone = QTensor.plain(gives.bfloat16()), QTensor.plain(apart.bfloat16())
    for row, order in enumerate(orders):
        choice[order, row] = torch.tensor([1.0, 0.5, 0.25])
    weight, count = QTensor.plain(choice.bfloat16()), len(orders)
    router = Router(Norm(torch.ones(16).bfloat16(), 1e-5), weight, None, None, "topk_softmax", 3)
    ops = Packed(
        launcher, Given(Shape(16, 3, 3, 16, ""), router, Experts(down, None, down, None, "silu", alone, alone))
    )
    hidden = torch.eye(16)[:count].bfloat16().to(launcher.device).contiguous()
    routed = kernels.route(launcher, ops.space, hidden, ops.router, steps([0] * count))
    assert routed.experts.tolist() == orders
    routed = routed._replace(weights=torch.ones_like(routed.weights))
    one = torch.zeros(count, 3, 16, dtype=torch.bfloat16, device=launcher.device)
    one[:, :, 0] = 1.0
    active = Active(one, (one[:, 0] * shared).contiguous())
    start = torch.full((count, 16), residual, dtype=torch.bfloat16, device=launcher.device)
    return kernels.expert_down(launcher, ops.space, active, routed, ops.experts, residual=start)[:, 0].tolist()


class Given(NamedTuple):
    """A mixture as `Packed` takes it."""

    shape: Shape
    router: Router
    experts: Experts


def expected(given, hidden, sequences=None, chunk=-1):
    """The same by the reference, on the CPU."""
    ops, count = Reference(), len(hidden)
    rows = steps([0] * count if sequences is None else sequences, chunk).padded(4)
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, len(rows.sequences) - count))
    routed = ops.route(hidden, given.router, rows)
    active = ops.expert_gate_up(routed, given.experts)
    total = ops.expert_down(active, routed, given.experts, hidden.clone())
    return tuple(part[:count] for part in cleared(routed, active, total, rows.sequences < 0))


def cleared(routed, active, total, padding):
    parts = [*routed, active.experts, active.shared, total]
    for place in (2, 3, 4, 5):
        if parts[place] is not None:
            parts[place] = parts[place].clone()
            parts[place][padding] = 0
    return tuple(part for part in parts if part is not None)


def _each(thing, device):
    """The same with its matrices packed, all on a device."""
    changed = {}
    for name in thing.__dataclass_fields__:
        value = getattr(thing, name)
        if isinstance(value, QTensor):
            changed[name] = to(value.pack(), device) if value.format == "bf16" else value.pack().to(device)
        elif isinstance(value, torch.Tensor):
            changed[name] = value.to(device)
        elif name == "norm":
            changed[name] = replace(value, weight=value.weight.to(device))
    return replace(thing, **changed)

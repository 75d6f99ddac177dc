"""Random mixtures of experts, and what the rules of `fwd.kernels.ops` make of rows: loops in float64."""

import math
from dataclasses import dataclass, replace

import torch

from fwd.kernels import experts as definition
from fwd.kernels.ops import Experts, Norm, Router
from fwd.kernels.qtensor import QTensor
from fwd.kernels.reference import normed
from fwd.kernels.rows import Cells, Rows


@dataclass(frozen=True)
class Shape:
    """A mixture."""

    hidden: int
    experts: int
    top_k: int
    inner: int
    scoring: str
    normalize: bool = False
    groups: int = 1
    top_groups: int = 1
    shared: int = 0
    biased: bool = False
    scale: float = 1.0

    def __str__(self):
        return f"{self.scoring}-{self.hidden}x{self.experts}x{self.inner}-top{self.top_k}"


SHAPES = [
    Shape(64, 8, 2, 48, "softmax", normalize=True),
    Shape(67, 3, 1, 9, "softmax"),
    Shape(72, 128, 8, 20, "softmax", normalize=True),
    Shape(64, 8, 4, 32, "topk_softmax", biased=True),
    Shape(90, 33, 5, 37, "topk_softmax", biased=True),
    Shape(48, 16, 4, 24, "sigmoid", normalize=True, groups=4, top_groups=2, shared=24, scale=2.5),
    Shape(70, 45, 7, 13, "sigmoid", normalize=True, groups=5, top_groups=2, shared=26, scale=1.8),
    Shape(64, 6, 6, 16, "sigmoid", shared=11),
    Shape(32, 3, 2, 8200, "topk_softmax", biased=True, shared=8200),  # over torch's split
]


class Mixture:
    """A random router and its experts in a dtype; activations are large enough for the clamped activation to clamp."""

    def __init__(self, shape, dtype, seed):
        self.shape, self.dtype = shape, dtype
        self.generator = torch.Generator().manual_seed(seed)
        many, hidden, inner, shared = shape.experts, shape.hidden, shape.inner, shape.shared
        clamped, noaux = shape.biased, shape.scoring == "sigmoid"
        self.router = Router(
            norm=Norm((self.normal(hidden) * 0.2 + 1).to(dtype), 1e-5),
            weight=self.matrix(many, hidden),
            bias=self.normal(many) if clamped else None,
            correction=self.normal(many) * 0.2 if noaux else None,
            scoring=shape.scoring,
            top_k=shape.top_k,
            groups=shape.groups,
            top_groups=shape.top_groups,
            normalize=shape.normalize,
            scale=shape.scale,
        )
        self.experts = Experts(
            gate_up=self.matrix(many, 2 * inner, hidden, scale=4.0 if clamped else 1.0),
            gate_up_bias=self.normal(many, 2 * inner) if clamped else None,
            down=self.matrix(many, hidden, inner),
            down_bias=self.normal(many, hidden) if clamped else None,
            activation="clamped" if clamped else "silu",
            shared_gate_up=self.matrix(2 * shared, hidden) if shared else None,
            shared_down=self.matrix(hidden, shared) if shared else None,
        )

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def matrix(self, *shape, scale=1.0):
        return QTensor.plain((self.normal(*shape) * scale * shape[-1] ** -0.5).to(self.dtype))

    def hidden(self, count):
        return self.normal(count, self.shape.hidden).to(self.dtype)

    def run(self, ops, hidden, rows):
        """Routed, active and the sum of the rows, by the ops; padding of `rows` is cut off."""
        padded = rows.padded(ops.row_block)
        x = torch.nn.functional.pad(hidden, (0, 0, 0, len(padded.positions) - len(hidden)))
        routed = ops.route(x, self.router, padded)
        active = ops.expert_gate_up(routed, self.experts)
        total = ops.expert_down(active, routed, self.experts, x.clone())
        return tuple(part[: len(hidden)] for part in (*routed, active.experts, total))

    def run_by(self, module, hidden):
        """The same of whole live rows by a module, which may be a mutant of the definition."""
        routed = module.route(normed(hidden, self.router.norm), self.router, steps([0] * len(hidden)))
        active = module.gate_up(routed, self.experts)
        return routed, active, module.down(active, routed, self.experts, hidden.clone())

    def with_ties(self):
        """The same whose router's logits are 1, 1, 1, 0, 0, 0, 0, 0, … for every row."""
        many = self.shape.experts
        logits = torch.tensor([1.0] * 3 + [0.0] * (many - 3))
        weight = QTensor.plain(torch.zeros(many, self.shape.hidden, dtype=self.dtype))
        correction = None if self.router.correction is None else torch.zeros(many)
        tied = Mixture(self.shape, self.dtype, 0)
        tied.router = replace(self.router, weight=weight, bias=logits, correction=correction)
        return tied


def steps(sequences, chunk=-1):
    """Rows of sequences, −1: padding."""
    sequences = torch.tensor(sequences)
    none = torch.full_like(sequences, -1)
    tables = torch.zeros(1, 1, dtype=torch.int32)
    return Rows(torch.zeros_like(sequences), sequences, none, (Cells(none, tables),), chunk=chunk)


def expected_choice(logits, router):
    """Experts and weights of one row, by the rule of `Router`."""
    every = range(len(logits))
    if router.scoring == "softmax":
        scores = logits.softmax(0)
    elif router.scoring == "topk_softmax":
        scores = logits
    else:
        scores = logits.sigmoid()
    chosen = scores if router.correction is None else scores + router.correction.double()
    size = len(logits) // router.groups
    worth = [sum(sorted(chosen[g * size : (g + 1) * size].tolist())[-2:]) for g in range(router.groups)]
    groups = sorted(range(router.groups), key=lambda group: (-worth[group], group))[: router.top_groups]
    open_ = [expert for expert in every if expert // size in groups]
    best = sorted(open_, key=lambda expert: (-float(chosen[expert]), expert))[: router.top_k]
    weights = scores[best].softmax(0) if router.scoring == "topk_softmax" else scores[best]
    if router.normalize:
        weights = weights / (weights.sum() + 1e-20)
    return best, weights * router.scale


def expected_active(x, weight, bias, activation):
    gate, up = (weight.double() @ x.double() + (0 if bias is None else bias.double())).chunk(2)
    if activation == "silu":
        return gate * gate.sigmoid() * up
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate * (1.702 * gate).sigmoid() * (up + 1)


def check(mixture, hidden, module=definition):
    """All that a module makes of rows, against loops over rows and experts in float64."""
    routed, active, total = mixture.run_by(module, hidden)
    router, experts = mixture.router, mixture.experts
    ulp = {torch.float32: 2e-6, torch.bfloat16: 2**-8}[mixture.dtype]
    for row in range(len(hidden)):
        logits = router.weight.dequantize().double() @ routed.x[row].double()
        best, weights = expected_choice(logits if router.bias is None else logits + router.bias.double(), router)
        assert routed.experts[row].tolist() == best
        near(routed.weights[row], weights, 1e-5)
        out = hidden[row].double()
        for place, expert in enumerate(best):
            bias = None if experts.gate_up_bias is None else experts.gate_up_bias[expert]
            made = expected_active(routed.x[row], experts.gate_up.data[expert], bias, experts.activation)
            near(active.experts[row, place], made, ulp)
            part = experts.down.data[expert].double() @ active.experts[row, place].double()
            if experts.down_bias is not None:
                part += experts.down_bias[expert].double()
            out = out + float(weights[place]) * part
        if experts.shared_down is not None:
            made = expected_active(routed.x[row], experts.shared_gate_up.data, None, "silu")
            near(active.shared[row], made, ulp)
            out = out + experts.shared_down.data.double() @ active.shared[row].double()
        near(total[row], out, ulp)


def near(found, wanted, ulp):
    """Numbers agree to one rounding, small ones to that of the vector."""
    bound = ulp * (wanted.abs() + wanted.square().mean().sqrt() * (1 if ulp < 1e-3 else 0.01))
    off = (found.double() - wanted).abs() - bound
    assert math.isfinite(float(off.sum()))
    assert float(off.max()) <= 0, (float(off.max()), ulp)

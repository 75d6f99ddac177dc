"""Mixtures of experts in the reference: the rules, the bits of a row in any company, and bugs that must be found."""

import math
import random

import pytest
import torch
from blocks import DTYPES, same_bits
from mixtures import SHAPES, Mixture, check, steps
from mutants import mutant

from fwd.kernels import experts as definition
from fwd.kernels.ops import Active, Experts, Routed
from fwd.kernels.qtensor import QTensor
from fwd.kernels.reference import Reference

CHUNK = 48
BUGS = {
    "softmax of all, not of the best": (
        "best, experts = _best(logits, router.top_k)\n            return best.softmax(dim=-1), experts",
        "return _best(logits.softmax(dim=-1), router.top_k)",
    ),
    "softmax of the best, not of all": (
        "return _best(logits.softmax(dim=-1), router.top_k)",
        "return (lambda best: (best[0].softmax(-1), best[1]))(_best(logits, router.top_k))",
    ),
    "bias of the router forgotten": ("logits.add_(router.bias)", "pass"),
    "correction in the weights": ("scores.gather(1, experts)", "chosen.gather(1, experts)"),
    "correction forgotten": ("else scores + router.correction", "else scores"),
    "groups forgotten": ("if router.top_groups == router.groups:", "if True:"),
    "a group is worth its best": ("two[..., :2]", "two[..., :1]"),
    "weights not normalised": ("if router.normalize:", "if False:"),
    "weights not scaled": ("weights * router.scale", "weights"),
    "gate and up swapped": ("gate, up = wide.chunk(2, dim=1)", "up, gate = wide.chunk(2, dim=1)"),
    "gate clamped below": ("gate.clamp_(max=LIMIT)", "gate.clamp_(min=-LIMIT)"),
    "gate clamped on both sides": ("gate.clamp_(max=LIMIT)", "gate.clamp_(-LIMIT, LIMIT)"),
    "up clamped above only": ("up.clamp_(-LIMIT, LIMIT)", "up.clamp_(max=LIMIT)"),
    "up + 1 forgotten": (".add_(1))", ")"),
    "steepness forgotten": ("(wide * ALPHA)", "(wide * 1)"),
    "bias of gate and up forgotten": ("wide.add_(experts.gate_up_bias[expert])", "pass"),
    "bias after the weight": (
        "+= experts.down_bias[expert]",
        "+= experts.down_bias[expert] / routed.weights.flatten()[visits].unsqueeze(1)",
    ),
    "shared expert forgotten": ("parts.append(product(active.shared, experts.shared_down))", "pass"),
    "residual forgotten": ("_sum([*parts, residual.float()])", "_sum(parts)"),
    "rounded before the residual": (
        "_sum([*parts, residual.float()]).to(residual.dtype)",
        "residual + _sum(parts).to(residual.dtype)",
    ),
    "experts of another row": ("visits // top_k", "visits % len(x)"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experts_follow_their_rules(shape, dtype):
    mixture = Mixture(shape, dtype, seed=1)
    for count in (4, 16, 20):
        check(mixture, mixture.hidden(count))


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(bug):
    broken = mutant(definition, *BUGS[bug])
    found = 0
    for shape in SHAPES[:7]:
        for dtype in DTYPES:
            mixture = Mixture(shape, dtype, seed=1)
            try:
                check(mixture, mixture.hidden(16), broken)
            except AssertionError:
                found += 1
    assert found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_in_any_company(shape, dtype):
    mixture, chance, ops = Mixture(shape, dtype, seed=2), random.Random(3), Reference()
    hidden = mixture.hidden(16)
    hidden[8:] = hidden[7] + hidden[8:] * 0.1  # many rows of one expert
    alone = [mixture.run(ops, hidden[i : i + 1], steps([0])) for i in range(16)]
    for count in (2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 16):
        order = chance.sample(range(16), count)
        live = [chance.random() < 0.8 for _ in order]
        given = hidden[order]
        given[[row for row in range(count) if not live[row]]] = math.nan
        together = mixture.run(ops, given, steps([0 if on else -1 for on in live]))
        for row, index in enumerate(order):
            if live[row]:
                for mine, other in zip(together, alone[index], strict=True):
                    assert same_bits(mine[row : row + 1].float(), other.float()), (count, row, index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_of_a_chunk_has_the_same_bits_wherever_the_prefill_began(shape, dtype):
    mixture, ops = Mixture(shape, dtype, seed=4), Reference()
    hidden = mixture.hidden(CHUNK)
    hidden[20:] = hidden[19] + hidden[20:] * 0.1
    whole = mixture.run(ops, hidden, steps([0] * CHUNK, chunk=1))
    for first, last in ((1, CHUNK), (17, CHUNK), (CHUNK - 1, CHUNK), (0, 33), (5, 6)):
        given = hidden.clone()
        given[:first] = given[last:] = math.nan
        part = mixture.run(ops, given, steps([0 if first <= row < last else -1 for row in range(CHUNK)], chunk=1))
        for mine, other in zip(part, whole, strict=True):
            assert same_bits(mine[first:last].float(), other[first:last].float()), (first, last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4], SHAPES[5]], ids=str)
def test_a_row_of_nan_disturbs_no_other_row(shape, dtype):
    mixture, ops = Mixture(shape, dtype, seed=7), Reference()
    hidden = mixture.hidden(8)
    healthy = mixture.run(ops, hidden, steps([0] * 8))
    hidden[3, 5], hidden[6, 0] = math.nan, math.inf
    ill = mixture.run(ops, hidden, steps([0] * 8))
    for mine, other in zip(ill, healthy, strict=True):
        assert same_bits(mine[[0, 1, 2, 4, 5, 7]].float(), other[[0, 1, 2, 4, 5, 7]].float())
    assert not ill[-1][[3, 6]].isfinite().any()


def test_padding_rows_go_nowhere():
    mixture, ops = Mixture(SHAPES[0], torch.float32, seed=5), Reference()
    for chunk, count in ((-1, 16), (0, CHUNK)):
        sequences = [0 if row % 3 else -1 for row in range(count)]
        experts = mixture.run(ops, mixture.hidden(count), steps(sequences, chunk))[1]
        assert (experts[::3] == -1).all()
        assert (experts.min(1).values >= 0).sum() == count - len(range(0, count, 3))
    nothing = mixture.run(ops, mixture.hidden(4), steps([-1] * 4))
    assert (nothing[1] == -1).all()


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[7]], ids=str)
def test_of_equal_experts_the_first_are_chosen(shape):
    mixture = Mixture(shape, torch.float32, seed=6).with_ties()
    hidden = mixture.hidden(8)
    experts, _, _ = chosen(definition, mixture, hidden)
    assert experts == [list(range(shape.top_k))] * 8
    last = mutant(
        definition,
        "ranked, places = scores.sort(dim=-1, descending=True, stable=True)",
        "ranked, places = (found.flip(1) for found in scores.sort(dim=-1, stable=True))",
    )
    assert chosen(last, mixture, hidden)[0] != experts


def test_of_equal_groups_the_first_are_chosen():
    mixture = Mixture(SHAPES[5], torch.float32, seed=6).with_ties()
    mixture.router.bias.fill_(0.5)
    experts, weights, _ = chosen(definition, mixture, mixture.hidden(4))
    assert experts == [[0, 1, 2, 3]] * 4
    assert weights == [[2.5 / 4] * 4] * 4


def chosen(module, mixture, hidden):
    routed, _, total = mixture.run_by(module, hidden)
    return routed.experts.tolist(), routed.weights.tolist(), total


def summed(module, orders, *, shared, residual):
    """Sums of experts that give 1e8, 1 and −1e8 in orders of their own, then `shared`, then `residual`."""
    gives, apart = torch.zeros(3, 16, 16), torch.zeros(16, 16)
    gives[:, 0, 0], apart[0, 0] = torch.tensor([1e8, 1.0, -1e8]), 1.0
    down, alone = QTensor.plain(gives), QTensor.plain(apart)
    experts = Experts(down, None, down, None, "silu", alone, alone)
    one, count = torch.zeros(len(orders), 3, 16), len(orders)
    one[:, :, 0] = 1.0
    routed = Routed(torch.zeros(count, 16), torch.tensor(orders, dtype=torch.int32), torch.ones(count, 3))
    active = Active(one, one[:, 0] * shared)
    return module.down(active, routed, experts, torch.full((count, 16), residual))[:, 0].tolist()


def test_a_row_is_summed_in_its_own_order_then_the_shared_expert_then_the_residual():
    orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [2, 0, 1]]
    assert summed(definition, orders, shared=0.0, residual=0.0) == [0.0, 1.0, 0.0, 1.0]
    two = [[0, 0, 0]] * 4  # 3e8, then −3e8, then 1
    assert summed(definition, two, shared=-3e8, residual=1.0) == [1.0] * 4
    by_number = mutant(definition, "np.argsort(flat", "np.argsort(np.sort(flat.reshape(-1, 3)).ravel()")
    backwards = mutant(definition, "reduce(torch.add, parts)", "reduce(torch.add, list(parts)[::-1])")
    for broken in (by_number, backwards):
        assert summed(broken, orders, shared=0.0, residual=0.0) != [0.0, 1.0, 0.0, 1.0]
    early = mutant(definition, "_sum([*parts, residual.float()])", "_sum([*parts[:-1], residual.float(), parts[-1]])")
    assert summed(early, two, shared=-3e8, residual=1.0) != [1.0] * 4

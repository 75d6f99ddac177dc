"""Bugs planted in the kernels of mixtures of experts are found by what finds real ones."""

import pytest
import torch
from agreement import difference
from expert_mixtures import Given, Packed, expected, mixture, summed, table, table_of
from mixtures import Shape, steps

from fwd.errors import KernelError
from fwd.kernels import expert_kernels as kernels
from fwd.kernels.ops import Active, Routed

OSS = Shape(264, 40, 5, 136, "topk_softmax", biased=True)
LONG = Shape(1096, 6, 2, 24, "topk_softmax", biased=True)  # inputs of more than one turn
DEEPSEEK = Shape(264, 24, 4, 136, "sigmoid", normalize=True, groups=6, top_groups=2, shared=72, scale=2.5)
ROWS = 14
LIVE = [0, -1] + [0] * 12
ALIVE = torch.tensor(LIVE) == 0


def alike(given):
    """Rows of a mixture of which more than eight are much the same."""
    hidden = given.hidden(ROWS)
    hidden[3:12] = hidden[3] + hidden[3:12] * 0.05
    return hidden


def route_error(execution, shape):
    """How far weights are from the truth, of a random router and of equals; 1 where experts or table are others."""
    given = mixture(shape)
    tied = given.with_ties()
    return max(
        routed_apart(execution, each, alike(given)) for each in (given, Given(shape, tied.router, given.experts))
    )


def routed_apart(execution, given, hidden):
    def run(launcher):
        ops = Packed(launcher, given)
        routed = kernels.route(launcher, ops.space, hidden, ops.router, steps(LIVE))
        assert not ops.space.counters.any(), "counters are left as they were found"
        return *routed, table(ops.space, ROWS * given.shape.top_k)

    _, experts, weights, items = execution.everywhere(run)
    wanted = expected(given, hidden, LIVE)
    if not torch.equal(experts, wanted[1]) or items != table_of(experts, kernels.ITEM):
        return 1.0
    return difference(weights[ALIVE], wanted[2][ALIVE])


def gate_up_error(execution, shape, form="bf16"):
    given = mixture(shape, form, form)
    hidden = alike(given)

    def run(launcher):
        ops = Packed(launcher, given)
        routed = kernels.route(launcher, ops.space, hidden, ops.router, steps(LIVE))
        active = kernels.expert_gate_up(launcher, ops.space, routed, ops.experts)
        return [each[ALIVE] for each in active if each is not None]

    wanted = [each[ALIVE] for each in expected(given, hidden, LIVE)[3:-1]]
    return max(difference(*pair) for pair in zip(execution.everywhere(run), wanted, strict=True))


def down_error(execution, shape, form="bf16", shared=None):
    """How far sums are from the truth, of what the reference makes before them; 1 where they are in another order."""
    given = mixture(shape, form, shared or form)
    hidden = alike(given)
    x, experts, weights, *active, total = expected(given, hidden, LIVE)
    made = Active(active[0], active[1] if shape.shared else None)

    def run(launcher):
        ops = Packed(launcher, given)
        kernels.route(launcher, ops.space, hidden, ops.router, steps(LIVE))
        routed = Routed(x, experts, weights)
        return kernels.expert_down(launcher, ops.space, made, routed, ops.experts, residual=hidden.clone())

    found, orders = execution.everywhere(run), [[0, 1, 2], [0, 2, 1], [1, 0, 2], [2, 0, 1]]
    if form == "bf16" and summed(execution.launcher, orders, shared=0.0, residual=0.0) != [0.0, 1.0, 0.0, 1.0]:
        return 1.0
    return difference((found - hidden)[ALIVE], (total - hidden)[ALIVE])


ROUTE = {
    "a choice before the last tile": (
        OSS,
        "last_arriver(counters + blockIdx.y, gridDim.x)",
        "last_arriver(counters + blockIdx.y, gridDim.x - 1)",
    ),
    "of equals the last": (OSS, "if (keys[j] > most)", "if (keys[j] >= most)"),
    "an expert chosen twice": (OSS, "== first) keys[j] = 0, ", "== first) "),
    "bias of the router forgotten": (OSS, "logits[expert] + (bias ? bias[expert] : 0.0f)", "logits[expert]"),
    "softmax of all, not of the best": (
        OSS,
        "if (rule.scoring == kSoftmax) softmax();",
        "if (rule.scoring != kSigmoid) softmax();",
    ),
    "a padding row routed": (OSS, "live ? expert : -1", "expert"),
    "more rows than an item has": (OSS, "if (count % limit == 0) items", "if (count == 0) items"),
    "visits counted from the last": (
        OSS,
        "order[position] = visit, rows",
        "order[position] = visits - 1 - visit, rows",
    ),
    "correction in the weights": (DEEPSEEK, "keys[j] = 0, found = scores[j]", "keys[j] = 0, found = worth[j]"),
    "a group is worth its best": (DEEPSEEK, "size > 1 ? best + second : best", "best"),
    "of groups one too many": (DEEPSEEK, "ballot(above < rule.top_groups)", "ballot(above <= rule.top_groups)"),
    "weights not normalised": (DEEPSEEK, "if (rule.normalize)", "if (false)"),
}
GATE_UP = {
    "the expert before": (
        "expert_stream.cuh",
        "int expert = max(work.item(item).expert, 0);",
        "int expert = max(work.item(item).expert - 1, 0);",
        "bf16",
        OSS,
    ),
    "gate and up interleaved": ("expert_work.cuh", "apart(halves ? outputs / 16 : 1)", "apart(1)", "bf16", OSS),
    "gate and up exchanged": ("expert_bodies.cuh", "activated(gate, up, own", "activated(up, gate, own", "bf16", OSS),
    "up + 1 forgotten": ("expert_bodies.cuh", "* (up + 1.0f)", "* up", "bf16", OSS),
    "gate clamped below": (
        "expert_bodies.cuh",
        "gate = gate > kLimit ? kLimit : gate;",
        "gate = gate < -kLimit ? -kLimit : gate;",
        "bf16",
        OSS,
    ),
    "the shared expert clamped": ("expert_bodies.cuh", "up, own && clamped)", "up, true)", "bf16", DEEPSEEK),
    "the bias of the first expert": (
        "experts.cuh",
        "stack.bias + expert * stack.outputs + output",
        "stack.bias + output",
        "bf16",
        OSS,
    ),
    "rows by place in the union": ("experts.cuh", "work.table.row(position) :", "position / 5 :", "bf16", OSS),
    "both teams in one place": ("expert_work.cuh", ": team_index() * kRows;", ": 0;", "bf16", OSS),
    "no barrier before sums are added": (
        "experts.cuh",
        "cp_async_wait<0>();\n        block_barrier();",
        "cp_async_wait<0>();",
        "bf16",
        OSS,
    ),
    "nobody waits for biases": ("experts.cuh", "cp_async_wait<0>();\n", "", "bf16", OSS),
    "blocks past the last": (
        "experts.cuh",
        "if (step < steps.own) multiply",
        "if (step <= steps.own) multiply",
        "bf16",
        OSS,
    ),
    "rows of the first turn": ("experts.cuh", ", rows.move(kDepth * kSubs)", "", "bf16", LONG),
    "weights of the first turn": ("expert_stream.cuh", "next[which] += kDepth * kStep;", "", "bf16", LONG),
    "the neighbour's scale": ("quant.cuh", "512 + group_row() * 4", "512 + (group_row() ^ 1) * 4", "mxfp4", OSS),
    "the factors of the first expert": (
        "experts.cuh",
        "int64_t group = expert * stack.groups + ",
        "int64_t group = ",
        "nvfp4",
        OSS,
    ),
}
DOWN = {
    "bias after the weight": (
        "expert_bodies.cuh",
        "sum += __fmul_rn(choices.weights[visit], value);",
        "float b = parts.early[choices.items[visit] * kEarly + m()]; sum += choices.weights[visit] * (value - b) + b;",
        OSS,
    ),
    "the sums of the visit at this place": ("expert_bodies.cuh", "(choices.positions[visit],", "(visit,", OSS),
    "backwards": (
        "expert_bodies.cuh",
        "for (int visit = row() * top_k; visit < (row() + 1) * top_k && routed; ++visit) {",
        "for (int visit = (row() + 1) * top_k - 1; visit >= row() * top_k && routed; --visit) {",
        OSS,
    ),
    "an item from the start of a turn": ("expert_stream.cuh", "() - from * kMembers;", "();", OSS),
    "its rows from there": (
        "experts.cuh",
        "member_index() * Format::kSub - from * kSubs",
        "member_index() * Format::kSub",
        OSS,
    ),
    "no barrier before the next tile": ("experts.cuh", "if (kTurns == 1) block_barrier();", "", OSS),
    "the residual of the first tile": (
        "expert_bodies.cuh",
        "to_float(residual[place(unit)])",
        "to_float(residual[place({})])",
        OSS,
    ),
    "shared expert forgotten": ("expert_bodies.cuh", "if (work.shared_items) sum +=", "if (false) sum +=", DEEPSEEK),
    "visits where the shared expert's stand": (
        "expert_work.cuh",
        "shared_items == 0 ? 0 : rows) :",
        "shared_items == 0 ? 0 : 0) :",
        DEEPSEEK,
    ),
}


@pytest.mark.parametrize("shape", [OSS, LONG, DEEPSEEK], ids=str)
def test_without_a_planted_bug_nothing_is_found(execution, shape):
    assert route_error(execution, shape) < 1e-9
    for form in ("bf16", "mxfp4", "nvfp4"):
        assert gate_up_error(execution, shape, form) < 1e-5
        assert down_error(execution, shape, form) < 1e-4
    assert down_error(execution, DEEPSEEK, "bf16", "mxfp4") < 1e-4


@pytest.mark.parametrize("bug", ROUTE)
def test_a_bug_of_the_router_is_found(execution, bug):
    shape, old, new = ROUTE[bug]
    assert seen(lambda: route_error(execution.mutated("route.cu", old, new), shape), 1e-6)


@pytest.mark.parametrize("bug", GATE_UP)
def test_a_bug_of_gate_and_up_is_found(execution, bug):
    source, old, new, form, shape = GATE_UP[bug]
    mutated = execution.mutated(source, old, new).mutated(f"experts_{form}.cu", "FWD_EXPERT_DOWN(", "// ")
    assert seen(lambda: gate_up_error(mutated, shape, form))


@pytest.mark.parametrize("bug", DOWN)
def test_a_bug_of_down_is_found(execution, bug):
    source, old, new, shape = DOWN[bug]
    mutated = execution.mutated(source, old, new).mutated("experts_bf16.cu", "FWD_EXPERT_GATE_UP(", "// ")
    assert seen(lambda: down_error(mutated, shape))


def test_a_shared_expert_of_another_format_forgotten_is_found(execution):
    mutated = execution.mutated("expert_bodies.cuh", "if (beside) sum += beside[place(unit)];", "")
    assert seen(lambda: down_error(mutated, DEEPSEEK, "bf16", "mxfp4"))


def seen(error, bound=1e-3):
    try:
        return error() > bound
    except AssertionError as found:  # `everywhere` found that it depends on the order, or on what was in memory
        if not str(found).startswith(("result", "counters")):
            raise
        return True
    except KernelError as found:  # the host found a copy that nobody waited for, or an address that is none
        if "does not compile" in str(found):
            raise
        return True


WAITS = {
    "route": ("route.cu", "    grid_dependency_wait();\n    staging.stage();"),
    "gate_up": ("expert_bodies.cuh", "stream(work);\n    grid_dependency_wait();\n    work.open();\n    float* memory"),
    "down": ("expert_bodies.cuh", "stream(work);\n    grid_dependency_wait();\n    work.open();\n    int visits"),
}


@pytest.mark.parametrize("op", WAITS)
def test_a_kernel_that_does_not_wait_for_the_one_before_is_found(execution, op):
    source, wait = WAITS[op]
    early, given = execution.mutant(source, wait, wait.replace("    grid_dependency_wait();\n", "")), mixture(OSS)
    hidden, ops = given.hidden(3), Packed(execution.launcher, given)
    routed = kernels.route(ops.launcher, ops.space, hidden, ops.router, steps([0] * 3))
    active = kernels.expert_gate_up(ops.launcher, ops.space, routed, ops.experts)
    calls = {
        "route": lambda: kernels.route(early, ops.space, hidden, ops.router, steps([0] * 3)),
        "gate_up": lambda: kernels.expert_gate_up(early, ops.space, routed, ops.experts),
        "down": lambda: kernels.expert_down(early, ops.space, active, routed, ops.experts, residual=hidden),
    }
    with pytest.raises(KernelError, match="grid_dependency_wait"):
        calls[op]()


def test_the_sanitizers_find_nothing(sanitized):
    done = sanitized(
        """
        from expert_mixtures import Packed, mixture
        from fwd.kernels.host import HostLauncher
        from test_expert_bugs import DEEPSEEK, LIVE, ROWS, alike

        given = mixture(DEEPSEEK, "mxfp4", "mxfp4")
        launcher = HostLauncher(1, sanitize=True, optimization=1)
        Packed(launcher, given).run(alike(given), LIVE)
        Packed(launcher, given, 40).run(given.hidden(40), chunk=0)
        """
    )
    assert done.returncode == 0, done.stderr[-3000:]

"""Layers of experts whose launches overlap, in one workspace: what is of another kernel is read after the wait."""

import pytest
from agreement import same_bits
from execution import Execution
from expert_mixtures import Packed, mixture
from mixtures import Shape, steps

from fwd.kernels import expert_kernels as kernels
from fwd.kernels.host import HostLauncher

ROWS, CHUNK, STEPS = 11, 40, 3
# experts and shared expert of two layers: of one format, and of two
LAYERS = [("mxfp4", "mxfp4"), ("bf16", "nvfp4")]
SHAPE = Shape(256, 20, 4, 128, "sigmoid", normalize=True, groups=4, top_groups=2, shared=128)


def layers(launcher, rows, chunk):
    """What some steps of both layers leave after each layer."""
    packed = [Packed(launcher, mixture(SHAPE, *formats, seed=seed), rows) for seed, formats in enumerate(LAYERS)]
    space, found = packed[0].space, []
    hidden = mixture(SHAPE).hidden(rows)
    live = steps([0 if row % 5 else -1 for row in range(rows)], chunk)
    for _ in range(STEPS):
        for ops in packed:
            routed = kernels.route(launcher, space, hidden, ops.router, live)
            active = kernels.expert_gate_up(launcher, space, routed, ops.experts)
            hidden = kernels.expert_down(launcher, space, active, routed, ops.experts, residual=hidden)
            found.append(hidden.clone())
    return found


def same_everywhere(rows, chunk, folder=None):
    plain = layers(HostLauncher(folder=folder), rows, chunk)
    assert all(step.isfinite().all() for step in plain)
    return all(
        all(map(same_bits, plain, layers(HostLauncher(seed, poison, dependent=True, folder=folder), rows, chunk)))
        for seed, poison in ((1, 0xFF), (2, 0x3F))
    )


@pytest.mark.parametrize(("rows", "chunk"), [(1, -1), (ROWS, -1), (CHUNK, 0)])
def test_launches_that_overlap_give_the_same_bits(rows, chunk):
    assert same_everywhere(rows, chunk)


def test_one_that_reads_too_early_is_seen(tmp_path):
    """The table is there only behind the wait; of weights only the shared expert's are taken before it."""
    wait, count = "    grid_dependency_wait();\n", "    work.open();\n"
    old = f"{wait}{count}    int visits"
    early = Execution("host", tmp_path).mutated("expert_bodies.cuh", old, f"{count}{wait}    int visits")
    assert not same_everywhere(ROWS, -1, early.folder)


def test_weights_of_the_shared_expert_are_taken_before_the_wait(tmp_path):
    """A first turn that ends within the shared expert's item goes on with the first expert's behind the wait."""
    old = "        aim(work, 0);\n        there = 0;\n        fill(work);"
    late = Execution("host", tmp_path).mutated("expert_stream.cuh", old, "        there = 0, steps.none();")
    found, wanted = (layers(HostLauncher(folder=each), 3, -1) for each in (late.folder, None))
    assert all(map(same_bits, found, wanted)), "it is the same, later"
    lost = Execution("host", tmp_path).mutated("expert_stream.cuh", "            unit = work.unit(index);\n", "")
    assert not all(map(same_bits, layers(HostLauncher(folder=lost.folder), 3, -1), wanted))

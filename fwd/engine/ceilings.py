"""How fast a device's memory lets a plan go, at most. No torch here."""

from typing import NamedTuple

from fwd.engine.plan import Plan

STEP_ROWS = (1, 2, 4, 8)  # of which ceilings are given


class Ceiling(NamedTuple):
    """What a decode step of `rows` sequences cannot be faster than."""

    rows: int
    bytes: int
    ms: float
    tokens_per_s: float


def ceilings(plan: Plan, bandwidth: float) -> list[Ceiling]:
    """The bytes a step must read at the plan's context over `bandwidth` (bytes a second), for some numbers of rows."""
    sizes = [(rows, plan.spec.step_bytes(rows, plan.context, plan.kv)) for rows in STEP_ROWS]
    return [Ceiling(rows, size, size / bandwidth * 1e3, rows * bandwidth / size) for rows, size in sizes]

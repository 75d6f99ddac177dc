"""The interface behind every cache layout: reserve, commit a part, roll back, release; and what a step writes."""

import numpy as np
import pytest
from mock_engine import CHUNK, PAGE, submit
from mock_runner import FULL, STATE, sliding

from fwd.engine.request import Request
from fwd.engine.space import Space
from fwd.engine.step import Table

GROUPS = {
    "full": ((FULL,), (40,)),
    "sliding": ((sliding(6),), (20,)),
    "state": ((STATE,), (40,)),
    "all": ((FULL, sliding(6), STATE), (40, 20, 40)),
}


def placed(groups, units, prompt, known=0):
    space = Space(groups, units, PAGE, chunk=CHUNK, key=b"")
    request = Request(submit(1, [5] * prompt, 200))
    assert space.admit(request, prompt + 1)
    for end in [*range(CHUNK, prompt, CHUNK), prompt]:
        assert space.prepare(request, end)
        space.commit(request, end)
    request.append([7] * (1 + known))
    return space, request


@pytest.mark.parametrize("layout", GROUPS)
@pytest.mark.parametrize("accepted", [1, 2, 5])
@pytest.mark.parametrize("prompt", [5, 8, 23])
def test_rows_that_are_not_accepted_leave_nothing(layout, accepted, prompt):
    space, request = placed(*GROUPS[layout], prompt)
    assert space.spare(request, 4) == 4
    assert space.prepare(request, prompt + 5)
    staged = list(request.staged)
    request.append([7] * accepted)
    space.commit(request, prompt + accepted)
    kept = space.pages_for(request.length + 1)
    more = any(len(table) > kept for table in request.tables)
    assert space.rollback(request) == more
    space.check()

    assert request.computed == prompt + accepted
    assert all(space.pages_for(request.computed) <= len(table) <= kept for table in request.tables)
    assert not space.rollback(request)
    if staged:
        assert request.record == staged[accepted - 1]
        assert space.pools[-1].total - space.pools[-1].free == 1
    space.release(request)
    assert all(pool.free == pool.total for pool in space.pools)


@pytest.mark.parametrize("window", [1, 5, 6, 13])
def test_pages_behind_the_window_are_given_back(window):
    space, request = placed((FULL, sliding(window)), (200, 20), 100)
    for _ in range(40):
        assert space.prepare(request, request.computed + 1)
        first = max(0, request.computed - window + 1) // PAGE
        assert request.tables[1].behind == first
        assert space.pools[1].total - space.pools[1].free == space.pages_for(request.computed + 1) - first
        space.commit(request, request.computed + 1)
        request.append([7])
    assert request.tables[0].behind == 0


def test_a_request_that_does_not_fit_changes_nothing():
    space, _ = placed((FULL,), (10,), 20)
    free = space.main.free
    other = Request(submit(2, [9] * 30))

    assert not space.admit(other, 31)
    assert not other.placed
    assert space.main.free == free


def test_a_step_writes_only_what_is_new_of_a_block_table():
    """One entry a page, whatever the context; a line that another request had is written whole."""
    space, request = placed((FULL,), (4000,), 8000)
    device = Table(2, 4000)
    device.write(0, request.tables[0])
    written = []
    device.lines = type("Spy", (), {"__setitem__": lambda _, key, value: written.append((key, len(value)))})()
    for _ in range(3 * PAGE):
        space.prepare(request, request.computed + 1)
        device.write(0, request.tables[0])
        space.commit(request, request.computed + 1)
        request.append([7])

    assert [count for _, count in written] == [1, 1]  # the first page was reserved at admission


def test_a_device_table_follows_every_change():
    space, request = placed((FULL,), (4000,), 50)
    device = Table(1, 4000)
    for action in ("cut", "grow", "replace", "grow"):
        match action:
            case "cut":
                request.tables[0].pages.extend([1, 2, 3])
                device.write(0, request.tables[0])
                list(request.tables[0].cut(10))
            case "grow":
                request.tables[0].pages.extend([50, 51, 52, 53])
            case "replace":
                request.tables[0].replace(3, 99)
        device.write(0, request.tables[0])
        pages = request.tables[0].pages
        assert np.array_equal(device.lines[0, : len(pages)], pages)
    assert space.main.total == 4000

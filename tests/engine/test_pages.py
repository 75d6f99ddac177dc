"""Units are neither lost nor given twice, whatever is taken, shared, kept and let go; block tables know their pages."""

from hypothesis import given
from hypothesis import strategies as st

from fwd.engine.pages import BlockTable, Pool

ACTIONS = st.tuples(
    st.sampled_from(["take", "share", "drop", "keep", "forget", "pin"]), st.integers(0, 30), st.booleans()
)


class Owner:
    def __init__(self):
        self.pinned = self.resumed = False


@given(total=st.integers(1, 8), actions=st.lists(ACTIONS, max_size=80))
def test_free_held_and_cached_are_all_units(total, actions):
    pool, holders, owners = Pool(total), [], {}
    for action, index, flag in actions:
        held = holders[index % len(holders)] if holders else None
        kept = list(owners)[index % len(owners)] if owners else None
        if action == "take" and pool.free:
            holders.append(pool.take())
        elif action == "share" and (kept is not None or held is not None):
            holders.append(pool.share(held if flag and held is not None else kept if kept is not None else held))
        elif action == "drop" and held is not None:
            holders.remove(held)
            pool.drop(held, behind=flag)
        elif action == "keep" and held is not None and held not in owners:
            owners[held] = Owner()
            pool.keep(held, owners[held])
        elif action == "forget" and kept is not None:
            pool.forget(kept)
            del owners[kept]
        elif action == "pin" and kept is not None and owners[kept].pinned != flag:
            owners[kept].pinned = flag
            pool.move(kept, pinned=flag)
        pool.check()
        assert pool.cached == len(set(owners) - set(holders))
        assert pool.free == total - len(set(owners) | set(holders))
        assert all(pool.is_shared(unit) == (holders.count(unit) + (unit in owners) > 1) for unit in set(holders))


def kept(pool, count):
    """Units that only the tree holds, let go in the order they were taken."""
    owners = [Owner() for _ in range(count)]
    units = [pool.take() for _ in range(count)]
    for unit, owner in zip(units, owners, strict=True):
        pool.keep(unit, owner)
    return units, owners


def oldest_first(pool, units, owners):
    order = []
    while owner := pool.oldest():
        unit = units[owners.index(owner)]
        order.append(unit)
        pool.forget(unit)
    return order


def test_the_unit_let_go_first_is_taken_back_first_and_pinned_ones_last():
    pool = Pool(4)
    units, owners = kept(pool, 4)
    for unit in units:
        pool.drop(unit)
    owners[0].pinned = True
    pool.move(units[0], pinned=True)
    pool.drop(pool.share(units[1]))

    assert oldest_first(pool, units, owners) == [units[2], units[3], units[1], units[0]]


def test_what_is_behind_a_window_goes_first_unless_somebody_went_on_from_it():
    pool = Pool(3)
    units, owners = kept(pool, 3)
    owners[1].resumed = True
    pool.drop(units[0])
    pool.drop(units[1], behind=True)
    pool.drop(units[2], behind=True)

    assert oldest_first(pool, units, owners) == [units[2], units[0], units[1]]


STEPS = st.lists(st.tuples(st.sampled_from(["append", "cut", "slide", "replace"]), st.integers(0, 12)), max_size=40)


@given(STEPS)
def test_a_block_table_is_a_list_whose_epoch_tells_of_changes(steps):
    table, model, seen, epoch = BlockTable(), [], [], 0
    for number, (action, at) in enumerate(steps):
        match action:
            case "append":
                table.pages.append(number)
                model.append(number)
            case "cut":
                assert list(table.cut(at)) == [page for page in reversed(model[at:]) if page >= 0]
                del model[at:]
            case "slide":
                assert list(table.slide(at)) == [page for page in model[:at] if page >= 0]
                model[:at] = [-1] * len(model[:at])
            case "replace" if at < len(model) and model[at] >= 0:
                table.replace(at, 1000 + number)
                model[at] = 1000 + number
        assert table.pages.tolist() == model
        assert table.behind == sum(page < 0 for page in model)
        if table.epoch == epoch:
            assert all(page in (-1, old) for page, old in zip(model, seen, strict=False))
            assert len(model) >= len(seen)
        seen, epoch = list(model), table.epoch

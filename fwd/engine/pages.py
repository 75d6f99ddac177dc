"""Pages and records: who holds which part of the cache. Counts only; the tensors live with the model."""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Generic, NamedTuple, Protocol, TypeVar

_epochs = count(1)


class Copy(NamedTuple):
    """Copy page `source` of a group to page `target`, in all layers of the group."""

    group: int
    source: int
    target: int


class Owner(Protocol):
    """What the prefix tree keeps a unit for."""

    resumed: bool  # requests go on from its end, or are likely to

    @property
    def pinned(self) -> bool:
        """It goes last when units lack."""


T = TypeVar("T", bound=Owner)


class Pool(Generic[T]):
    """The units (pages, or records of a state) of one group, 0 … `total` − 1, with reference counts.

    A unit is free, held (by requests, perhaps by the tree too) or cached (by the tree alone). Cached ones are taken
    back in the order in which they were let go, those of pinned owners last.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._refs = [0] * total
        self._free = list(range(total - 1, -1, -1))
        self._owners: list[T | None] = [None] * total
        self._idle: tuple[OrderedDict[int, None], OrderedDict[int, None]] = (OrderedDict(), OrderedDict())

    @property
    def free(self) -> int:
        """Units that nobody holds."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Units that only the prefix tree holds."""
        return len(self._idle[False]) + len(self._idle[True])

    @property
    def available(self) -> int:
        """Units that can be had: free ones, and cached ones once they are taken back."""
        return self.free + self.cached

    def is_shared(self, unit: int) -> bool:
        """More than one holds it."""
        return self._refs[unit] > 1

    def take(self) -> int:
        """Give out a free unit."""
        unit = self._free.pop()
        self._refs[unit] = 1
        return unit

    def share(self, unit: int) -> int:
        """Give a unit to one more request."""
        assert unit >= 0
        assert self._refs[unit] > 0, unit
        owner = self._owners[unit]
        if owner and self._refs[unit] == 1:
            del self._idle[owner.pinned][unit]
        self._refs[unit] += 1
        return unit

    def drop(self, unit: int, *, behind: bool = False) -> None:
        """A request lets go of a unit, which was left `behind` by its window or not.

        Units that were left behind in the middle of a prompt go first, lest a long prompt drive out all that is known.
        """
        self._refs[unit] -= 1
        owner = self._owners[unit]
        if self._refs[unit] == 0:
            self._free.append(unit)
        elif self._refs[unit] == 1 and owner:
            idle = self._idle[owner.pinned]
            idle[unit] = None
            if behind and not owner.resumed:
                idle.move_to_end(unit, last=False)
        assert self._refs[unit] >= 0, unit

    def keep(self, unit: int, owner: T) -> None:
        """The tree holds a unit too, which a request holds now."""
        assert self._refs[unit] > 0, unit
        assert self._owners[unit] is None, unit
        self._owners[unit] = owner
        self._refs[unit] += 1

    def forget(self, unit: int) -> None:
        """The tree lets go of a unit."""
        owner = self._owners[unit]
        assert owner, unit
        self._idle[owner.pinned].pop(unit, None)
        self._owners[unit] = None
        self.drop(unit)

    def oldest(self) -> T | None:
        """The owner of the cached unit that is taken back next."""
        for idle in self._idle:
            if idle:
                return self._owners[next(iter(idle))]
        return None

    def move(self, unit: int, *, pinned: bool) -> None:
        """The owner of a unit is pinned from now on, or no longer."""
        if unit in self._idle[not pinned]:
            del self._idle[not pinned][unit]
            self._idle[pinned][unit] = None

    def check(self) -> None:
        """Assert that free + held + cached = total and that no count is out of order; for tests."""
        kept = [owner is not None for owner in self._owners]
        cached = {unit for unit in range(self.total) if self._refs[unit] == 1 and kept[unit]}
        assert {*self._idle[False], *self._idle[True]} == cached
        assert sorted(self._free) == [unit for unit in range(self.total) if self._refs[unit] == 0]
        assert not any(kept[unit] for unit in self._free)
        held = sum(self._refs[unit] > kept[unit] for unit in range(self.total))
        assert self.free + held + self.cached == self.total


class BlockTable:
    """The pages of one request in one group; entry i holds positions i·page_size … and is −1 behind the window.

    `epoch` names a lineage: while it stays the same, entries are only appended (or fall behind the window).
    """

    def __init__(self) -> None:
        self.pages = array("i")
        self.behind = 0  # entries that are −1, all at the beginning
        self.epoch = next(_epochs)

    def __len__(self) -> int:
        return len(self.pages)

    def replace(self, index: int, page: int) -> None:
        """Put another page in the place of one."""
        self.pages[index] = page
        self.epoch = next(_epochs)

    def cut(self, length: int) -> Iterator[int]:
        """Take the entries from `length` on out; their pages, last first."""
        cut = self.pages[max(length, self.behind) :]
        if length < len(self.pages):
            del self.pages[length:]
            self.behind = min(self.behind, length)
            self.epoch = next(_epochs)
        return reversed(cut)

    def slide(self, length: int) -> Sequence[int]:
        """Take the entries before `length` out; their pages."""
        behind = self.pages[self.behind : length]
        for index in range(self.behind, min(length, len(self.pages))):
            self.pages[index] = -1
        self.behind = max(self.behind, min(length, len(self.pages)))
        return behind

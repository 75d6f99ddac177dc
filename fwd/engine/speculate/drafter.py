"""What a drafter is, and what the scheduler and the loop see of all of them together."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from fwd.engine.request import Request
from fwd.protocol.values import DrafterCounts


class Proposal(NamedTuple):
    """Ids that may follow the known ones of a request.

    `level` says how much there is to go by, 0 the least; acceptance is estimated for each drafter, level and place.
    """

    drafter: str = ""
    ids: tuple[int, ...] = ()
    level: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """What its acceptance is estimated by, beside the place."""
        return self.drafter, self.level


NOTHING = Proposal()


class Wish(NamedTuple):
    """A request that a drafter may propose `most` ≥ 1 ids for."""

    request: Request
    most: int


class Drafter(Protocol):
    """One way of guessing. What it keeps of a request it reads from its ids, which only grow, until `end`."""

    name: str

    def propose(self, wishes: Sequence[Wish]) -> list[Proposal]:
        """Return what may follow the known ids of each request, an empty proposal where there is nothing to go by."""
        ...

    def end(self, request: Request) -> None:
        """Forget a request that has ended, or that is not to be drafted for any more."""
        ...


class Costly(Drafter, Protocol):
    """A drafter that takes time, for drafts and for reading along so that it can draft."""

    def read(self) -> Sequence[int]:
        """Take the ids of the requests that it has read along since it was asked last: one for each pass."""
        ...


class Speculator(Protocol):
    """Proposes drafts for the rows that a step has to spare, and learns from what became of them."""

    def drafts(self, request: Request) -> bool:
        """Whether the request may have drafts in its next step, which then must wait for the one before it."""
        ...

    def propose(self, wishes: Sequence[Wish], rows: int) -> list[Proposal]:
        """Return drafts for requests all of whose ids but one are computed, for a step that has `rows` rows already.

        Together they take no more than `MAX_ROWS` − `rows` rows. Each request has pages for as many as it wishes for.
        """
        ...

    def settle(self, request: Request, proposal: Proposal, count: int) -> None:
        """The last `count` ids of a request were committed in a step with a proposal, of which `count` − 1 held."""
        ...

    def measured(self, rows: int, drafts: int, seconds: float) -> None:
        """A decode step of so many rows, `drafts` of them for drafts, took so long."""
        ...

    def paused(self) -> None:
        """What comes next is no decode step, so the one after it does not follow on the last at once."""
        ...

    def end(self, request: Request) -> None:
        """The request has ended."""
        ...

    def counts(self) -> list[DrafterCounts]:
        """What each drafter has done so far."""
        ...

    @property
    def corpus_tokens(self) -> int:
        """Ids of earlier answers that drafters look into."""
        ...

    def drop(self) -> int:
        """Forget them, in memory and on disk: how many there were."""
        ...


class Off:
    """No drafters."""

    def drafts(self, request: Request) -> bool:  # noqa: ARG002, D102
        return False

    def propose(self, wishes: Sequence[Wish], rows: int) -> list[Proposal]:  # noqa: ARG002, D102
        return [NOTHING] * len(wishes)

    def settle(self, request: Request, proposal: Proposal, count: int) -> None:
        """Nothing is learnt."""

    def measured(self, rows: int, drafts: int, seconds: float) -> None:
        """Nothing depends on it."""

    def paused(self) -> None:
        """Nothing is measured."""

    def end(self, request: Request) -> None:
        """Nothing is kept."""

    def counts(self) -> list[DrafterCounts]:
        """Nobody does anything."""
        return []

    corpus_tokens = 0

    def drop(self) -> int:
        """There is nothing to forget."""
        return 0

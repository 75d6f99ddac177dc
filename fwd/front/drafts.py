"""What drafters have done for one model, whatever engines came and went, and who waits for them to forget."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from itertools import zip_longest

from fwd.errors import ConfigError, FwdError, NotReadyError
from fwd.protocol.messages import DropDrafts, Message
from fwd.protocol.values import DrafterCounts


class Drafts:
    """Adds up what engine after engine says of its drafters: `counts` never fall.

    What a dead engine did after its last word is lost.
    """

    def __init__(self) -> None:
        self._before: dict[str, DrafterCounts] = {}
        self._now: Sequence[DrafterCounts] = ()
        self._waiting: deque[asyncio.Future[int]] = deque()

    @property
    def counts(self) -> list[DrafterCounts]:
        """Each drafter's, since the daemon's start."""
        total = dict(self._before)
        for own in self._now:
            total[own.name] = _sum(total[own.name], own) if own.name in total else own
        return list(total.values())

    def observe(self, counts: Sequence[DrafterCounts]) -> None:
        """The engine of the moment has done so much."""
        self._now = counts

    def end_life(self) -> None:
        """The engine is dead: the next one counts from zero, and does not hear what this one was asked."""
        self._before, self._now = {each.name: each for each in self.counts}, ()
        while self._waiting:
            _settle(self._waiting.popleft(), NotReadyError("the engine died while it forgot drafts: try again"))

    def ask(self, send: Callable[[Message], None]) -> asyncio.Future[int]:
        """Tell the engine to forget earlier answers; the future gives how many ids they were."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        send(DropDrafts())
        return future

    def dropped(self, tokens: int, error: str) -> None:
        """The engine has done what it was asked first, or could not for an `error`."""
        if self._waiting:
            _settle(self._waiting.popleft(), ConfigError(error) if error else tokens)


def _settle(future: asyncio.Future[int], result: int | FwdError) -> None:
    if future.done():
        return  # whoever asked is gone
    if isinstance(result, int):
        future.set_result(result)
    else:
        future.set_exception(result)


def _sum(first: DrafterCounts, second: DrafterCounts) -> DrafterCounts:
    return DrafterCounts(
        name=second.name,
        drafts=first.drafts + second.drafts,
        drafted=first.drafted + second.drafted,
        accepted=first.accepted + second.accepted,
        places=[one + other for one, other in zip_longest(first.places, second.places, fillvalue=0)],
        ms=first.ms + second.ms,
    )

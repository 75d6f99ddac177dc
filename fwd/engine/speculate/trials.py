"""When a costly drafter that does not seem to pay is tried again, and what that may cost."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from fwd.engine.request import Request
from fwd.engine.speculate.controller import Choice, Pick, Prices
from fwd.kernels.sizes import MAX_ROWS

STAKE = 0.01  # of the time of steps without it goes into trials
PURSE = 4  # steps that may be put by


class Trial(NamedTuple):
    """Drafts of the costly drafter against what seems best, and what is lost if none holds, in seconds."""

    pick: Pick
    loss: float


class Trials:
    """Trials of a costly drafter that does not pay as far as is known: it may do for what is being written now.

    A share of the time of the steps without it is put by, and a trial is made when what it may cost is there. What it
    wins is put back, so that good luck is followed up at once.
    """

    def __init__(self) -> None:
        self._purse = 0.0
        self._running: dict[int, float] = {}  # by request: the seconds that each id is worth

    def save(self, seconds: float) -> None:
        """A step took so long."""
        self._purse = min(self._purse + STAKE * seconds, PURSE * seconds)

    def affords(self, choices: Sequence[Choice], rows: int, prices: Prices, rate: float) -> Trial | None:
        """The most promising trial if its cost has been put by; `rate` is the ids a second that seem best."""
        if self._purse <= prices.drafting.seconds(1):
            return None
        sums = next((list(accumulate(each.survival, initial=0.0)) for each in choices if each.costly), [])
        most = min(len(sums) - 1, MAX_ROWS - rows)
        if most < 1:
            return None
        seconds = prices.seconds(rows, most, most).diagonal()
        count = max(range(1, most + 1), key=lambda count: (rows + sums[count]) / float(seconds[count]))
        loss = float(seconds[count]) - rows / rate
        name = next(each.drafter for each in choices if each.costly)
        return Trial(Pick(name, count), loss) if loss <= self._purse else None

    def stake(self, request: Request, trial: Trial, rate: float) -> None:
        """It is made."""
        self._purse -= trial.loss
        self._running[request.id] = 1 / rate

    def settle(self, request: Request, held: int) -> None:
        """Drafts for a request are decided."""
        self._purse += held * self._running.pop(request.id, 0.0)

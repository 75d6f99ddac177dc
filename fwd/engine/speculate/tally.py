"""What a drafter has done since the engine's start."""

from fwd.kernels.sizes import MAX_ROWS
from fwd.protocol.values import DrafterCounts


class Tally:
    """Counts of one drafter; `seconds` is what drafting took."""

    def __init__(self) -> None:
        self._drafts = self._drafted = 0
        self._places = [0] * (MAX_ROWS - 1)
        self.seconds = 0.0

    def add(self, drafted: int, held: int) -> None:
        """Of so many drafts of a step the first `held` stood."""
        self._drafts += 1
        self._drafted += drafted
        for place in range(held):
            self._places[place] += 1

    def told(self, name: str) -> DrafterCounts:
        """As it travels."""
        return DrafterCounts(
            name=name,
            drafts=self._drafts,
            drafted=self._drafted,
            accepted=sum(self._places),
            places=list(self._places),
            ms=self.seconds * 1e3,
        )

"""The drafter of text that a grammar forces. It drafts and never commits: how the text is cut is the model's choice."""

from collections.abc import Sequence

from fwd.engine.request import Request
from fwd.engine.speculate.drafter import NOTHING, Proposal, Wish


class Forced:
    """Drafts what must come next as its tokens most likely are, up to the last one, which may reach further."""

    name = "grammar"

    def propose(self, wishes: Sequence[Wish]) -> list[Proposal]:
        """Return the forced tokens of each request; nothing where there is a choice, or no grammar."""
        return [self._proposal(*wish) for wish in wishes]

    def end(self, request: Request) -> None:
        """Nothing is kept."""

    def _proposal(self, request: Request, most: int) -> Proposal:
        ids = request.grammar.forced(most) if request.grammar else ()
        return Proposal(self.name, ids) if ids else NOTHING

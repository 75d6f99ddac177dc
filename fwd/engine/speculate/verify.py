"""The verify rule: what a step commits is what the target itself drew, as far as the drafts foresaw it.

Each row draws with noise keyed by (seed, position), so it draws what it would have drawn alone once all ids before it
are those that were committed. Hence no drafter, length or tree can change an answer (research: target-sample matching).
"""

from collections.abc import Sequence

from fwd.engine.request import Drawn


def verified(drafts: Sequence[int], drawn: Sequence[Drawn]) -> Sequence[Drawn]:
    """The part of `drawn` that stands: what followed the last known id, then what followed each draft that held.

    `drawn` has one more entry than `drafts`: entry i was drawn after i of them. A row that is not finite ends it.
    """
    count = 1
    for draft, token in zip(drafts, drawn, strict=False):
        if not token.finite or token.id != draft:
            break
        count += 1
    return drawn[:count]

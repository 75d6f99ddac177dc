"""The verify rule: what a step commits is what the target itself drew, as far as the drafts foresaw it.

Each row draws with noise keyed by (seed, position), so it draws what it would have drawn alone once all ids before it
are those that were committed. Hence no drafter, length or tree can change an answer (research: target-sample matching).
"""

from collections.abc import Sequence

from fwd.engine.request import Drawn, Request


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


def until_end(request: Request, drawn: Sequence[Drawn]) -> Sequence[Drawn]:
    """The tokens up to the one that ends the request, if one does: what drafts had right after it is not said.

    Its grammar goes along, and ends it as well; a token that does not follow from it is left out.
    """
    grammar = request.grammar
    for place, token in enumerate(drawn):
        if grammar and token.finite and not grammar.take(token.id):
            return drawn[:place]
        if token.id in request.stop_ids or (grammar and grammar.ended):
            return drawn[: place + 1]
    return drawn

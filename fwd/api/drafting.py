"""What `/metrics` tells of speculation: by drafter under own names, of all together under vLLM's."""

from collections.abc import Iterator, Sequence

from fwd.api.exposition import Metric, Sample, value
from fwd.front.bounds import MAX_DRAFT
from fwd.front.keeper import Keeper
from fwd.protocol.values import DrafterCounts


def drafting(keeper: Keeper) -> Iterator[Metric]:
    """The counters of all engines since the daemon's start."""
    counts = keeper.drafts.counts
    yield _each("proposals", "Times that ids were drafted.", [each.drafts for each in counts], counts)
    yield _each("tokens", "Ids drafted.", [each.drafted for each in counts], counts)
    yield _each("accepted_tokens", "Drafted ids that held.", [each.accepted for each in counts], counts)
    yield _each("seconds", "Time that drafting took.", [each.ms / 1e3 for each in counts], counts)
    by_place = [sample for each in counts for sample in _by_place(each)]
    name, text = "fwd_draft_accepted_tokens_per_position_total", "Drafted ids that held, by place in the draft."
    yield Metric(name, "counter", text, by_place)
    corpus = keeper.pong.corpus_tokens
    yield value("fwd_draft_corpus_tokens", "gauge", "Ids of earlier answers that drafts come from.", corpus)
    yield from _vllm(counts)


def _each(name: str, text: str, numbers: Sequence[float], counts: Sequence[DrafterCounts]) -> Metric:
    samples = [("", {"drafter": each.name}, number) for each, number in zip(counts, numbers, strict=True)]
    return Metric(f"fwd_draft_{name}_total", "counter", text, samples)


def _by_place(counts: DrafterCounts) -> Iterator[Sample]:
    for place, held in enumerate(counts.places):
        yield "", {"drafter": counts.name, "position": str(place)}, held


def _vllm(counts: Sequence[DrafterCounts]) -> Iterator[Metric]:
    """Its counters: mean accept length is 1 + accepted / drafts."""
    held = [sum(each.places[place] for each in counts if place < len(each.places)) for place in range(MAX_DRAFT)]
    places: list[Sample] = [("", {"position": str(place)}, count) for place, count in enumerate(held)]
    for name, text, number in (
        ("num_drafts", "Drafts.", sum(each.drafts for each in counts)),
        ("num_draft_tokens", "Drafted ids.", sum(each.drafted for each in counts)),
        ("num_accepted_tokens", "Drafted ids that held.", sum(each.accepted for each in counts)),
    ):
        yield value(f"vllm:spec_decode_{name}_total", "counter", text, number)
    name, text = "vllm:spec_decode_num_accepted_tokens_per_pos_total", "Drafted ids that held, by place in the draft."
    yield Metric(name, "counter", text, places)

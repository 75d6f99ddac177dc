"""Same seed, same bytes: answers computed alone and without drafts, and again in every other way."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fwd.protocol.client import Client, Event
from fwd.protocol.messages import Finished, Tokens
from fwd.protocol.values import Timing, TopLogprobs

SAMPLINGS: tuple[Mapping[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.5},
    {"temperature": 1.5, "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.1},
)
TOP = 2
WRONG_EVERY = 7  # one in so many predicted ids is wrong, so that drafts hold and fail


class Case(NamedTuple):
    """A request whose bytes are compared."""

    name: str
    prompt: Sequence[int]
    options: Mapping[str, Any]


class Way(NamedTuple):
    """What must not matter: who drafts how much (−1: as fwd likes), and how many requests run at once."""

    drafter: str
    max_draft: int
    together: int

    def __str__(self) -> str:
        drafts = "" if self.max_draft < 0 else f", {self.max_draft} drafts a step"
        return f"drafter {self.drafter}{drafts}, {self.together} at once"


ALONE = Way("off", -1, 1)


class Answer(NamedTuple):
    """All that a reader is told of an answer."""

    ids: list[int]
    logprobs: list[float]
    top: list[TopLogprobs]
    reason: str
    timing: Timing


class Difference(NamedTuple):
    """Where an answer is another one than alone."""

    case: str
    way: str
    token: int
    alone: str
    here: str


class Result(NamedTuple):
    """How many answers were compared with those alone, in how many ways, and what was drafted for them."""

    answers: int
    ways: int
    drafted: int
    accepted: int
    differences: list[Difference]


def cases(prompts: Mapping[str, Sequence[int]], seeds: int, tokens: int) -> list[Case]:
    """Each prompt with each seed and each way to draw."""
    return [
        Case(f"{name}, {_spelt(sampling)}, seed {seed}", prompt, {**sampling, "seed": seed, "max_tokens": tokens})
        for seed in range(seeds)
        for sampling in SAMPLINGS
        for name, prompt in prompts.items()
    ]


def ways(drafters: Sequence[str], widths: Sequence[int]) -> list[Way]:
    """Every drafter at every width: left to itself, and made to draft few and many in each step."""
    asked = [("off", -1), ("auto", -1), *((name, most) for name in drafters for most in (3, 15))]
    return [way for together in widths for name, most in asked if (way := Way(name, most, together)) != ALONE]


def compare(daemon: Client, every: Sequence[Case], others: Sequence[Way], told: Callable[[str], None]) -> Result:
    """Compute every case alone, then in every way; raises what the daemon answers."""
    told("alone, without drafts")
    alone = list(_answers(daemon, every, ALONE, [()] * len(every)))
    predictions = [_nearly(answer.ids, case.prompt[0]) for answer, case in zip(alone, every, strict=True)]
    differences, spent = list[Difference](), list[Timing]()
    for place, way in enumerate(others, 1):
        told(f"{place} of {len(others)} ways: {way}")
        for case, first, again in zip(every, alone, _answers(daemon, every, way, predictions), strict=True):
            spent.append(again.timing)
            if again[:-1] != first[:-1]:
                differences.append(_difference(case, way, first, again))
    drafted = sum(sum(timing.drafted.values()) for timing in spent)
    accepted = sum(sum(timing.accepted.values()) for timing in spent)
    return Result(len(spent), len(others), drafted, accepted, differences)


def _answers(daemon: Client, every: Sequence[Case], way: Way, predictions: Sequence[Sequence[int]]) -> Iterator[Answer]:
    asked = list(zip(every, predictions, strict=True))
    for begin in range(0, len(asked), way.together):
        group = asked[begin : begin + way.together]
        streams = [_begun(daemon, case, way, prediction) for case, prediction in group]
        yield from map(_read, streams)


def _begun(daemon: Client, case: Case, way: Way, prediction: Sequence[int]) -> Iterator[Event]:
    """The events of a request that is on its way; nothing of it is kept afterwards."""
    draft = {"drafter": way.drafter, "max_draft": way.max_draft, "prediction": prediction}
    events = daemon.submit(case.prompt, **case.options, **draft, logprobs=TOP, cache=False)
    next(events)  # `Accepted`
    return events


def _read(events: Iterator[Event]) -> Answer:
    ids, logprobs, top = list[int](), list[float](), list[TopLogprobs]()
    for event in events:
        if isinstance(event, Tokens):
            ids += event.ids
            logprobs += event.logprobs
            top += event.top
    assert isinstance(event, Finished)
    return Answer(ids, logprobs, top, event.reason, event.timing)


def _nearly(ids: Sequence[int], wrong: int) -> list[int]:
    """A prediction that is right but for an id here and there."""
    return [wrong if place % WRONG_EVERY == WRONG_EVERY - 1 else token for place, token in enumerate(ids)]


def _difference(case: Case, way: Way, first: Answer, again: Answer) -> Difference:
    """The first of them."""
    ours, theirs = _told(first), _told(again)
    place = next(place for place, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other)
    return Difference(case.name, str(way), place, ours[place], theirs[place])


def _told(answer: Answer) -> list[str]:
    """What is said of each token, and of the end."""
    columns = zip(answer.ids, answer.logprobs, answer.top, strict=True)
    return [*(f"id {token}, {logprob!r}, {top.ids}" for token, logprob, top in columns), f"the end ({answer.reason})"]


def _spelt(options: Mapping[str, Any]) -> str:
    return " ".join(f"{name} {value:g}" for name, value in options.items())

"""A request of the command line: its options, and the reading and timing of its answer."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import click

from fwd.protocol.client import Event
from fwd.protocol.local import Accepted, Text
from fwd.protocol.messages import Finished
from fwd.protocol.values import MAX_CONTEXT

F = TypeVar("F", bound=Callable[..., Any])


class Finite(click.FloatRange):
    """A number within bounds; NaN is within none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Raise a usage error for what is no number in the range."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return float(number)


SAMPLING = (
    click.option("--max-tokens", type=click.IntRange(1, MAX_CONTEXT), help="End after so many tokens."),
    click.option("--temperature", type=Finite(0, 2), help="0 is greedy."),
    click.option("--top-k", type=click.IntRange(0, 2**31 - 1), help="Draw from the k most likely tokens; 0 is off."),
    click.option("--top-p", type=Finite(0, 1, min_open=True), help="Draw from the most likely tokens of this mass."),
    click.option("--min-p", type=Finite(0, 1), help="Draw from tokens of this share of the best one's probability."),
    click.option("--seed", type=click.IntRange(-(2**63), 2**63 - 1), help="Same seed, same bytes."),
    click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End before this text; may repeat."),
)


def sampling_options(function: F) -> F:
    """Add the options of a request to a verb; they arrive by the names of the protocol's fields."""
    for option in reversed(SAMPLING):
        function = option(function)
    return function


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value not in (None, ())}


class Answer:
    """Reads the events of one request and times them. Times are seconds since the request was made."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens = 0
        self.accepted = Accepted(tag=0, id=0, seed=0, prompt_tokens=0)
        self.finished: Finished | None = None
        self.first = 0.0
        self.last = 0.0
        self._first_tokens = 0
        self._started = time.perf_counter()

    def read(self, events: Iterable[Event]) -> Iterator[str]:
        """Yield the text as it comes."""
        for event in events:
            match event:
                case Accepted():
                    self.accepted = event
                case Text():
                    self._count(event)
                    yield event.text
                case Finished():
                    self.finished = event

    @property
    def tokens_per_s(self) -> float:
        """The rate after the first token, so without the prefill; 0 for fewer than two."""
        later = self.tokens - self._first_tokens
        return later / (self.last - self.first) if later else 0.0

    def document(self) -> dict[str, Any]:
        """Everything as it goes into JSON; milliseconds and tokens."""
        assert self.finished, "an answer that was read to its end"
        return {
            "id": self.accepted.id,
            "text": self.text,
            "finish_reason": self.finished.reason,
            "seed": self.accepted.seed,
            "prompt_tokens": self.accepted.prompt_tokens,
            "output_tokens": self.tokens,
            "first_token_ms": self.first * 1e3,
            "tokens_per_s": self.tokens_per_s,
            "timing": self.finished.timing,
        }

    def _count(self, piece: Text) -> None:
        self.last = time.perf_counter() - self._started
        if not self.tokens:
            self.first, self._first_tokens = self.last, piece.tokens
        self.text += piece.text
        self.tokens += piece.tokens

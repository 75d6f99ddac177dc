"""What waits for the engine, counted in tokens, and when a request that found no room should come again."""

import math
from collections.abc import Iterable, Sequence

from fwd.front.streams import Stream
from fwd.protocol.messages import Submit

MAX_OPEN = 1024
DEFAULT_RATE = 1000.0  # tokens per second, until the engine has shown its own
SOONEST, LATEST = 1, 60
SMOOTHING = 10.0  # seconds


class Queue:
    """The open requests that the engine has not begun. `tokens` counts their prompts and what they had been given.

    A prompt counts once however many choices of it wait, and no more when the first of them has begun: the engine
    shares the prefill. Choices of one prompt are those whose `Submit.prompt` is the same object.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._lines: dict[int, _Line] = {}

    def enter(self, stream: Stream) -> None:
        """Let a stream wait; one that waits already is counted anew."""
        self.leave(stream)
        key = id(stream.submit.prompt)
        if key not in self._lines:
            self._lines[key] = _Line(len(stream.prompt))
            self.tokens += len(stream.prompt)
        self._lines[key].waiting[stream.id] = len(stream.emitted)
        self.tokens += len(stream.emitted)

    def leave(self, stream: Stream) -> None:
        """The stream has begun, or ended before it could."""
        key = id(stream.submit.prompt)
        line = self._lines.get(key)
        if line is None or stream.id not in line.waiting:
            return
        self.tokens -= line.waiting.pop(stream.id)
        if stream.begun or not line.waiting:
            del self._lines[key]
            self.tokens -= line.prompt + sum(line.waiting.values())

    def refill(self, streams: Iterable[Stream]) -> None:
        """The engine is gone: these wait, and no others."""
        self.tokens = 0
        self._lines.clear()
        for stream in streams:
            self.enter(stream)


class _Line:
    """The waiting choices of one prompt of `prompt` tokens: by id, how many tokens each had been given."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt
        self.waiting: dict[int, int] = {}


class Pace:
    """How many tokens per second the engine computes while it has work: `rate`, smoothed over `SMOOTHING` seconds."""

    def __init__(self) -> None:
        self.rate = DEFAULT_RATE
        self._measured = False
        self._last: tuple[float, int] | None = None

    def observe(self, now: float, computed: int, *, busy: bool) -> None:
        """Take one reading of the engine's counter; only the time between two busy readings counts."""
        last, self._last = self._last, (now, computed) if busy else None
        if not (busy and last) or now <= last[0] or computed < last[1]:
            return
        seconds = now - last[0]
        share = 1 - math.exp(-seconds / SMOOTHING) if self._measured else 1.0
        self.rate += share * ((computed - last[1]) / seconds - self.rate)
        self._measured = True

    def restart(self) -> None:
        """Another engine counts from zero; how fast the last one was is still the best guess."""
        self._last = None


def retry_after(tokens: float, rate: float) -> int:
    """Whole seconds until `tokens` have been computed at `rate` tokens per second, within `SOONEST` … `LATEST`."""
    if tokens >= rate * LATEST:
        return LATEST
    return max(SOONEST, math.ceil(tokens / rate))


def queue_tokens(submits: Sequence[Submit]) -> int:
    """What requests will count for in a `Queue`."""
    prompts = {id(submit.prompt): submit.prompt.nbytes // 4 for submit in submits}
    return sum(prompts.values()) + sum(submit.emitted.nbytes // 4 for submit in submits)

"""Stop strings over a stream of text."""

from collections.abc import Sequence


class StopMatcher:
    """Emits text that can no longer become part of a stop string.

    The stop that is complete first wins; of those complete at the same character, the longest. So the result does not
    depend on how the text was split. `matched` is the stop that was found; it is emitted only with `include`.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        assert all(stops), "an empty stop string"
        self.matched: str | None = None
        self._stops = tuple(stops)
        self._include = include
        self._firsts = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> str:
        """Return the text that is free to be sent now; nothing after a match."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            return self._match(text, *min(found))
        border = len(text) - self._partial(text)
        self._held = text[border:]
        return text[:border]

    def flush(self) -> str:
        """End the stream: return the text held back; nothing after a match."""
        held, self._held = self._held, ""
        return held

    def _match(self, text: str, end: int, start: int, stop: str) -> str:
        self.matched, self._held = stop, ""
        return text[: end if self._include else start]

    def _partial(self, text: str) -> int:
        """Measure the longest end of `text` that begins a stop."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._firsts:
                end = text[at:]
                if any(stop.startswith(end) for stop in self._stops):
                    return len(end)
        return 0

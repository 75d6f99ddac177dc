"""What this machine has answered before, for drafts: in memory, and in a log where there is a state directory."""

from array import array
from collections import deque
from pathlib import Path

from fwd.engine.speculate.draft_log import DraftLog
from fwd.engine.speculate.grams import Grams
from fwd.engine.speculate.items import CORPUS, ID

SEGMENTS = 8  # of the largest that the limit holds
FIRST = 1 << 16  # ids of the first segment: a few answers take no memory of many
START = 1 << 20  # ids that can be drafted from at once: some 0.2 s
LEAST = 2  # ids of an output that drafts can come from


class Corpus:
    """The latest outputs, up to `limit` bytes of ids: the older half goes when it is full.

    Outputs only, not those of requests whose `cache` is false. `texts` hold them in segments, the newest first. What
    the log holds is read at once (64 MiB: 0.5 s), and the latest million ids can be drafted from; the others as `take`
    comes to them, 0.15 s a million.
    """

    def __init__(self, log: DraftLog | None = None, limit: int = CORPUS) -> None:
        self._log, self._most = log, max(limit // ID, SEGMENTS)
        self._segment = self._most // SEGMENTS
        self._room = 0  # ids that the newest segment holds
        self.texts: deque[Grams] = deque()
        for ids in log.read() if log else ():
            self._add(ids)
        self.take(START)

    @property
    def tokens(self) -> int:
        """How many ids it holds."""
        return sum(len(grams.text) for grams in self.texts)

    def take(self, most: int) -> None:
        """Take in up to `most` ids that came, the newest segment first."""
        for grams in self.texts:
            if grams.size < len(grams.text):
                most -= grams.take(most)
            if most <= 0:
                return

    def record(self, ids: "array[int]") -> None:
        """Keep an output."""
        if len(ids) >= LEAST:
            self._add(ids[-self._most // 2 :])
            if self._log:
                self._log.append(ids)

    def drop(self) -> int:
        """Forget everything, in memory and then on disk, which may raise `ConfigError`; return how many ids."""
        tokens = self.tokens
        self.texts.clear()
        if self._log:
            self._log.drop()
        return tokens

    def _add(self, ids: "array[int]") -> None:
        if not self.texts or len(self.texts[0].text) + len(ids) > self._room:
            self._room = max(min(self._segment, max(FIRST, self.tokens)), len(ids))
            self.texts.appendleft(Grams(array("i"), self._room))
        self.texts[0].text.extend(ids)
        if self.tokens > self._most:
            self._halve()

    def _halve(self) -> None:
        while self.tokens > self._most // 2 and len(self.texts) > 1:
            self.texts.pop()


def corpus_of(state_dir: str, weights_hash: str, text_hash: str, limit: int) -> Corpus:
    """The corpus for a model and its text side: kept in `state_dir` if there is one. `limit` 0: `CORPUS`."""
    limit = limit or CORPUS
    return Corpus(DraftLog(Path(state_dir), weights_hash, text_hash, limit) if state_dir else None, limit)

"""The drafter that has no weights: what came next the last times that a text stood where this one stands."""

from array import array
from collections.abc import Sequence
from contextlib import suppress

from fwd.engine.request import Request
from fwd.engine.speculate.corpus import Corpus
from fwd.engine.speculate.drafter import NOTHING, Proposal, Wish
from fwd.engine.speculate.grams import REACH, Grams, Match, Place, common, longest

OWN, PREDICTION, CORPUS = NAMES = ("suffix", "suffix:prediction", "suffix:corpus")
SLICE = 4096  # ids that a call takes in at most: half a millisecond
BACK, AHEAD = 8, 64  # places around the last draft where one id that matches counts more than it does elsewhere
PATIENCE = 8  # committed ids without a match after which the last draft is left for good
AGREED = 2  # levels that a second place which goes on alike is worth, or being near the last draft


class Suffix:
    """Drafts from the request's own text, from its `prediction`, and from what this machine has answered before.

    The longest match decides, and among its places the most frequent continuation, among these the latest. A place
    where the last draft goes on comes before others, also past an id that was changed: copies go on beside edits.
    A proposal bears the name of its text, one of `NAMES`, so that what each gives is counted apart.

    Its level is 0 where nothing matches or its places mostly disagree, 1 where half of them agree, else 1 + the bits of
    the length of the match (1, 2–3, 4–7, … 32), and `AGREED` more where several places go on alike or it is near.
    """

    name = OWN

    def __init__(self, corpus: Corpus | None = None) -> None:
        self.corpus = corpus or Corpus()
        self._readers: dict[int, _Reader] = {}

    def propose(self, wishes: Sequence[Wish]) -> list[Proposal]:
        """Return what may follow the known ids of each request; asked again, the same.

        It takes in no more than `SLICE` ids: a long prompt, and the corpus after a start, become known bit by bit.
        """
        left, readers = SLICE, [self._reader(wish.request) for wish in wishes]
        for reader in readers:
            left -= reader.take(left)
        self.corpus.take(min(left, SLICE // 2))
        return [reader.proposed(wish.most, self.corpus.texts) for reader, wish in zip(readers, wishes, strict=True)]

    def end(self, request: Request) -> None:
        """Forget a request; its output joins the corpus unless its `cache` is false."""
        self._readers.pop(request.id, None)
        if request.submit.cache:
            self.corpus.record(request.ids[request.prompt :])

    def _reader(self, request: Request) -> "_Reader":
        reader = self._readers.get(request.id)
        if reader is None:
            reader = self._readers[request.id] = _Reader(request)
        return reader


class _Reader:
    """The texts of one request, and where its last draft was read from."""

    def __init__(self, request: Request) -> None:
        self._ids = request.ids
        self._own = Grams(request.ids, request.limit)
        self._given = _given(request.submit.prediction)
        self._prompt = request.prompt
        self._length = request.length  # for which `_chosen` holds
        self._chosen: Place | None = Place(self._given[0], request.output) if self._given else None
        self._last = self._chosen  # that of the lengths before, moved along with what was committed
        self._matched = request.length  # when ids were last found

    def take(self, most: int) -> int:
        """Take in up to `most` ids; return how many there were."""
        left = most - self._own.take(most)
        for grams in self._given:
            left -= grams.take(left)
        return most - left

    def proposed(self, most: int, corpus: Sequence[Grams]) -> Proposal:
        """What may follow the known ids."""
        self._advance()
        match, near = self._match([*self._given, self._own], corpus)
        if match.length:
            self._matched = self._length
        if not match.places:
            return NOTHING
        runs = [_run(place, most, self._own) for place in match.places]
        winner, votes = _winner(runs)
        self._chosen = match.places[winner]
        level = _level(match.length, votes, len(runs), near=near)
        return Proposal(self._source(self._chosen.grams), tuple(runs[winner]), level)

    def _advance(self) -> None:
        """Where the last draft goes on, if all that was committed since replaced as much of it."""
        step, self._length = len(self._ids) - self._length, len(self._ids)
        if step and self._chosen:
            self._last = self._chosen = self._chosen._replace(at=self._chosen.at + step)

    def _match(self, texts: Sequence[Grams], corpus: Sequence[Grams]) -> tuple[Match, bool]:
        """Where texts match, and whether the last draft goes on there."""
        last = self._last
        if last and last.at < len(last.grams.text) and (last.grams in texts or last.grams in corpus):
            return self._match_near(last, texts, corpus)
        self._last = self._chosen = None
        return longest(texts, corpus, self._ids, self._length), False

    def _match_near(self, last: Place, texts: Sequence[Grams], corpus: Sequence[Grams]) -> tuple[Match, bool]:
        if self._goes_on(last):
            return Match(REACH, [last]), True
        if self._length == self._prompt:  # what stands before the answer says nothing of its likely text
            return Match(0, [last]), True
        found = longest(texts, corpus, self._ids, self._length)
        if found.places and common(last.grams.text, last.at, self._ids, self._length, 0) >= found.length:
            return Match(found.length, [last]), True
        if found.length <= 1 and (near := _near(last, self._ids)).length >= max(1, found.length):
            return near, False
        if not found.places and self._length - self._matched < PATIENCE:
            return Match(0, [last]), True
        return found, False

    def _goes_on(self, place: Place) -> bool:
        """All that is compared is the same: there is nothing to look for."""
        grams, at = place
        return at >= REACH and grams.text[at - REACH : at] == self._ids[-REACH:]

    def _source(self, grams: Grams) -> str:
        if grams is self._own:
            return OWN
        return PREDICTION if grams in self._given else CORPUS


def _given(prediction: memoryview) -> list[Grams]:
    ids = array("i")
    ids.frombytes(prediction[: prediction.nbytes // 4 * 4])
    return [Grams(ids, len(ids))] if ids else []


def _near(last: Place, ids: "array[int]") -> Match:
    """The longest match around the last draft, of which the nearest."""
    grams, at = last
    place, high = max(at - BACK, 0), min(at + AHEAD, len(grams.text)) - 1
    best = (0, 0, at)
    with suppress(ValueError):
        while True:
            place = grams.text.index(ids[-1], place, high) + 1
            best = max(best, (common(grams.text, place, ids, len(ids), 1), -abs(place - at), place))
    return Match(best[0], [Place(grams, best[2])])


def _run(place: Place, most: int, own: Grams) -> "array[int]":
    """Up to `most` ids from a place on; the end of the own text goes on with the run itself, as a repetition does."""
    run = place.grams.text[place.at : place.at + most]
    if place.grams is own:
        period = len(own.text) - place.at
        while len(run) < most:
            run.append(run[-period])
    return run


def _winner(runs: Sequence["array[int]"]) -> tuple[int, int]:
    """Which run is the most frequent path, of equals the earliest, and how many begin as it does."""
    if runs.count(runs[0]) == len(runs):
        return 0, len(runs)
    alive, votes, count = list(range(len(runs))), 0, 0
    while longer := [index for index in alive if len(runs[index]) > count]:
        nexts = [runs[index][count] for index in longer]
        best = nexts[0]
        if 2 * nexts.count(best) < len(nexts):
            best = max(dict.fromkeys(nexts), key=nexts.count)
        alive = [index for index, token in zip(longer, nexts, strict=True) if token == best]
        votes, count = votes or len(alive), count + 1
        if len(alive) == 1:
            break
    return alive[0], votes


def _level(length: int, votes: int, places: int, *, near: bool) -> int:
    if not length or 2 * votes < places:
        return 0
    if votes < places:
        return 1
    return 1 + length.bit_length() + (AGREED if near or places > 1 else 0)

"""Where a text repeats itself: hash chains over its grams of 1, 3 and 8 token ids, and the longest match of a tail.

Each place links to the one before it whose gram has the same hash, as compressors with a window do (RFC 1951 §4), so a
text is taken in by a few operations on arrays and searched from its newest part backwards. A suffix automaton (Blumer
et al. 1985) finds the longest match of all; but over ids in Python one took 1.7 µs and 440 bytes an id when it was
measured, against 0.1 µs in bulk and 24 bytes here, and agents send a hundred thousand ids before each short answer.
"""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fwd.engine.speculate.items import ORDERS, slots_of

REACH = 32  # longer matches count as this
TRIES = 16  # places that are found at most, and looked at in each text for each order
BULK = 32  # ids from which on arrays are faster than a loop
FACTOR = 0x9E3779B1  # odd, near 2³² divided by the golden ratio
_, P1, P2, P3, P4, P5, P6, P7 = POWERS = [pow(FACTOR, power, 1 << 32) for power in range(8)]
MASK = 0xFFFFFFFF


class Grams:
    """The grams of `text`, ids that only grow, up to `room` ≥ 1 of them; the first `size` ids are taken in.

    A gram has a place once the id that follows it is taken in too, so each match goes on by one id at least. Memory: 12
    bytes an id of room, and 12 a slot, of which there are a power of two ≥ `room` up to `SLOTS`; touched as it fills.
    """

    def __init__(self, text: "array[int]", room: int) -> None:
        self.text, self.size = text, 0
        slots = slots_of(room)
        self.shift = 33 - slots.bit_length()
        self._tables = [(np.zeros(slots, np.int32), np.zeros(room, np.int32)) for _ in ORDERS]
        self.chains = [(newest.data, before.data) for newest, before in self._tables]

    def take(self, most: int) -> int:
        """Take in up to `most` ids that have come; return how many there were."""
        start, end = self.size, min(self.size + most, len(self.text))
        if end - start >= BULK:
            self._take_bulk(start, end)
        else:
            self._take_few(start, end)
        self.size = end
        return end - start

    def _take_few(self, start: int, end: int) -> None:
        text, shift = self.text, self.shift
        (newest1, before1), (newest3, before3), (newest8, before8) = self.chains
        for place in range(start, end):
            one, three, eight = hashes(text, place)
            before1[place], newest1[one >> shift] = newest1[one >> shift], place
            before3[place], newest3[three >> shift] = newest3[three >> shift], place
            before8[place], newest8[eight >> shift] = newest8[eight >> shift], place

    def _take_bulk(self, start: int, end: int) -> None:
        """What `_take_few` does."""
        longest, first = ORDERS[-1], max(start - ORDERS[-1], 0)
        words = np.zeros(longest + end - start, np.uint32)
        words[longest - (start - first) :] = np.array(self.text[first:end], np.int32).view(np.uint32)
        places, key, done = np.arange(start, end, dtype=np.uint64), np.zeros(end - start, np.uint32), 0
        for order, (newest, before) in zip(ORDERS, self._tables, strict=True):
            for back in range(done + 1, order + 1):
                key += words[longest - back : len(words) - back] * np.uint32(POWERS[back - 1])
            done = order
            _link(key * np.uint32(FACTOR) >> np.uint32(self.shift), places, newest, before)


def _link(slots: NDArray[np.uint32], places: NDArray[np.uint64], newest: "Table", before: "Table") -> None:
    """Chain places that come in order: sorted by slot, each finds the one before it."""
    pairs = slots.astype(np.uint64) << np.uint64(32) | places
    pairs.sort()
    slot, place = (pairs >> np.uint64(32)).astype(np.intp), pairs.astype(np.uint32).view(np.int32)
    found = newest[slot]
    again = np.flatnonzero(slot[1:] == slot[:-1])
    found[again + 1] = place[again]
    before[place] = found
    newest[slot] = place  # of several the last one stays


Table = NDArray[np.int32]


def hashes(ids: Sequence[int], end: int) -> tuple[int, int, int]:
    """The hashes of the grams before `end`, shortest first; ids before the first count as 0."""
    a, b, c, d, e, f, g, h = ids[end - 8 : end] if end >= ORDERS[-1] else (*[0] * (8 - end), *ids[:end])
    three = h + g * P1 + f * P2
    eight = three + e * P3 + d * P4 + c * P5 + b * P6 + a * P7
    return h * FACTOR & MASK, three * FACTOR & MASK, eight * FACTOR & MASK


class Place(NamedTuple):
    """Where a text goes on: its ids from `at` on."""

    grams: Grams
    at: int


class Match(NamedTuple):
    """Places before which texts hold the same `length` ids, the newest of the first text first."""

    length: int
    places: list[Place]


NOWHERE = Match(0, [])


def longest(near: Sequence[Grams], far: Sequence[Grams], ids: "array[int]", end: int) -> Match:
    """The longest match of ids[:end] with what stands before a place in one of the texts, as far as `REACH`.

    Looked at are the latest `TRIES` places with the hash of the longest gram that is found at all, text by text; one id
    alone is looked for in the `near` texts only.
    """
    keys, texts = hashes(ids, end), [*near, *far]
    for level in reversed(range(len(ORDERS))):
        if end >= ORDERS[level]:
            match = _looked_up(texts if level else near, ids, end, level, keys[level])
            if match.places:
                return match
    return NOWHERE


def _looked_up(texts: Sequence[Grams], ids: "array[int]", end: int, level: int, key: int) -> Match:
    length, found = ORDERS[level], list[Place]()
    tail = ids[end - length : end]
    for grams in texts:
        newest, before = grams.chains[level]
        place, text, tries = newest[key >> grams.shift], grams.text, TRIES - len(found)
        while place and tries:
            tries -= 1
            if place >= length and text[place - length : place] == tail:
                if (further := common(text, place, ids, end, length)) > length:
                    length, found = further, []
                    tail = ids[end - length : end]
                found.append(Place(grams, place))
            place = before[place]
    return Match(length, found)


def common(text: "array[int]", place: int, ids: "array[int]", end: int, known: int) -> int:
    """How many ids before `place` and `end` are the same, up to `REACH`, given that `known` are."""
    most = min(place, end, REACH)
    while known < most and text[place - 1 - known] == ids[end - 1 - known]:
        known += 1
    return known

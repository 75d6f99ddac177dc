"""The index of a text against brute force, in bulk as one by one, and what a search looks at at most."""

import random
from array import array

import numpy as np
import pytest

from fwd.engine.speculate import grams as module
from fwd.engine.speculate.grams import ORDERS, REACH, TRIES, Grams, Place, hashes, longest


def indexed(ids, room=0, step=None):
    grams = Grams(array("i", ids), room or max(1, len(ids)))
    while grams.take(step or len(ids) or 1):
        pass
    return grams


def same_before(text, place, ids):
    """How many ids before `place` and the end are the same."""
    most = min(place, len(ids), REACH)
    return next((back for back in range(most) if text[place - 1 - back] != ids[-1 - back]), most)


def brute(near, far, ids):
    """The longest match of a tail in the texts, at every place that is found with its longest gram, newest first."""
    for order in reversed(ORDERS):
        texts = near if order == 1 else [*near, *far]
        lengths = {
            Place(grams, place): same_before(grams.text, place, ids)
            for grams in texts
            for place in reversed(range(1, len(grams.text)))
        }
        longest = max(lengths.values(), default=0)
        if longest >= order:
            return longest, [place for place, length in lengths.items() if length == longest]
    return 0, []


@pytest.mark.parametrize("seed", range(4))
def test_the_longest_match_is_that_of_brute_force(seed, monkeypatch):
    rng = random.Random(seed)
    monkeypatch.setattr(module, "TRIES", 10**6)
    for _ in range(500):
        alphabet = rng.choice([1, 2, 3, 5, 30])
        texts = [
            indexed([rng.randrange(alphabet) for _ in range(rng.randrange(80))], step=rng.choice([1, 7, 40, 100]))
            for _ in range(3)
        ]
        ids = array("i", [rng.randrange(alphabet) for _ in range(rng.randrange(1, 60))])
        if rng.random() < 0.5:
            part = rng.choice(texts).text
            ids += part[: rng.randrange(len(part) + 1)]
        near, far = texts[:1], texts[1:]
        assert tuple(longest(near, far, ids, len(ids))) == brute(near, far, ids), (seed, ids, texts)


@pytest.mark.parametrize("seed", range(4))
def test_a_text_that_grows_finds_its_own_longest_repetition(seed, monkeypatch):
    """Blumer's question, after each id: which end of the text has been there before?"""
    rng = random.Random(100 + seed)
    monkeypatch.setattr(module, "TRIES", 10**6)
    for _ in range(25):
        alphabet, size = rng.choice([1, 2, 3, 8]), rng.randrange(1, 90)
        text = array("i")
        grams = Grams(text, size)
        for _ in range(size):
            text.append(rng.randrange(alphabet))
            grams.take(size)
            assert tuple(longest([grams], [], text, len(text))) == brute([grams], [], text), (seed, text)


@pytest.mark.parametrize("seed", range(4))
def test_with_few_tries_what_is_found_is_there_newest_first(seed):
    rng = random.Random(200 + seed)
    for _ in range(300):
        alphabet = rng.choice([1, 2, 3, 30])
        text = indexed([rng.randrange(alphabet) for _ in range(rng.randrange(2, 400))])
        ids = array("i", [rng.randrange(alphabet) for _ in range(rng.randrange(1, 40))])
        most, everywhere = brute([text], [], ids)
        found = longest([text], [], ids, len(ids))
        assert bool(found.places) == bool(everywhere)
        assert found.length <= most
        assert len(found.places) <= TRIES
        assert [place.at for place in found.places] == sorted((place.at for place in found.places), reverse=True)
        assert all(same_before(text.text, place.at, ids) == found.length for place in found.places)


@pytest.mark.parametrize("step", [1, 2, 31, 32, 33, 1000])
def test_a_text_is_taken_in_the_same_way_whatever_the_steps(step):
    rng = random.Random(step)
    for size in (1, 2, 7, 8, 9, 40, 1500):
        ids = [rng.randrange(rng.choice([2, 50, 2**31 - 1])) for _ in range(size)]
        once, bit_by_bit = indexed(ids, size + 5), indexed(ids, size + 5, step)
        assert once.size == bit_by_bit.size == size
        for left, right in zip(once._tables, bit_by_bit._tables, strict=True):
            assert all(np.array_equal(*pair) for pair in zip(left, right, strict=True))


def test_what_is_not_taken_in_is_not_found():
    text = array("i", range(100))
    grams = Grams(text, 100)
    assert grams.take(50) == 50
    assert longest([grams], [], array("i", range(20, 30)), 10).places == [Place(grams, 30)]
    assert longest([grams], [], array("i", range(49, 50)), 1).places == []  # what follows 49 is not known yet
    assert longest([grams], [], array("i", range(60, 70)), 10).places == []


def test_other_grams_with_the_same_hash_are_no_matches():
    text = indexed(range(2000), room=2000)
    text.shift = 31  # as with two slots
    text.chains = [(memoryview(array("i", [0, 0])), memoryview(array("i", [0] * 2000))) for _ in ORDERS]
    text.size = 0
    while text.take(module.BULK - 1):
        pass
    assert longest([text], [], array("i", [1995, 1997, 1998]), 3) == (2, [Place(text, 1999)])
    assert longest([text], [], array("i", [1997, 1996, 1998]), 3) == (1, [Place(text, 1999)])
    assert longest([text], [], array("i", [5000]), 1).places == []


def test_hashes_spread_over_the_slots():
    """Ids that come one after the other, as in lists of rare words, are not in the same slots."""
    bits = 12
    ids = array("i", range(10_000, 14_096))
    for order in range(len(ORDERS)):
        slots = {hashes(ids, end)[order] >> (32 - bits) for end in range(8, len(ids))}
        assert len(slots) > 0.55 * 2**bits  # 0.63 of them at random


def test_memory_is_what_is_said():
    grams = Grams(array("i"), 100_000)
    tables = sum(array.nbytes for pair in grams._tables for array in pair)
    assert tables == 12 * 100_000 + 12 * 2**17

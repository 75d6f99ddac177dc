"""What the suffix drafter guesses: copies, edits, predictions; that it is bounded, asked twice says the same."""

import random
from array import array
from itertools import pairwise

import pytest

from fwd.engine.request import Request
from fwd.engine.speculate.corpus import Corpus
from fwd.engine.speculate.drafter import NOTHING, Wish
from fwd.engine.speculate.suffix import CORPUS, NAMES, OWN, PATIENCE, PREDICTION, SLICE, Suffix
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Submit
from fwd.protocol.values import Limits

K = 15


def request(number, prompt, tokens=10_000, **fields):
    return Request(Submit(id=number, prompt=pack_ids(prompt), limits=Limits(max_tokens=tokens), **fields))


def guess(suffix, made, most=K):
    return suffix.propose([Wish(made, most)])[0]


def written(suffix, made, output):
    """Let a target say `output`: (proposal, how much of it held) of each step."""
    steps, at = [], 0
    while at < len(output):
        proposal = guess(suffix, made, min(K, made.room))
        pairs = zip(proposal.ids, output[at:], strict=False)
        held = next((place for place, (left, right) in enumerate(pairs) if left != right), None)
        held = min(len(proposal.ids), len(output) - at) if held is None else held
        made.append(output[at : at + held + 1])
        steps.append((proposal, held))
        at += held + 1
    return steps


def apart(texts):
    """The texts one after the other, with an id of its own before each and at the end."""
    return [*(token for number, text in enumerate(texts) for token in (5000 + number, *text)), 4999]


def source(rng, size=3000, vocab=2000):
    """Ids as in source code: a few that are everywhere, lines that begin alike, names that come again."""
    names = [rng.randrange(50, vocab) for _ in range(200)]
    ids = []
    while len(ids) < size:
        ids += [1, 2, 2][: rng.randrange(1, 4)]  # a new line and how far it is indented
        for _ in range(rng.randrange(3, 12)):
            ids += [rng.choice(names) if rng.random() < 0.5 else rng.randrange(3, 50)]
    return ids[:size]


def edited(rng, ids, every):
    """The ids with one change in about `every`: replaced, left out or put in."""
    out = []
    for token in ids:
        match rng.randrange(3 * every):
            case 0:
                out.append(rng.randrange(2000))
            case 1:
                pass
            case 2:
                out += [rng.randrange(2000), token]
            case _:
                out.append(token)
    return out


@pytest.mark.parametrize("seed", range(3))
def test_an_edit_of_a_file_takes_less_than_a_fifth_of_the_steps(seed):
    """The prompt holds the file, the answer repeats it with a change in forty ids."""
    rng = random.Random(seed)
    file = source(rng)
    answer = edited(rng, file, 40)
    made = request(1, [7, 8, 9, *file, 9, 8, 7], len(answer) + 1)
    steps = written(Suffix(), made, answer)
    assert list(made.ids[made.prompt :]) == answer
    assert len(answer) / len(steps) >= 5, (seed, len(answer), len(steps))


def test_a_plain_copy_is_as_fast_as_steps_can_be():
    file = source(random.Random(3))
    steps = written(Suffix(), request(1, [*file, 9]), file)
    assert len(file) / len(steps) > 14.5


@pytest.mark.parametrize("seed", range(3))
def test_a_prediction_is_followed_from_its_beginning_and_past_changes(seed):
    rng = random.Random(10 + seed)
    likely = source(rng)
    answer = edited(rng, likely, 40)
    made = request(1, [5, 6, 7], len(answer) + 1, prediction=pack_ids(likely))
    suffix = Suffix()
    first = guess(suffix, made)
    assert (first.drafter, first.ids, first.level) == (PREDICTION, tuple(likely[:K]), 0)
    steps = written(suffix, made, answer)
    assert len(answer) / len(steps) >= 5
    assert sum(held for proposal, held in steps if proposal.drafter == PREDICTION) > 0.7 * len(answer)


def test_a_prediction_that_is_not_told_is_left():
    made = request(1, [5, 6, 7], prediction=pack_ids(range(1000, 1100)))
    steps = written(Suffix(), made, list(range(2000, 2100)))
    assert [bool(proposal.ids) for proposal, _ in steps] == [True] * PATIENCE + [False] * (100 - PATIENCE)


def test_after_a_changed_id_it_goes_on_beside_it():
    """The id is new, so nothing matches: what followed the one in its place is still the best guess."""
    file = list(range(100, 200))
    suffix, made = Suffix(), request(1, [*file, 7])
    made.append(file[:20])
    assert guess(suffix, made).ids == tuple(file[20:35])
    made.append([file[20], 999])  # in place of file[21]
    assert guess(suffix, made) == (OWN, tuple(file[22:37]), 0)
    made.append(file[22:24])
    assert guess(suffix, made).ids == tuple(file[24:39])


def test_of_equal_places_the_nearest_to_the_last_draft_goes_first():
    """`7` is all over the text; in a copy it is the one that comes next."""
    file = [item for number in range(100, 140) for item in (number, 7)]
    suffix, made = Suffix(), request(1, [*file, 9, 7, 50, 7, 51, 7, 52, 9])
    made.append(file[:20])
    assert guess(suffix, made).ids == tuple(file[20:35])
    made.append([999, 7])  # in place of file[20]
    assert guess(suffix, made).ids == tuple(file[22:37])


def test_where_the_last_draft_goes_on_counts_more_than_equal_places():
    file = [item for number in range(100, 140) for item in (number, 7, 8)]
    suffix, made = Suffix(), request(1, [*file, 9])
    made.append(file[:30])
    assert guess(suffix, made).ids == tuple(file[30:45])
    made.append([999, 7, 8])  # in place of file[30]
    assert guess(suffix, made).ids == tuple(file[33:48])


def test_a_long_change_leaves_the_place_beside_it():
    """Also through steps in which nothing is proposed."""
    file = [item for number in range(100, 140) for item in (number, 7)]
    suffix, made = Suffix(), request(1, [*file, 9])
    made.append(file[:20])
    for token in range(900, 900 + PATIENCE + 6):
        assert guess(suffix, made).ids == () or token < 901 + PATIENCE
        made.append([token])
    made.append([7])
    assert guess(suffix, made).ids[:1] == (file[20 + PATIENCE + 8],)


def test_the_most_frequent_continuation_wins_and_of_equals_the_latest():
    def next_after(*texts):
        return guess(Suffix(), request(1, [*apart(texts), 3, 4, 5]), 2)

    common, rare, late = [3, 4, 5, 10, 11], [3, 4, 5, 20, 21], [3, 4, 5, 30, 31]
    assert next_after(common, rare, common, rare, common, rare, common).ids == (10, 11)
    assert next_after(common, common, rare).ids == (10, 11)
    assert next_after(common, rare).ids == (20, 21)
    assert next_after(rare, late, common).ids == (10, 11)


def test_levels_say_how_much_there_is_to_go_by():
    def level(*texts, tail):
        return guess(Suffix(), request(1, [*apart(texts), *tail])).level

    text = list(range(100, 150))
    assert [level(text, tail=text[:size]) for size in (1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 40)] == [
        *(2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7)
    ]
    one, two, other = [1, 2, 3, 60, 61], [1, 2, 3, 60, 62], [1, 2, 3, 70]
    assert level(one, tail=[1, 2, 3]) == 3
    assert level(one, two, tail=[1, 2, 3]) == 5
    assert level(one, two, other, other, tail=[1, 2, 3]) == 1
    assert level(one, other, [1, 2, 3, 80], tail=[1, 2, 3]) == 0


def test_a_repetition_goes_on_beyond_the_end_of_the_text():
    assert guess(Suffix(), request(1, [9, 1, 2, 3, 1, 2, 3, 1, 2])).ids == (3, 1, 2) * 5
    assert guess(Suffix(), request(1, [8, 5, 5])).ids == (5,) * K


def test_nothing_matches_nothing_is_said():
    assert guess(Suffix(), request(1, range(1000))) == NOTHING


@pytest.mark.parametrize("seed", range(4))
def test_random_lives(seed):
    """Whatever is asked and committed: as many ids as wished at most, all of them seen before; asked again the same."""
    rng = random.Random(50 + seed)
    for _ in range(25):
        vocab, suffix, alive = rng.choice([2, 5, 40]), Suffix(Corpus(limit=4000)), {}
        seen = set()
        for number in range(300):
            if rng.random() < 0.1 and len(alive) < 4:
                prompt, likely = ([rng.randrange(vocab) for _ in range(rng.randrange(size, 60))] for size in (1, 0))
                alive[number] = request(number, prompt, 200, prediction=pack_ids(likely), cache=rng.random() < 0.8)
                seen |= {*prompt, *likely}
            wishes = [Wish(each, min(rng.randrange(1, K + 1), each.room)) for each in alive.values() if each.room > 0]
            proposals = suffix.propose(wishes)
            assert suffix.propose(wishes) == proposals
            for (each, most), proposal in zip(wishes, proposals, strict=True):
                assert len(proposal.ids) <= most
                assert set(proposal.ids) <= seen
                assert proposal.drafter in NAMES if proposal.ids else proposal == NOTHING
                assert 0 <= proposal.level <= 9
                held = rng.randrange(len(proposal.ids) + 1)
                each.append([*proposal.ids[:held], rng.randrange(vocab)])
                seen |= set(each.ids[-1:])
            for each in [each for each in alive.values() if each.room <= 0 or rng.random() < 0.02]:
                suffix.end(alive.pop(each.id))
        assert suffix._readers.keys() <= alive.keys()


def test_the_same_twice():
    def lived():
        rng, suffix = random.Random(9), Suffix()
        return [
            written(suffix, request(number, source(rng, 500)), edited(rng, source(rng, 300), 9)) for number in range(4)
        ]

    assert lived() == lived()


def test_a_call_takes_in_a_slice_at_most():
    """A prompt of 100,000 ids is known after some steps; meanwhile what was taken in is drafted from."""
    file = [number % 60_000 for number in range(100_000)]
    suffix, made = Suffix(), request(1, [*file, 7, 8])
    made.append(file[:10])
    grams = suffix._reader(made)._own
    sizes = [0]
    while grams.size < made.length:
        assert guess(suffix, made).ids == (tuple(file[10:25]) if grams.size else ())
        sizes.append(grams.size)
    assert max(after - before for before, after in pairwise(sizes)) == SLICE
    assert len(sizes) == 100_012 // SLICE + 2


def test_requests_and_the_corpus_share_the_slice(monkeypatch):
    taken = []
    take = type(Suffix()._reader(request(1, [1]))._own).take
    monkeypatch.setattr(
        "fwd.engine.speculate.grams.Grams.take", lambda self, most: taken.append(n := take(self, most)) or n
    )
    corpus = Corpus()
    corpus.record(array("i", range(20_000)))
    suffix = Suffix(corpus)
    wishes = [Wish(request(number, range(3000)), K) for number in range(4)]
    for _ in range(5):
        suffix.propose(wishes)
        assert sum(taken) <= SLICE
        taken.clear()


def test_answers_are_drafted_from_once_they_ended():
    answer = source(random.Random(5), 400)
    suffix, first = Suffix(), request(1, [1, 2, 3])
    written(suffix, first, answer)
    suffix.end(first)
    assert suffix.corpus.tokens == 400
    again = request(2, [4, 5, 6])
    steps = written(suffix, again, answer)
    assert len(answer) / len(steps) > 5
    assert {proposal.drafter for proposal, _ in steps if len(proposal.ids) == K} >= {CORPUS}


def test_what_may_not_be_cached_is_not_kept_nor_is_a_prompt():
    suffix = Suffix()
    for number, keep in enumerate([False, True]):
        made = request(number, range(100, 130), cache=keep)
        made.append([40, 41, 42])
        guess(suffix, made)
        suffix.end(made)
    assert [list(grams.text) for grams in suffix.corpus.texts] == [[40, 41, 42]]
    suffix.end(request(3, [1, 2]))  # it was never asked for and has said nothing
    assert suffix.corpus.tokens == 3


def test_a_dropped_corpus_is_not_drafted_from_any_more():
    suffix, made = Suffix(), request(1, [1, 2, 3])
    suffix.corpus.record(array("i", range(100, 200)))
    made.append(range(100, 110))
    assert guess(suffix, made).drafter == CORPUS
    assert suffix.corpus.drop() == 100
    made.append([110])
    assert guess(suffix, made) == NOTHING

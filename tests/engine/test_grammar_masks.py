"""What a grammar lets through next, and what it forces."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import regex
from grammars import (
    EOS,
    GRAMMARS,
    SPECIAL,
    TEXTS,
    TIGHT,
    Forcing,
    allowed,
    answer,
    begun,
    engine,
    follow,
    matcher,
    patient,  # noqa: F401  # a fixture
    schema,
    text_of,
    vocabulary,
)
from mock_runner import VOCAB

from fwd.engine.grammar import Grammars
from fwd.engine.speculate.drafter import Wish
from fwd.engine.speculate.forced import Forced
from fwd.grammar.compiled import Tokens

DIGITS = GRAMMARS["digits"][0]


@pytest.mark.parametrize(
    ("name", "pattern"), [("digits", r"[0-9]{3}-[0-9]{4}"), ("words", r"(abc|ab|xyz|a long piece)( (abc|ab|xyz))*\.?")]
)
def test_masks_are_the_tokens_whose_text_fits(name, pattern):
    rng, seen = random.Random(3), 0
    for _ in range(40):
        found, text = matcher(name), ""
        while not found.ended and len(text) < 40:
            found.prepare()
            fits = [
                token
                for token, piece in enumerate(TEXTS)
                if piece and regex.fullmatch(pattern, text + piece.decode(), partial=True)
            ]
            fits = [token for token in fits if token not in (*EOS, *SPECIAL)]
            whole = regex.fullmatch(pattern, text)
            assert allowed(found.masks[0]) == fits + (list(EOS) if whole else [])
            token = rng.choice(allowed(found.masks[0]))
            assert found.take(token)
            text += text_of([token])
            seen += 1
    assert seen > 100


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("name", GRAMMARS)
def test_masks_along_drafts_are_those_of_who_goes_there(name):
    rng, grammar = random.Random(name), GRAMMARS[name][0]
    for seed in range(10):
        ids, _ = answer(grammar, [1], seed, 40)
        found = matcher(name)
        for place, token in enumerate(ids):
            drafts = [each if rng.random() < 0.9 else rng.randrange(VOCAB) for each in [*ids, *EOS][place:][:9]]
            if rng.random() < 0.5:
                found.forced(15)
            held = found.prepare(drafts)
            assert len(found.masks) == held + 1
            for count in range(held + 1):
                other = follow(grammar, [*ids[:place], *drafts[:count]])
                fits = np.frombuffer(other.compute_bitmask(), np.uint32)
                assert other.is_stopped() or allowed(found.masks[count]) == allowed(fits)
            assert held == len(drafts) or not follow(grammar, [*ids[:place], *drafts[: held + 1]])
            assert found.take(token)


def test_special_tokens_are_never_text():
    found = matcher("any")
    for text in (b'"', b"a"):
        assert found.take(TEXTS.index(text))
        found.prepare()
    assert not {*allowed(found.masks[0])} & {*EOS, *SPECIAL}
    assert {*allowed(found.masks[0])} >= {TEXTS.index(b"ab"), TEXTS.index(b"true")}


def test_special_tokens_may_be_named():
    assert answer('lark:start: "ab" <|x|> "ab"', [1], 0, 9)[0].count(SPECIAL[0]) == 1


def test_a_vocabulary_without_an_end():
    made = Grammars(VOCAB)
    made.learn(vocabulary(eos=()))
    found = begun(GRAMMARS["words"][0], grammars=made)
    assert found.take(TEXTS.index(b"ab"))
    found.prepare()
    assert found.masks[0].shape == (-(-VOCAB // 32),)
    assert [TEXTS[token] for token in allowed(found.masks[0])] == [b".", b" ", b"c"]
    assert found.take(TEXTS.index(b"."))
    assert found.ended


@pytest.mark.parametrize("vocab", [64, 96, 97, 128, 151])
def test_a_model_has_more_ids_than_a_tokenizer_or_less(vocab):
    made = Grammars(vocab)
    made.learn(vocabulary())
    found = begun('regex:"?a*', grammars=made)
    assert found.masks[0].shape == (-(-vocab // 32),)
    bits = np.unpackbits(found.masks[0].view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits).max() < vocab
    assert {TEXTS[each] for each in np.flatnonzero(bits).tolist() if each not in EOS} == {b'"', b"a", b'"a'}


def test_text_is_cut_by_merges_in_the_order_of_ids():
    tokens = Tokens(vocabulary(), VOCAB)
    pieces = [TEXTS[token] for token in tokens(b'{"a":true,"abc":12}')]
    assert pieces == [b'{"', b"a", b'":', b"t", b"r", b"u", b"e", b",", b'"a', b"b", b"c", b'":', b"12", b"}"]
    assert tokens("é{ü{".encode()) == (TEXTS.index("é".encode()), 0)
    assert tokens(b"") == ()


@pytest.mark.usefixtures("patient")
def test_forced_text_is_drafted_up_to_its_last_token():
    text = schema(
        type="object", properties={"abc": {"const": "xyz"}}, required=["abc"], additionalProperties=False,
        **{"x-guidance": TIGHT},
    )  # fmt: skip
    found = begun(text)
    tokens = Tokens(vocabulary(), VOCAB)(b'{"abc":"xyz"}')
    assert found.forced(15) == tokens[:-1]
    assert found.forced(3) == tokens[:3]
    assert found.prepare(found.forced(15)) == len(tokens) - 1
    assert len(allowed(found.masks[0])) > 1, "nothing is committed: how it is cut is the model's choice"
    assert found.take(tokens[0])
    assert found.forced(15) == tokens[1:-1]


@pytest.mark.usefixtures("patient")
def test_forced_drafts_save_steps():
    text, obeys = GRAMMARS["tight"]
    plain, drafted = engine(), engine(speculator=Forcing(SimpleNamespace(randrange=lambda most: most - 1), "grammar"))
    ids, _ = plain.ask(1, [1], tokens=90, grammar=text, seed=4)
    assert drafted.ask(1, [1], tokens=90, grammar=text, seed=4)[0] == ids
    assert obeys(text_of(ids))
    timing = drafted.results[1].timing
    assert timing.drafted.keys() == {"grammar"}
    assert timing.steps + timing.accepted["grammar"] == plain.results[1].timing.steps


def test_where_there_is_a_choice_or_no_grammar_nothing_is_drafted():
    request = SimpleNamespace(grammar=None)
    assert Forced().propose([Wish(request, 5)])[0].ids == ()
    assert matcher("digits").forced(15) == ()

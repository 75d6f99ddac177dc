"""A grammar that is wrong, too complex or not followed fails its own request and no other."""

import random

import numpy as np
import pytest
from grammars import EOS, GRAMMARS, SPECIAL, TEXTS, Forcing, allowed, answer, begun, engine, matcher, vocabulary
from guesser import Knowing
from mock_engine import Engine, submit
from mock_runner import VOCAB
from msgspec.structs import replace

from fwd.errors import BadFrameError, GrammarError
from fwd.grammar import compiled as module
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Failed, Finished
from fwd.protocol.values import Limits

DIGITS = GRAMMARS["digits"][0]


@pytest.mark.parametrize(
    "text",
    [
        "json_schema:{",
        "json_schema:" + "[" * 60_000,
        'json_schema:{"type": "nonsense"}',
        "regex:(",
        "regex:" + "(" * 30_000,
        "lark:",
        "lark:start: nothing",
        "lark:" + "start: " + "(" * 30_000,
        "json:{}",
        "nothing",
        "{}",
        "\x00",
    ],
    ids=lambda text: repr(text[:20]),
)
def test_a_grammar_that_does_not_compile_fails_its_request_alone(text):
    made = engine()
    made.handle(submit(1, [1, 2, 3]), submit(2, [1, 2, 3], grammar=text))
    made.idle()
    failed = made.results[2]
    assert isinstance(failed, Failed)
    assert failed.code == GrammarError.code
    assert len(failed.message) < 400
    assert "\n" not in failed.message
    assert isinstance(made.results[1], Finished)
    assert made.ask(3, [1], tokens=20, grammar=DIGITS)[0] == answer(DIGITS, [1], 0, 20)[0]


@pytest.mark.parametrize("nature", ["", "oracle", "liar", "grammar"])
def test_a_grammar_beyond_its_limits_fails_its_request_alone_at_the_same_token(nature, monkeypatch):
    monkeypatch.setitem(module.NARROW, "lark", {"max_items_in_row": 12})
    text = "lark:start: " + " | ".join(f"a{n}" for n in range(30)) + "\n"
    text += "\n".join(f'a{n}: "[" "{"abcdefghij"[n % 10]}" /[a-z]+/' for n in range(30))
    rng, healthy = random.Random(1), answer(DIGITS, [7], 1, 20)[0]
    knowing = Knowing(rng, nature, {1: [2, 22, 22, 22], 2: healthy}, vocab=VOCAB)
    made = engine(speculator={"": None, "grammar": Forcing(rng, nature)}.get(nature, knowing))
    made.handle(submit(1, [1], tokens=30, grammar=text), submit(2, [7], tokens=20, grammar=DIGITS, seed=1))
    made.idle()
    assert isinstance(made.results[1], Failed)
    assert made.results[1].code == GrammarError.code
    assert made.results[1].message.startswith("the grammar cannot go on with token 2: Parser Error: Current row has")
    assert 1 not in made.output, "what does not follow is not told"
    assert made.output[2] == healthy
    made.space.check()
    assert made.space.main.available == made.space.main.total


def test_a_state_that_drafts_have_spoiled_is_made_again():
    class Fragile:
        """A state that ends in an error as soon as it goes along a draft."""

        def __init__(self, state):
            self.state = state

        def __getattr__(self, name):
            return getattr(self.state, name)

        def try_consume_tokens(self, ids):
            self.state.consume_token(SPECIAL[0])
            return 1

    found, other = matcher("record"), matcher("record")
    (token,) = (each for each in allowed(found.masks[0]) if TEXTS[each] == b"{")
    for each in (found, other):
        assert each.take(token)
    other.prepare()
    found._state = Fragile(found._state)
    assert found.prepare([1, 2, 3]) == 0
    assert not found.error
    assert [mask.tolist() for mask in found.masks] == [mask.tolist() for mask in other.masks]
    found._state = Fragile(found._state)
    assert (found.prepare([1, 2, 3]), found.forced(9)) == (0, ())
    assert not found._state.is_error(), "it is not tried again: making it anew takes as long as the answer is"


def test_drafts_never_bring_a_request_to_the_limits_of_its_lexer(monkeypatch):
    """What is forced is looked at far ahead, which takes more states than the answer does."""
    monkeypatch.setitem(module.LIMITS, "max_lexer_states", 200)
    text = f"regex:{'a' * 500}"
    made = engine(speculator=Forcing(random.Random(1), "grammar"))
    for number in range(2):
        assert made.ask(number, [7], tokens=20, grammar=text)[0] == [TEXTS.index(b"a")] * 20
    found, other = begun(text), begun(text)
    found.prepare(found.forced(15))
    assert found._alone, "that look was beyond the limits"
    assert not found.error
    assert found.masks[0].tolist() == other.masks[0].tolist()


def test_requests_of_one_grammar_do_not_use_up_the_limits_of_each_other(monkeypatch):
    monkeypatch.setitem(module.LIMITS, "max_lexer_states", 500)
    made = engine(seqs=4)
    for number in range(30):
        made.handle(submit(number, [number], tokens=20, grammar="regex:[ab]*a[ab]{20}", seed=number))
    made.idle()
    assert all(isinstance(result, Finished) for result in made.results.values()), made.results


def test_what_was_emitted_and_does_not_follow_fails_its_request():
    ids, _ = answer(DIGITS, [1], 0, 20)
    made = engine()
    made.handle(replace(submit(1, [1], tokens=20, grammar=DIGITS), emitted=pack_ids([*ids[:2], 4, 4])))
    made.until(1)
    assert made.results[1].code == GrammarError.code
    assert not made.loop.busy


def test_a_stream_that_had_ended_when_its_engine_died_ends():
    ids, _ = answer(DIGITS, [1], 0, 20)
    made = engine()
    made.handle(replace(submit(1, [1], tokens=20, grammar=DIGITS), emitted=pack_ids(ids)))
    made.idle()
    assert (made.results[1].reason, made.output.get(1)) == ("stop", None)


def test_where_everything_is_banned_and_masked_the_request_fails():
    """The sampler has to draw something: nobody is told."""
    made = engine()
    limits = Limits(max_tokens=9, min_tokens=5, stop_ids=EOS)
    made.handle(submit(1, [1], grammar=GRAMMARS["empty"][0], limits=limits))
    draw = made.runner._draw
    made.runner._draw = lambda request, end=None, mask=None: draw(request, end, np.zeros_like(mask))
    made.idle()
    assert made.results[1].code == GrammarError.code
    assert 1 not in made.output


def test_a_grammar_before_the_vocabulary_is_a_bad_frame():
    with pytest.raises(BadFrameError, match="before the vocabulary"):
        Engine().handle(submit(1, [1], grammar=DIGITS))


@pytest.mark.parametrize("ends", [[3, 2], [1, 2, 3, 400], [-1, 5]])
def test_a_vocabulary_that_is_not_whole_is_a_bad_frame(ends):
    with pytest.raises(BadFrameError, match="does not end where its tokens do"):
        Engine().handle(replace(vocabulary(), ends=pack_ids(ends)))

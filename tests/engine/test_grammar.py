"""Every answer obeys its grammar and is the same whoever drafts, whatever dies: told by the grammar library alone."""

import random
from functools import cache
from types import SimpleNamespace

import grammars
import numpy as np
import pytest
import regex
from grammars import EOS, GRAMMARS, SPECIAL, TEXTS, TIGHT, answer, schema, text_of, vocabulary
from guesser import NATURES, Guesser, Knowing
from mock_engine import PAGE, Engine, submit
from mock_runner import VOCAB
from msgspec.structs import replace
from test_lives import LONGEST, World, units_of

from fwd.engine import grammar as module
from fwd.engine.grammar import Grammars, Tokens
from fwd.engine.speculate.drafter import Wish
from fwd.engine.speculate.forced import Forced
from fwd.errors import BadFrameError, GrammarError
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Failed, Finished, Submit
from fwd.protocol.values import Limits

DIGITS = GRAMMARS["digits"][0]


class Forcing(Guesser):
    """Drafts what grammars force."""

    def _guess(self, request, count):
        if not count:
            return ()
        (proposal,) = Forced().propose([Wish(request, count)])
        assert len(proposal.ids) <= count
        return proposal.ids


def engine(**settings):
    made = Engine(**settings)
    made.handle(vocabulary())
    return made


@cache
def known():
    made = Grammars(VOCAB)
    made.learn(vocabulary())
    return made


def matcher(name, emitted=()):
    return known().matcher(GRAMMARS[name][0], emitted)


def allowed(mask):
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little", count=VOCAB)).tolist()


# ---- whole answers ----


@pytest.mark.parametrize("name", GRAMMARS)
def test_an_answer_obeys_its_grammar_and_ends_where_that_does(name):
    text, obeys = GRAMMARS[name]
    made, stops = engine(seqs=16, units=(400,)), 0
    for seed in range(16):
        made.handle(submit(seed + 1, [1, 2, seed], tokens=90, grammar=text, seed=seed))
    made.idle()
    for seed in range(16):
        ids, (reason, stop_id) = answer(text, [1, 2, seed], seed, 90)
        result = made.results[seed + 1]
        assert (made.output[seed + 1], result.reason, result.stop_id) == (ids, reason, stop_id)
        if reason == "stop":
            assert obeys(text_of(ids)), text_of(ids)
            stops += 1
    assert stops >= 12


class Constrained(World):
    """A world in which most requests have a grammar."""

    def __init__(self, rng, layout, ahead):
        self.answers, self.names = {}, {}
        super().__init__(rng, layout, ahead)

    def start(self):
        if not self.answers:
            self.nature = self.rng.choice([*NATURES, "grammar", ""])
        speculator = {"grammar": Forcing(self.rng, "grammar", self.most, PAGE), "": None}.get(
            self.nature, Knowing(self.rng, self.nature, self.answers, self.most, PAGE, VOCAB)
        )
        units = units_of(self.groups, self.full, self.seqs, self.spare)
        self.engine = Engine(self.groups, units, self.seqs, ahead=self.ahead, speculator=speculator)
        self.engine.handle(vocabulary())

    def submit(self):
        rng, number = self.rng, len(self.requests) + 1
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 16))]
        name = rng.choice([*GRAMMARS, "record", "tight", ""])
        request = Submit(
            id=number,
            prompt=pack_ids(prompt),
            seed=rng.randrange(1000),
            choice=rng.randrange(2),
            limits=Limits(
                max_tokens=rng.randrange(1, LONGEST - len(prompt) + 1),
                stop_ids=rng.choice([(), EOS, EOS[:1], (*EOS, rng.randrange(40))]),
            ),
            priority=rng.choice(["interactive", "interactive", "background"]),
            grammar=GRAMMARS[name][0] if name else "",
        )
        self.requests[number], self.output[number], self.scores[number] = request, [], []
        self.names[number] = name
        self.answers[number] = [*self.answer(request), *rng.choices([*EOS, *SPECIAL, 1], k=4)]
        self.engine.handle(request)

    def answer(self, request):
        return self.ending(request)[0]

    def ending(self, request):
        if not request.grammar:
            return super().answer(request), None
        return answer(
            request.grammar,
            request.prompt.cast("i"),
            request.seed,
            request.limits.max_tokens,
            stop_ids=request.limits.stop_ids,
            choice=request.choice,
        )

    def finish(self):
        while self.engine.loop.busy:
            self.step()
        assert not [result for result in self.results.values() if isinstance(result, Failed)]
        super().finish()
        for number, request in self.requests.items():
            result, (ids, ending) = self.results[number], self.ending(request)
            if ending is None or result.reason == "cancelled":
                continue
            assert (result.reason, result.stop_id) == ending
            if ending[0] == "stop" and not {*request.limits.stop_ids} - {*EOS}:
                assert GRAMMARS[self.names[number]][1](text_of(ids))


def live(seed, layout):
    rng = random.Random(f"{seed} {layout}")
    world = Constrained(rng, layout, ahead=seed % 2 == 0)
    actions = [world.step] * 30 + [world.submit] * 6 + [world.cancel, world.evict, world.ping]
    for _ in range(60):
        world.crash() if rng.random() < 0.02 else rng.choice(actions)()
    world.finish()


@pytest.mark.parametrize("layout", ["full", "full+sliding", "all"])
@pytest.mark.parametrize("block", range(4))
def test_nothing_that_happens_changes_an_answer(layout, block):
    for seed in range(block * 8, block * 8 + 8):
        live(seed, layout)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", ["full", "full+sliding", "all"])
def test_thousands_of_lives(layout):
    for seed in range(1000, 2000):
        live(seed, layout)


@pytest.mark.parametrize("name", ["digits", "tight", "empty"])
def test_the_end_of_a_grammar_within_a_run_of_drafts_that_hold(name):
    text = GRAMMARS[name][0]
    ids, ending = answer(text, [5], 3, 60)
    knowing = Knowing(random.Random(1), "oracle", {1: [*ids, *EOS, *EOS]}, vocab=VOCAB)
    knowing._guess = lambda request, count: (*knowing.answers[1][request.output :][:count],)
    knowing.rng = SimpleNamespace(randrange=lambda most: most - 1)
    made = engine(speculator=knowing)
    output, timing = made.ask(1, [5], tokens=60, grammar=text, seed=3)

    assert output == ids
    assert (made.results[1].reason, made.results[1].stop_id) == ending
    assert timing.steps <= 1 + len(ids) // 5
    assert timing.accepted.get("oracle", 0) >= len(ids) - 1 - timing.steps


def test_a_step_with_a_grammar_is_not_run_ahead():
    made = engine(ahead=True, seqs=2)
    made.handle(submit(1, [1], tokens=40, grammar=DIGITS), submit(2, [2], tokens=40))
    made.until(1)
    assert made.runner.most == 1
    made.idle()
    assert made.runner.most == 2


def test_preempted_in_mid_answer():
    text = GRAMMARS["record"][0]
    made = engine(units=(20,), seqs=4)
    for number in range(1, 5):
        made.handle(submit(number, [number] * 3, tokens=60, grammar=text, seed=number))
    made.idle()
    for number in range(1, 5):
        assert made.output[number] == answer(text, [number] * 3, number, 60)[0]
    assert sum(launch[0] == "prefill" for launch in made.runner.launches) > 4, "somebody was preempted"


# ---- what goes wrong ----


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
    monkeypatch.setattr(module, "LIMITS", {**module.LIMITS, "max_items_in_row": 12})
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


def test_what_was_emitted_and_does_not_follow_fails_its_request():
    ids, _ = answer(DIGITS, [1], 0, 20)
    made = engine()
    made.handle(replace(submit(1, [1], tokens=20, grammar=DIGITS), emitted=pack_ids([*ids[:2], 4, 4])))
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


# ---- masks ----


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


@pytest.mark.parametrize("name", GRAMMARS)
def test_masks_along_drafts_are_those_of_who_goes_there(name):
    rng = random.Random(name)
    for seed in range(10):
        ids, _ = answer(GRAMMARS[name][0], [1], seed, 40)
        found = matcher(name)
        for place, token in enumerate(ids):
            drafts = [each if rng.random() < 0.9 else rng.randrange(VOCAB) for each in [*ids, *EOS][place:][:9]]
            if rng.random() < 0.5:
                found.forced(15)
            held = found.prepare(drafts)
            assert len(found.masks) == held + 1
            for count in range(held + 1):
                other = matcher(name, [*ids[:place], *drafts[:count]])
                assert other.ended or allowed(found.masks[count]) == allowed(other.masks[0])
            if held < len(drafts):
                with pytest.raises(GrammarError):
                    matcher(name, [*ids[:place], *drafts[: held + 1]])
            assert found.take(token)


def without_rollback(self, drafts=()):
    held = self._walk(drafts)
    self._state.try_consume_tokens(list(drafts[:held]))
    return held


def in_the_mask_of_the_first(self, drafts=()):
    held = self._walk(drafts)
    self.masks = [self.masks[0]] * (held + 1)
    return held


def never_ending(self, token):
    return self._state.is_stopped() or self._state.consume_token(token)


@pytest.mark.parametrize(
    ("owner", "broken"),
    [
        ("Matcher.prepare", without_rollback),
        ("Matcher.prepare", in_the_mask_of_the_first),
        ("Matcher.take", never_ending),
        ("until_end", lambda _, drawn: drawn),
    ],
    ids=["no rollback", "one mask", "no end", "not cut at the end"],
)
def test_planted_bugs_are_caught(owner, broken, monkeypatch):
    monkeypatch.setattr(f"fwd.engine.loop.{owner}" if owner == "until_end" else f"fwd.engine.grammar.{owner}", broken)

    def lives():
        for seed in range(20):
            live(seed, "full")

    with pytest.raises(AssertionError):
        lives()


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
    found = made.matcher(GRAMMARS["words"][0], [])
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
    found = made.matcher('regex:"?a*', [])
    assert found.masks[0].shape == (-(-vocab // 32),)
    bits = np.unpackbits(found.masks[0].view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits).max() < vocab
    assert {TEXTS[each] for each in np.flatnonzero(bits).tolist() if each not in EOS} == {b'"', b"a", b'"a'}


# ---- forced text ----


def test_text_is_cut_by_merges_in_the_order_of_ids():
    tokens = Tokens(vocabulary(), VOCAB)
    pieces = [TEXTS[token] for token in tokens(b'{"a":true,"abc":12}')]
    assert pieces == [b'{"', b"a", b'":', b"t", b"r", b"u", b"e", b",", b'"a', b"b", b"c", b'":', b"12", b"}"]
    assert tokens("é{ü{".encode()) == (TEXTS.index("é".encode()), 0)
    assert tokens(b"") == ()


def test_forced_text_is_drafted_up_to_its_last_token():
    text = schema(
        type="object", properties={"abc": {"const": "xyz"}}, required=["abc"], additionalProperties=False,
        **{"x-guidance": TIGHT},
    )  # fmt: skip
    found = known().matcher(text, [])
    tokens = Tokens(vocabulary(), VOCAB)(b'{"abc":"xyz"}')
    assert found.forced(15) == tokens[:-1]
    assert found.forced(3) == tokens[:3]
    assert found.prepare(found.forced(15)) == len(tokens) - 1
    assert len(allowed(found.masks[0])) > 1, "nothing is committed: how it is cut is the model's choice"
    assert found.take(tokens[0])
    assert found.forced(15) == tokens[1:-1]


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


def test_choices_of_one_request_share_what_is_compiled(monkeypatch):
    made, compiled = Grammars(VOCAB), []
    made.learn(vocabulary())
    monkeypatch.setattr(module, "serialised", lambda text: compiled.append(text) or grammars.serialised(text))
    for _ in range(3):
        made.matcher(DIGITS, [])
    assert compiled == [DIGITS]
    for number in range(module.KEPT):
        made.matcher(f"regex:{number}", [])
    made.matcher(DIGITS, [])
    assert len(compiled) == module.KEPT + 2
    assert len(made._compiled) == module.KEPT

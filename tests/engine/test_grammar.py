"""Every answer obeys its grammar and is the same whoever drafts, whatever dies: told by the grammar library alone."""

import random
from types import SimpleNamespace

import pytest
from grammars import EOS, GRAMMARS, SPECIAL, Forcing, answer, engine, patient, text_of, vocabulary  # noqa: F401  # a fixture
from guesser import NATURES, Knowing
from mock_engine import PAGE, Engine, submit
from mock_runner import VOCAB
from test_lives import LONGEST, World, units_of

from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Failed, Submit
from fwd.protocol.values import Limits

DIGITS = GRAMMARS["digits"][0]


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


@pytest.mark.usefixtures("patient")
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
    made.handle(submit(1, [1], tokens=40, grammar=DIGITS))
    while 1 not in made.output:
        made.step()  # its grammar is compiled
    made.handle(submit(2, [2], tokens=40))
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


def without_rollback(self, drafts=()):
    held = self._walked(drafts)
    self._state.try_consume_tokens(list(drafts[:held]))
    return held


def in_the_mask_of_the_first(self, drafts=()):
    held = self._walked(drafts)
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

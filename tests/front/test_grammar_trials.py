"""Grammars are tried in a process that they may exhaust: hostile ones are refused, and nobody waits for them."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
from fakes import Script, answer
from rig import serving
from test_local import dial

import fwd.demo
from fwd.errors import EngineError, GrammarError, OverloadedError
from fwd.front import grammars
from fwd.front.grammars import AT_ONCE, TOO_LATE, TOO_MUCH, GrammarTrials
from fwd.front.prompts import Prompts
from fwd.protocol.ids import pack_ids
from fwd.protocol.local import Accepted
from fwd.protocol.messages import Failed, Finished, Submit, Tokens
from fwd.protocol.values import SPILL, Limits

DEMO = Path(fwd.demo.__file__).parent / "model"


def schema(**fields):
    return "json_schema:" + json.dumps(fields)


def sides(count):
    """A Lark grammar whose rows take the cube of `count`."""
    rules = " | ".join(f"r{n} e | e r{n}" for n in range(count))
    return f'lark:start: e\ne: {rules} | "x"\n' + "\n".join(f"r{n}: /[a-z]{{1,{n + 1}}}/" for n in range(count))


EXHAUSTING = {
    "a multiple": schema(type="integer", multipleOf=9999991),
    "patterns at once": schema(allOf=[{"type": "string", "pattern": f"[ab]*a[ab]{{{n}}}"} for n in range(3, 40)]),
    "an intersection": "lark:start: X\nX: " + " & ".join(f"/(.*a.{{{n}}}b.*)/" for n in range(5, 60)),
    "a first step": sides(600),
}
REFUSED = {
    "alternatives": "regex:" + "(a|b|ab)*" * 3000,
    "repetitions": "regex:" + "(" * 40 + "ab?" + "){1,9}" * 40,
    "nested regex": "regex:" + "(" * 30_000,
    "nested schema": "json_schema:" + '{"items":' * 5000 + "{}" + "}" * 5000,
    "ambiguous": sides(100),
    "refers to itself": schema(**{"$ref": "#"}),
    "refer to each other": schema(
        **{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    ),
    "looks around": "regex:(?!a)b",
    "not supported": schema(type="array", uniqueItems=True),
    "no schema": "json_schema:{",
    "nothing fits": schema(type="integer", minimum=5, maximum=4),
    "no grammar": "text",
    "half a character": "regex:\ud800",
}
FITTING = {
    "record": schema(type="object", properties={"a": {"type": "string"}}, required=["a"]),
    "any": schema(),
    "list": schema(
        **{"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"},
    ),
    "many properties": schema(type="object", properties={f"p{n}": {"type": "string"} for n in range(200)}),
    "words": "regex:([A-Z][a-z]+ ){3,50}[.!?]",
    "nothing": 'lark:start: ""',
    "sums": 'lark:start: e\ne: e "+" t | t\nt: /[0-9]+/ | "(" e ")"',
    "gbnf": 'lark:root ::= item+\nitem ::= "a" | "b"',
}


async def refusal(trials, text):
    with pytest.raises(GrammarError) as caught:
        await trials.check(text, "guided_regex")
    assert caught.value.param == "guided_regex"
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400
    return caught.value.message


@pytest.fixture
def trying(run):
    """Run a scenario that is given trials."""

    def go(scenario):
        async def main():
            trials = GrammarTrials(lambda: Prompts.load(DEMO).vocabulary)
            try:
                await scenario(trials)
            finally:
                trials.close()

        run(main())

    return go


def test_what_exhausts_its_trial_is_refused_once(trying):
    """The kernel ended the trial: there is no verdict of the library's."""

    async def scenario(trials):
        for _ in range(2):
            for text in EXHAUSTING.values():
                assert await refusal(trials, text) == TOO_MUCH
            assert trials.tried == len(EXHAUSTING)

    trying(scenario)


@pytest.mark.parametrize(
    "ends",
    [
        "trial.WALL_SECONDS = 0.001; trial.verdict = lambda *_: signal.pause()",
        "trial.verdict = lambda *_: signal.raise_signal(signal.SIGKILL)",
    ],
    ids=["no CPU came", "no memory was left"],
)
def test_what_a_busy_machine_ended_is_not_held_against_the_grammar(trying, monkeypatch, ends):
    """The trial that waits burns no CPU: only the wall clock can end it."""
    code = f"import signal; from fwd.grammar import trial; {ends}; trial.main()"

    async def scenario(trials):
        with monkeypatch.context() as patch:
            patch.setattr(grammars, "COMMAND", (sys.executable, "-c", code))
            for tried in (1, 2):
                with pytest.raises(OverloadedError, match="try again") as caught:
                    await trials.check(FITTING["any"])
                assert (caught.value.message, caught.value.retry_after) == (TOO_LATE, 1)
                assert trials.tried == tried
        trials.close()
        for _ in range(2):
            await trials.check(FITTING["any"])
        assert trials.tried == 3

    trying(scenario)


def test_a_failure_that_nobody_waited_for_is_not_kept(trying, monkeypatch):
    async def scenario(trials):
        with monkeypatch.context() as patch:
            patch.setattr(grammars, "COMMAND", ("/bin/false",))
            asker = asyncio.ensure_future(trials.check(FITTING["any"]))
            await asyncio.sleep(0)
            asker.cancel()
            await asyncio.wait(trials._verdicts.values())
        await trials.check(FITTING["any"])
        assert trials.tried == 2

    trying(scenario)


def test_cpu_time_alone_refuses_a_grammar(trying, monkeypatch):
    """No wall clock can end the trial."""
    code = "from fwd.grammar import trial; trial.WALL_SECONDS = 0; trial.main()"
    monkeypatch.setattr(grammars, "COMMAND", (sys.executable, "-c", code))

    async def scenario(trials):
        for _ in range(2):
            assert await refusal(trials, EXHAUSTING["a multiple"]) == TOO_MUCH
        assert trials.tried == 1

    trying(scenario)


def test_what_cannot_be_compiled_is_refused_once(trying):
    async def scenario(trials):
        for _ in range(2):
            for text in REFUSED.values():
                assert await refusal(trials, text) != TOO_MUCH
            assert trials.tried <= len(REFUSED)

    trying(scenario)


def test_what_is_too_long_is_not_tried(trying):
    async def scenario(trials):
        assert f"at most {SPILL}" in await refusal(trials, "regex:" + "a" * (4 << 20))
        assert trials.tried == 0

    trying(scenario)


def test_what_fits_is_tried_once_whoever_asks_at_once(trying, monkeypatch):
    async def scenario(trials):
        await asyncio.gather(*[trials.check(text) for text in FITTING.values() for _ in range(3)])
        assert trials.tried == len(FITTING)
        monkeypatch.setattr(grammars, "KEPT", 4)
        for number in range(20):
            await trials.check(f"regex:{number % 5}")
        assert trials.tried == len(FITTING) + 20, "the one that is asked for next is always forgotten"
        await trials.check("regex:4")
        assert trials.tried == len(FITTING) + 20

    trying(scenario)


def test_who_leaves_does_not_end_a_trial_that_others_wait_for(trying):
    async def scenario(trials):
        first = asyncio.ensure_future(trials.check(FITTING["any"]))
        second = asyncio.ensure_future(trials.check(FITTING["any"]))
        await asyncio.sleep(0)
        first.cancel()
        await second
        assert trials.tried == 1

    trying(scenario)


def test_a_process_that_was_killed_is_started_again(trying):
    async def scenario(trials):
        await trials.check(FITTING["any"])
        trials._process._child.kill()
        trials._process._child.wait()
        await trials.check(FITTING["words"])
        assert await refusal(trials, REFUSED["no grammar"])

    trying(scenario)


def test_one_that_cannot_be_started_is_said_and_not_remembered(trying, monkeypatch):
    async def scenario(trials):
        with monkeypatch.context() as patch:
            patch.setattr(grammars, "COMMAND", ("/bin/false",))
            with pytest.raises(EngineError, match="cannot be tried"):
                await trials.check(FITTING["any"])
        await trials.check(FITTING["any"])

    trying(scenario)


def test_no_more_than_a_few_are_tried_at_once(trying, monkeypatch):
    now, most = 0, 0
    ask = grammars.TrialProcess.ask

    async def counted(self, text):
        nonlocal now, most
        now += 1
        most = max(most, now)
        try:
            return await ask(self, text)
        finally:
            now -= 1

    monkeypatch.setattr(grammars.TrialProcess, "ask", counted)

    async def scenario(trials):
        await asyncio.gather(*[trials.check(f"regex:{number}") for number in range(8)])
        assert most == AT_ONCE

    trying(scenario)


def test_a_local_client_hears_why_and_a_stream_beside_it_has_every_token(tmp_path):
    script = Script(vocab=127, low=32, context=4096)
    plain = Submit(id=1, prompt=pack_ids([1, 2, 3]), seed=5, limits=Limits(max_tokens=300))
    hostile = Submit(id=2, prompt=pack_ids([1]), grammar=EXHAUSTING["a multiple"], limits=Limits(max_tokens=5))
    fitting = Submit(id=3, prompt=pack_ids([1]), seed=1, grammar=FITTING["any"], limits=Limits(max_tokens=5))
    with serving(tmp_path / "fwd.sock", script) as daemon:
        channel = dial(daemon)
        channel.send(hostile, plain, fitting)
        ids, ended, tags = {}, set(), {}
        while len(ended) < 2 or 2 not in tags:
            match channel.receive(30):
                case Accepted(tag=tag, id=number):
                    tags[number] = tag
                    ids[tag] = []
                case Tokens(id=number, ids=more):
                    ids[tags[number]] += more
                case Finished(id=number):
                    ended.add(tags[number])
                case Failed() as failed:
                    assert (failed.tag, failed.code, failed.param) == (2, "invalid_grammar", "grammar")
                    assert failed.message == TOO_MUCH
                    tags[2] = 2
        channel.close()
    assert ended == {1, 3}
    assert ids[1] == answer(script, plain)[0]

"""Before its first stream with a grammar each engine is told the vocabulary, once."""

import asyncio
from pathlib import Path

import pytest
from fakes import Fault, Script
from rig import Letters, Transcript, assert_answered, keeping, stream

import fwd.demo
from fwd.config import Config
from fwd.errors import NotReadyError
from fwd.front.keeper import Keeper
from fwd.front.prompts import Prompts
from fwd.front.service import Service
from fwd.front.supervisor import Supervisor
from fwd.grammar.compiled import texts_of
from fwd.protocol.frames import pack
from fwd.protocol.ids import pack_ids, unpack_ids
from fwd.protocol.messages import Load, Submit
from fwd.protocol.values import EngineInfo, Limits

LETTERS = Prompts(Letters(), Transcript())
DEMO = Path(fwd.demo.__file__).parent / "model"


@pytest.fixture
def lives(tmp_path):
    return str(tmp_path / "lives")


def test_every_engine_is_told_before_its_first_grammar_and_once(run, lives):
    """A fake engine dies of a grammar that comes too early, or of a vocabulary that comes twice."""
    faults = (Fault("kill", 3), Fault("exit", 2), Fault("kill", 5))
    script = Script(faults=faults, lives=lives)
    streams = [stream(number, grammar="regex:a*" if number % 2 else "") for number in range(1, 7)]

    async def main():
        async with keeping(script) as keeper:
            keeper.learn(LETTERS.vocabulary)
            for one in streams[:3]:
                keeper.submit(one)
            await asyncio.sleep(0)
            for one in streams[3:]:
                keeper.submit(one)
            await keeper.drained()
            assert keeper.died() == len(faults)

    run(main())
    assert_answered(script, *streams)


def test_a_grammar_waits_until_the_tokenizer_is_there():
    supervisor = Supervisor(Keeper, Load(model="fake"))
    service = Service(Config(model="fake"), supervisor)
    supervisor.active.info = EngineInfo(vocab_size=256, context=100)
    request = Submit(prompt=pack_ids([1]), grammar="regex:a*", limits=Limits(max_tokens=5))

    async def main():
        with pytest.raises(NotReadyError, match="tokenizer"):
            service.open(request)
        service.prompts = LETTERS
        service.open(request)

    asyncio.run(main())
    assert supervisor.active._roster.vocabulary is LETTERS.vocabulary


def test_the_vocabulary_of_the_embedded_model():
    prompts = Prompts.load(DEMO)
    told, tokenizer = prompts.vocabulary, prompts.tokenizer
    texts = texts_of(told)

    assert len(texts) == tokenizer.vocab_size
    assert all(texts[token] == tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size))
    assert set(tokenizer.eos_ids) == set(told.eos)
    assert {*unpack_ids(told.special)} == {*tokenizer._added.values()}


def test_a_large_vocabulary_travels_beside_its_frame():
    class Large(Letters):
        vocab_size = 150_000
        table = dict.fromkeys(range(150_000), b"abc")

    frame, fds = pack(Prompts(Large(), Transcript()).vocabulary)
    assert len(frame) < 200
    assert len(fds) == 2

"""A second turn costs its new tokens and, at most once, the first turn's answer: told by the engine's own counter."""

import openai
import pytest
from harness import ended, idle, record, run, serving

from fwd.cli.bench.http import free_port
from fwd.cli.common import wait_ready
from fwd.cli.private import private_daemon
from fwd.config import Config
from fwd.front.prompts import Chat, Prompts
from fwd.protocol.ids import pack_ids, unpack_ids
from fwd.protocol.messages import Submit
from fwd.protocol.values import Limits, Sampling

FIRST = "Write a function that reads a file and returns the number of its lines, words and characters. " * 3
SECOND = "Now let it take a directory instead."
TOKENS = 60
PAGE = 16


@pytest.fixture(scope="module")
def turns():
    """The ids of the first prompt, and those that the second adds to it and its answer."""

    async def rendered():
        prompts = Prompts.load(Config().folder)
        chats = [Chat(messages=[{"role": "user", "content": text}]) for text in (FIRST, SECOND)]
        return [list(unpack_ids(await prompts.chat(chat))) for chat in chats]

    return run(rendered())


def request(prompt, tokens=TOKENS, **fields):
    limits = Limits(max_tokens=tokens)
    return Submit(prompt=pack_ids(prompt), sampling=Sampling(logprobs=1), limits=limits, seed=7, **fields)


async def ask(service, prompt, **fields):
    """A stream that has ended, and the tokens that the engine computed until it had nothing more to do."""
    before = (await idle(service)).computed
    stream = service.open(request(prompt, **fields))
    await ended(stream)
    return stream, (await idle(service)).computed - before


def test_after_a_pause_only_the_new_tokens_are_prefilled(turns):
    first, more = turns

    async def work():
        async with serving(Config().folder) as service:
            cold, _ = await ask(service, first, cache=False)
            second = [*first, *cold.emitted, *more]
            undisturbed, whole = await ask(service, second, cache=False)
            assert whole == len(second) + TOKENS - 1

            turn, computed = await ask(service, first)
            assert record(turn) == record(cold)
            again = computed - (len(first) + TOKENS - 1)  # the answer on the chunk grid, from the last whole page on
            assert TOKENS - PAGE < again < TOKENS + PAGE

            turn, computed = await ask(service, second, cache=False)
            timing = turn.finished.timing
            assert record(turn) == record(undisturbed)
            assert timing.cached_tokens == (len(first) + TOKENS) // PAGE * PAGE
            assert computed == len(second) - timing.cached_tokens + TOKENS - 1
            assert computed - (TOKENS - 1) < len(more) + PAGE
            assert (timing.cache_miss, timing.differs_at) == ("never_seen", -1)

    run(work())


def test_without_a_pause_the_answer_is_prefilled_with_the_new_tokens(turns):
    """Another request runs all the time, so that there is no idle moment for it before."""
    first, more = turns

    async def work():
        async with serving(Config().folder) as service:
            beside = service.open(request([1, 2, 3], tokens=1000, cache=False))
            await beside.wait(1)
            turn = service.open(request(first, cache_key="chat"))
            await ended(turn)
            second = service.open(request([*first, *turn.emitted, *more], cache=False))
            await ended(second)
            assert not beside.done
            service.cancel(beside)
            assert second.finished.timing.cached_tokens == len(first) // PAGE * PAGE

    run(work())


def test_through_http_with_a_client_that_resends_the_conversation():
    port = free_port()
    flags = ("demo", "--name", "demo", "--http", f"127.0.0.1:{port}", "--log-level", "error")
    with (
        private_daemon(*flags) as daemon,
        daemon.connect() as local,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0) as client,
    ):
        wait_ready(local)
        messages = [{"role": "user", "content": FIRST}]
        asked = {"model": "demo", "max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
        first = client.chat.completions.create(messages=messages, **asked)
        messages.append({"role": "assistant", "content": first.choices[0].message.content})
        messages.append({"role": "user", "content": SECOND})
        second = client.chat.completions.create(messages=messages, **asked)

    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert first.fwd["cache_miss"] == "never_seen"
    known = second.usage.prompt_tokens_details.cached_tokens
    assert known % PAGE == 0
    assert first.usage.prompt_tokens - PAGE < known <= first.usage.total_tokens

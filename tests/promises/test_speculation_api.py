"""Where an answer ends while drafting, over HTTP: equal JSON but for what counts steps and time."""

import asyncio
from copy import copy

import checkpoints
import foreseeing_engine
import pytest
from apiserver import NAME, serving

from fwd.front.process import COMMAND
from fwd.front.prompts import Prompts

URL, CHAT = "/v1/completions", "/v1/chat/completions"
TIMES = {"timings", "tokens_per_second", "drafted", "accepted", "accept_length", "speculative_decoding"}
LIMIT = 200
LONG = 32
EOS = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    checkpoints.make("qwen3", path)
    return path


@pytest.fixture(scope="module")
def letters(folder):
    """A bias that leaves letters, and no end."""
    texts = Prompts.load(folder).tokenizer.table
    kept = [token for token, text in texts.items() if text.isalpha() and text.islower()]
    assert len(kept) == 26
    return {str(token): -100 for token in range(checkpoints.VOCAB) if token not in kept}


class Asked:
    """One request in its two forms."""

    def __init__(self, letters, seed, **options):
        chat = options.pop("chat", False)
        wanted = {"logprobs": True, "top_logprobs": 3} if chat else {"logprobs": 2, "prompt": f"once {seed}"}
        if chat:
            wanted["messages"] = [{"role": "user", "content": f"once {seed}"}]
        self.url = CHAT if chat else URL
        self.body = {
            "model": NAME,
            "seed": seed,
            "temperature": 1.1,
            "max_tokens": LONG,
            "logit_bias": letters,
            "return_token_ids": True,
            "cache_prompt": False,
            **wanted,
            **options,
        }

    def changed(self, **options):
        """The same with other options."""
        other = copy(self)
        other.body = {**self.body, **options}
        return other

    async def answer(self, server):
        """The body without times, and what was drafted and accepted."""
        status, body, _ = await server.post(self.url, self.body)
        assert status == 200, body
        made = [sum(body["fwd"][name].values()) for name in ("drafted", "accepted")]
        if record := body["fwd"]["speculative_decoding"]:
            assert [record["num_draft_tokens"], record["num_accepted_draft_tokens"]] == made
            assert sum(held * count for held, count in enumerate(record["acceptance_histogram"])) == made[1]
        for choice in body["choices"]:
            assert len(choice["token_ids"]) <= self.body["max_tokens"]
        assert body["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in body["choices"])
        return stripped(body), made

    async def streamed(self, server):
        """What the chunks of each choice add up to, and the last usage."""
        *chunks, done = await server.stream(self.url, {**self.body, "stream_options": {"include_usage": True}})
        assert done == "[DONE]"
        found, usage = {}, None
        for chunk in chunks:
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                joined(found.setdefault(choice["index"], {}), choice)
        return found, usage


def joined(whole, part):
    """Add a part of an answer to what came before: texts and lists grow, all else is the latest that is said."""
    for name, value in part.items():
        if isinstance(value, dict):
            joined(whole.setdefault(name, {}), value)
        elif isinstance(value, str | list) and name not in {"role", "finish_reason"}:
            whole[name] = whole.get(name, type(value)()) + value
        elif value is not None:
            whole[name] = value


def stripped(body):
    own = {name: value for name, value in body["fwd"].items() if name not in TIMES}
    return {**body, "fwd": own, "id": "", "created": 0}


@pytest.fixture(scope="module")
def asked(folder, letters):
    """Requests that end in all ways, in places that are known from answers, and the streams of these."""
    plain = [
        *(Asked(letters, seed) for seed in range(3)),
        Asked(letters, 7, chat=True, n=2),
        Asked(letters, 8, chat=True),
    ]
    ending = [Asked({**letters, str(EOS): 2.5}, seed) for seed in range(20, 26)]
    others = [Asked(letters, 5, n=3)]

    async def work():
        async with serving(folder, COMMAND) as server:
            found = [(await each.answer(server))[0]["choices"][0] for each in (*plain, *ending, *others)]
            return found, list(server.seen)

    answers, streams = asyncio.run(asyncio.wait_for(work(), LIMIT))
    stopped = [made for each, choice in zip(plain, answers, strict=False) for made in _stopped(each, choice)]
    limited = [
        made for each, choice in zip(ending, answers[len(plain) :], strict=False) for made in _limited(each, choice)
    ]
    return [*plain, *ending, *others, *stopped, *limited], streams


def _stopped(each, choice):
    """The request with stops in the midst of its answer: strings, and an id."""
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    stops = [{"stop": text[start : start + 3]} for start in (5, 21)]
    stops.append({"stop": text[9:11], "include_stop_str_in_output": True})
    stops.append({"stop_token_ids": choice["token_ids"][12:13]})
    return [each.changed(**stop) for stop in stops]


def _limited(each, choice):
    """The request with its limit just before, at and after its end."""
    length = len(choice["token_ids"])
    return [each.changed(max_tokens=most) for most in sorted({max(1, length - 1), length, length + 1})]


def test_answers_end_where_they_would_without_drafts(folder, asked, tmp_path):
    bodies, streams = asked
    command = foreseeing_engine.command(tmp_path / "answers", "oracle", streams)

    async def told(engine, options):
        async with serving(folder, engine) as server:
            whole = [await each.changed(fwd=options).answer(server) for each in bodies]
            return whole, [await each.changed(fwd=options).streamed(server) for each in bodies]

    async def work():
        return await told(COMMAND, {"drafter": "off"}), await told(command, {})

    (plain, plain_streams), (drafted, drafted_streams) = asyncio.run(asyncio.wait_for(work(), LIMIT))

    assert [body for body, _ in drafted] == [body for body, _ in plain]
    assert drafted_streams == plain_streams
    assert not any(sum(made) for _, made in plain)
    assert sum(accepted for _, (_, accepted) in drafted) > 5 * len(bodies)
    reasons = [choice["finish_reason"] for body, _ in plain for choice in body["choices"]]
    assert min(reasons.count("stop"), reasons.count("length")) > 10

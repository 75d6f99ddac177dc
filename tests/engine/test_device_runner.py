"""The engine on kernels that the CPU executes: a token is the same whoever draws it, alone or ahead of what is read."""

import random
from collections import deque
from types import SimpleNamespace

import checkpoints
import pytest
import torch
from guesser import NATURES, Knowing
from msgspec.structs import replace

from fwd.engine import lines as lines_module
from fwd.engine.device import host
from fwd.engine.device_runner import DeviceRunner
from fwd.engine.lines import Lines
from fwd.engine.loop import Loop
from fwd.engine.plan import plan
from fwd.engine.runner import ModelRunner
from fwd.engine.space import Space
from fwd.errors import EngineError
from fwd.kernels.prefill import Prefill
from fwd.models.load import load
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Failed, Finished, Submit, Tokens
from fwd.protocol.values import Limits, Sampling

KINDS = {"llama-64": "auto", "qwen3-sliding-64": "fp8"}
TOKENS = 12


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    checkpoints.make(request.param, folder)
    return SimpleNamespace(model=load(folder, device="host", dtype="bfloat16", context=256), kv=KINDS[request.param])


class Late(DeviceRunner):
    """As late as a device may be: a step runs when it is collected, or before what is not launched ahead."""

    def __init__(self, *loaded):
        super().__init__(*loaded)
        self.waiting = deque()
        self._steps = SimpleNamespace(launch=lambda *step: self.waiting.append(step))

    def copy(self, copies):
        self.catch_up(0)
        super().copy(copies)

    def prefill(self, chunk):
        self.catch_up(0)
        return super().prefill(chunk)

    def collect(self):
        self.catch_up(self._launched - self._collected - 1)
        return super().collect()

    def catch_up(self, left):
        while len(self.waiting) > left:
            self._run(*self.waiting.popleft())


class Engine:
    """A loop over a model without a peer; `told` by request what its reader is told, without times."""

    def __init__(self, model, runner=DeviceRunner, ahead=None, seqs=4, pages=0, speculator=None):
        loaded = model.model
        sized = plan(loaded.spec, host(1 << 34), context=256, max_seqs=seqs, kv_dtype=model.kv)
        self.runner = runner(loaded, sized) if runner is ModelRunner else runner(loaded, loaded.ops, sized)
        if ahead is not None:
            self.runner.ahead = ahead
        units = (pages or sized.units[0], *sized.units[1:])
        self.space = Space(sized.groups, units, sized.page_size, chunk=sized.chunk, key=b"key")
        self.loop = Loop(self, self.runner, self.space, max_seqs=seqs, chunk=sized.chunk, speculator=speculator)
        self.told = {}

    def send(self, *messages):
        for message in messages:
            told = self.told.setdefault(message.id, [])
            match message:
                case Tokens():
                    told += zip(message.ids, message.logprobs or message.ids, message.top or message.ids, strict=True)
                case Finished():
                    told.append((message.reason, message.stop_id))
                case Failed():
                    told.append(message.code)

    def run(self, *requests, between=0):
        for request in requests:
            self.loop._handle(request)
            for _ in range(between):
                self.step()
        while self.loop.busy:
            self.step()
        return [self.told[request.id] for request in requests]

    def step(self):
        if self.loop.busy:
            self.loop._step()
        self.loop._flush()


def wanted(seed, count):
    """Requests of every kind of sampling, some with a part of their answer known."""
    rng, made = random.Random(seed), []
    for number in range(1, count + 1):
        sampling = Sampling(
            temperature=rng.choice([0.0, 0.8, 1.2]),
            top_k=rng.choice([0, 20]),
            top_p=rng.choice([1.0, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.4]),
            presence_penalty=rng.choice([0.0, 0.6]),
            frequency_penalty=rng.choice([0.0, 0.4]),
            logit_bias=rng.choice([{}, {3: 4.0, 9: -100.0}]),
            logprobs=rng.choice([-1, 0, 3]),
        )
        limits = Limits(max_tokens=TOKENS, stop_ids=tuple(rng.sample(range(256), 60)), min_tokens=rng.choice([0, 7]))
        prompt = [rng.randrange(256) for _ in range(rng.choice([1, 15, 16, 64, rng.randrange(2, 90)]))]
        known = [rng.randrange(256) for _ in range(rng.choice([0, 0, 3]))]
        made.append(
            Submit(
                id=number,
                prompt=pack_ids(prompt),
                emitted=pack_ids([each for each in known if each not in limits.stop_ids]),
                sampling=sampling,
                limits=limits,
                seed=number * 77,
                choice=number % 3,
            )
        )
    return made


def test_the_device_keeps_what_the_host_would_tell_it_each_time(model):
    """Penalties, bias and bans as the reference's loop tells them of each row, token by token, and run ahead."""
    requests = wanted(1, 6)
    told = Engine(model, ModelRunner).run(*requests)

    assert Engine(model, ahead=False).run(*requests) == told
    assert Engine(model, ahead=True).run(*requests, between=2) == told
    assert any(result[-1][0] == "stop" for result in told)


@pytest.mark.parametrize("nature", NATURES)
@pytest.mark.parametrize("runner", [ModelRunner, DeviceRunner])
def test_drafts_change_nothing_but_the_number_of_steps(model, runner, nature):
    requests = wanted(7, 5)
    plain = Engine(model, runner)
    told = plain.run(*requests)
    answers = {
        each.id: [*each.emitted.cast("i"), *(token[0] for token in plain.told[each.id][:-1])] for each in requests
    }
    knowing = Knowing(random.Random(11), nature, answers)
    drafted = Engine(model, runner, seqs=16, speculator=knowing)

    assert drafted.run(*requests) == told
    assert any(proposal.ids for _, proposal, _ in knowing.settled)
    if nature == "oracle":
        assert all(count >= len(proposal.ids) for _, proposal, count in knowing.settled)  # a stop id has no successor
        assert drafted.loop.steps < plain.loop.steps


def test_the_same_bits_alone_beside_others_and_displaced(model):
    requests = wanted(2, 6)
    alone = [Engine(model).run(request)[0] for request in requests[:3]]
    crowded = Engine(model, seqs=16, pages=17 if model.kv == "auto" else 0)

    assert crowded.run(*requests)[:3] == alone


def test_nothing_is_overwritten_under_a_step_that_is_late(model):
    """Without bans, which the host lifts by a copy that is ordered only where it has a stream to be put in."""
    requests = [replace(each, limits=Limits(max_tokens=20)) for each in wanted(5, 6)]

    assert Engine(model, Late, seqs=3).run(*requests, between=3) == Engine(model, ahead=False).run(*requests)


def test_prefill_as_on_a_gpu_gives_the_same_bits_cold_and_from_the_cache(model, monkeypatch):
    ops = model.model.ops
    monkeypatch.setattr(ops, "_chunks", Prefill(ops.launcher))
    first, second = (each for each in wanted(6, 2))
    longer = [*first.prompt.cast("i"), *second.prompt.cast("i"), *range(70)]
    second = replace(second, prompt=pack_ids(longer), prompt_logprobs=-1)
    cold, warm = Engine(model), Engine(model)
    told = cold.run(second)
    warm.run(replace(first, prompt=pack_ids(longer[:-9])))

    assert warm.run(second) == told


def test_a_history_that_is_sent_twice_is_noticed(model, monkeypatch):
    """A planted mistake: what the host knows of a sequence, told again, lacks the token that is in flight."""

    class Forgetful(lines_module._Line):
        counted = property(lambda _: False, lambda *_: None)

    sampling = Sampling(temperature=0.0, frequency_penalty=2.0, logit_bias={3: 80.0, 4: 79.0})  # they take turns
    request = Submit(id=1, prompt=pack_ids([5] * 9), sampling=sampling, limits=Limits(max_tokens=TOKENS), seed=1)
    told = Engine(model).run(request)
    monkeypatch.setattr(lines_module, "_Line", Forgetful)

    assert Engine(model).run(request) != told


def test_a_ban_that_is_not_lifted_is_noticed(model, monkeypatch):
    """A planted mistake: the bias is sent once only."""
    limits = Limits(max_tokens=TOKENS, stop_ids=(7,), min_tokens=5)
    sampling = Sampling(temperature=0.0, logit_bias={7: 100.0})
    request = Submit(id=1, prompt=pack_ids([5] * 9), sampling=sampling, limits=limits, seed=1)
    told = Engine(model).run(request)
    assert (len(told[0]), told[0][-1]) == (7, ("stop", 7))
    rebias = Lines._rebias

    def once(self, line, known, wanted):
        if known.banned < 0:
            rebias(self, line, known, wanted)

    monkeypatch.setattr(Lines, "_rebias", once)
    assert Engine(model).run(request) != told


def test_a_chunk_that_is_tried_leaves_nothing_behind(model):
    request = wanted(4, 1)[0]
    told, engine = Engine(model).run(request), Engine(model)
    engine.runner._try_chunk()

    assert engine.run(request) == told


def test_a_sequence_keeps_its_line_and_gives_it_back():
    one, two, three = (SimpleNamespace(request=object()) for _ in range(3))
    lines = Lines(2, 8, torch.device("cpu"))
    first = list(lines.assign([one, two]))

    assert sorted(first) == [0, 1]
    assert lines.assign([two, one]) == first[::-1]
    assert lines.assign([two]) == first[1:]
    assert lines.assign([three, two]) == first


def test_rows_that_are_not_finite_end_their_own_request(model, monkeypatch):
    requests = wanted(3, 3)
    told = Engine(model).run(*requests)
    engine = Engine(model)
    forward = model.model.forward

    def spoiled(ids, rows, cache, taps=None):
        hidden = forward(ids, rows, cache)
        if rows.chunk < 0:
            hidden[(rows.positions == len(requests[1].prompt) // 4 + 5) & (rows.sequences == spoiled.line)] = torch.nan
        return hidden

    engine.loop._handle(requests[1])
    while not engine.loop._flight:
        engine.step()
    spoiled.line = engine.runner._slots[1]._lines._given[0]
    monkeypatch.setattr(model.model, "forward", spoiled)
    found = engine.run(requests[0], requests[2])

    assert found == [told[0], told[2]]
    assert engine.told[2][-1] == "non_finite_logits"
    assert engine.told[2][:-1] == told[1][: len(engine.told[2]) - 1]


def test_what_goes_wrong_on_the_device_ends_the_engine_in_one_line(model, monkeypatch):
    engine = Engine(model)
    engine.loop._handle(wanted(1, 1)[0])
    engine.step()

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")

    monkeypatch.setattr(engine.runner._steps, "launch", broken)
    with pytest.raises(EngineError, match=r"^the device failed: CUDA error: an illegal memory access was encountered;"):
        engine.run()


def test_a_step_that_leaves_no_result_is_no_hang(model, monkeypatch):
    engine = Engine(model)
    engine.loop._handle(wanted(1, 1)[0])
    engine.step()
    monkeypatch.setattr(engine.runner._steps, "launch", lambda *_: None)

    with pytest.raises(EngineError, match=r"step 1 ended and left no result \(the last one is of step 0\)"):
        engine.run()

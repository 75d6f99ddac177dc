"""The `state` layout on a toy recurrent model with real tensors: hits, shared prefills and preemption change no bit."""

import random
from types import SimpleNamespace

import pytest
import torch
from mock_engine import submit

from fwd.engine.loop import Loop
from fwd.engine.runner import ModelRunner
from fwd.engine.space import Space
from fwd.kernels.reference import Reference
from fwd.models.layout import State, groups
from fwd.protocol.messages import Failed, Finished, Tokens
from fwd.protocol.values import Sampling

VOCAB, WIDTH, PAGE, CHUNK = 32, 24, 4, 16


class Recurrent:
    """state ← tanh(A·state + embedding); logits = W·state. The state after a row is a record of its own."""

    ops = Reference()
    dtype = torch.float32

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.mix, self.embedding, self.out = (
            torch.randn(*shape, generator=generator) * scale
            for shape, scale in (((WIDTH, WIDTH), 0.3), ((VOCAB, WIDTH), 1.0), ((VOCAB, WIDTH), 2.0))
        )

    def new_cache(self, units, _page_size, _kv):
        return SimpleNamespace(records=torch.full((units[0], WIDTH), torch.nan), copy=lambda _: None)

    def forward(self, ids, rows, cache, taps=None):
        hidden, state = torch.zeros(len(ids), WIDTH), None
        for row in range(len(ids)):
            if rows.sequences[row] < 0:
                continue
            read, write = int(rows.records.reads[row]), int(rows.records.writes[row])
            if rows.chunk < 0 or state is None:
                state = cache.records[read] if read >= 0 else torch.zeros(WIDTH)
            state = torch.tanh(self.mix @ state + self.embedding[ids[row]])
            if write >= 0:
                cache.records[write] = state
            hidden[row] = state
        return hidden

    def logits(self, hidden):
        return torch.stack([self.out @ row for row in hidden])


class Overwriting(Recurrent):
    def forward(self, ids, rows, cache, taps=None):
        hidden = super().forward(ids, rows, cache)
        if rows.chunk < 0:
            for row, read in enumerate(rows.records.reads.tolist()):
                if read >= 0:
                    cache.records[read] = hidden[row]
        return hidden


class Engine:
    def __init__(self, seqs=4, records=64, model=None):
        plan = SimpleNamespace(
            groups=groups((State((0,), WIDTH),)),
            units=(records,),
            page_size=PAGE,
            context=256,
            chunk=CHUNK,
            max_seqs=seqs,
            kv="float32",
            draft=None,
        )
        self.space = Space(plan.groups, plan.units, PAGE, chunk=CHUNK, key=b"")
        self.loop = Loop(self, ModelRunner(model or Recurrent(), plan), self.space, max_seqs=seqs, chunk=CHUNK)
        self.output, self.cached = {}, {}

    def send(self, *messages):
        for message in messages:
            match message:
                case Tokens():
                    self.output.setdefault(message.id, []).extend(zip(message.ids, message.logprobs, strict=True))
                case Finished():
                    self.cached[message.id] = message.timing.cached_tokens
                case Failed():
                    raise AssertionError(message)

    def run(self, *requests):
        for request in requests:
            self.loop._handle(request)
        while self.loop._scheduler:
            self.loop._step()
            self.space.check()
        self.loop._flush()
        return [self.output[request.id] for request in requests]


def requests(seed, count):
    """Some go on where an earlier one ended, some share a prompt."""
    rng, made = random.Random(seed), []
    for number in range(1, count + 1):
        known = list(rng.choice(made).prompt.cast("i")) if made and rng.random() < 0.6 else []
        prompt = known + [
            rng.randrange(VOCAB) for _ in range(0 if known and rng.random() < 0.3 else rng.randrange(1, 50))
        ]
        sampling = Sampling(temperature=rng.choice([0.0, 1.0]), logprobs=0)
        made.append(submit(number, prompt[:200], rng.randrange(1, 20), seed=rng.randrange(9), sampling=sampling))
    return made


@pytest.mark.parametrize("seed", range(4))
def test_the_same_bits_alone_together_and_from_the_cache(seed):
    wanted = requests(seed, 10)
    alone = [Engine().run(request)[0] for request in wanted]
    together = Engine(seqs=16, records=100)
    one_by_one = Engine(seqs=2, records=30)

    assert together.run(*wanted) == alone
    assert [one_by_one.run(request)[0] for request in wanted] == alone
    assert sum(one_by_one.cached.values()) > 0


def test_a_record_that_is_written_twice_would_show():
    """Planted bug: a row overwrites the record it reads, so a snapshot changes under whoever goes on from it."""
    sampling = Sampling(logprobs=0)
    first = submit(1, [3] * (2 * CHUNK), 9, seed=1, sampling=sampling)
    second = submit(2, [*[3] * (2 * CHUNK), 4], 9, seed=2, sampling=sampling)
    sound, broken = Engine(), Engine(model=Overwriting())
    alone = Engine().run(second)[0]

    assert [engine.run(first) and engine.run(second)[0] == alone for engine in (sound, broken)] == [True, False]

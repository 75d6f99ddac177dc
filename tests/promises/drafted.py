"""Lives of real models in this process: requests of every kind, drafts right and wrong, cancels and dying engines.

What drafts must not change is what an engine without any says to each request alone, and the cells it leaves.
"""

import random
from array import array
from collections import Counter
from dataclasses import dataclass

import torch
from guesser import NATURES, Knowing
from inprocess import PAGE, Answer, Engine, Loaded, alone
from msgspec.structs import replace

from fwd.engine.speculate.forced import Forced
from fwd.engine.speculate.neural import Neural
from fwd.engine.speculate.speculator import JointSpeculator
from fwd.engine.speculate.suffix import Suffix
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Cancel, Failed, Finished
from fwd.protocol.values import Draft

SEED = 20270107
OWN = "own"  # what serves
DRAFTERS = (*NATURES, OWN)


@dataclass
class Life:
    """Requests that come at random to engines that draft and die, beside each other, with few pages or many."""

    loaded: Loaded
    requests: list
    answers: dict  # by request id
    rng: random.Random
    nature: str
    most: int = 15
    seqs: int = 16
    pages: int = 0
    deaths: int = 0
    cancels: int = 0
    looks: float = 1.0  # how often the cells of a request are looked at after a round

    def __post_init__(self):
        self.told = {request.id: Answer() for request in self.requests}
        self.open = {}
        self.steps = self.died = 0
        self.rounds = Counter()  # drafts and how many of them held
        self.looked = Counter()  # cells by group
        self.start()

    def start(self):
        self.engine = Engine(self.loaded, self.seqs, self.pages, self.speculator)

    def speculator(self, engine):
        """Who drafts for an engine; what became of it goes into `rounds`."""
        if self.nature == OWN:
            made = JointSpeculator([Suffix(None), Forced()], *self.neural(engine), ahead=engine.runner.ahead)
        else:
            coming = {number: answer.coming for number, answer in self.answers.items()}
            made = Knowing(self.rng, self.nature, coming, self.most, PAGE, self.loaded.model.spec.vocab)
        settle = made.settle

        def settled(request, proposal, count):
            self.rounds[len(proposal.ids), count - 1] += 1
            settle(request, proposal, count)

        made.settle = settled
        return made

    def neural(self, engine):
        """The draft model, if there is one, reading along."""
        if self.loaded.draft is None:
            return []
        neural = Neural(self.loaded.draft, self.loaded.plan, lambda: engine.runner.copy(engine.space.take_copies()))
        engine.runner.follow(neural)
        return [neural]

    def live(self):
        waiting = self.rng.sample(self.requests, len(self.requests))
        happen = ["die"] * self.deaths + ["cancel"] * self.cancels
        self.rng.shuffle(happen)
        while waiting or self.open:
            if waiting and (not self.open or self.rng.random() < 0.3):
                self.submit(waiting.pop())
            if happen and self.open and self.rng.random() < 0.15:
                getattr(self, happen.pop())()
            self.step()
        while self.engine.loop.busy:
            self.step()
        self.finish()
        return self

    def submit(self, request):
        if self.nature == OWN:
            likely = list(self.answers[request.id].coming)
            likely[len(likely) // 2 : len(likely) // 2 + 1] = [7, 8]
            request = replace(request, prediction=pack_ids(likely), draft=self.wish())
        self.open[request.id] = request
        self.engine.handle(request)

    def wish(self):
        """Whatever pays, or so many drafts of one drafter wherever it has them."""
        names = ["suffix", *([self.loaded.draft.spec.kind] if self.loaded.draft else [])]
        return self.rng.choice([Draft(), Draft(self.rng.choice(names), self.most)])

    def step(self):
        self.engine.step()
        self.steps += 1
        self.read()
        self.engine.space.check()
        for request in self.engine.placed:
            if self.rng.random() < self.looks:
                self.look(request)

    def read(self):
        for message in self.engine.take():
            self.told[message.id].read(message)
            if isinstance(message, Finished | Failed):
                self.open.pop(message.id)
                self.check_counts(message)

    def look(self, request):
        """Each cell that the request's next row will see holds what one row after the other would have left there."""
        for group in range(len(request.tables)):
            first, known = self.engine.visible(request, group), self.answers[request.id].cells[group]
            assert request.computed <= len(known), (request.id, request.computed)
            wanted = [known[position] for position in range(first, request.computed)]
            if wanted:
                same = (self.engine.cells(request, group, first) == torch.stack(wanted)).all(dim=1)
                assert same.all(), (request.id, group, request.computed, (~same).nonzero().ravel().tolist())
                self.looked[group] += len(wanted)

    def die(self):
        """Perhaps with ids that nobody was told; another engine is given what is open, with what was told of it."""
        self.died += 1
        if self.rng.random() < 0.5:
            self.engine.loop._step()
        self.start()
        for number, request in self.open.items():
            emitted = array("i", self.told[number].ids)
            self.engine.handle(replace(request, emitted=memoryview(emitted).cast("B")))

    def cancel(self):
        self.engine.handle(Cancel(id=self.rng.choice([*self.open])))
        self.read()

    def finish(self):
        for number, told in self.told.items():
            wanted = self.answers[number]
            if told.end[0] == "cancelled":
                assert told.told == wanted.told[: len(told.told)]
            else:
                assert (number, told.told, told.end) == (number, wanted.told, wanted.end)
        for pool in self.engine.space.pools:
            assert pool.available == pool.total

    def check_counts(self, message):
        if isinstance(message, Finished):
            drafted, accepted = (sum(counts.values()) for counts in (message.timing.drafted, message.timing.accepted))
            assert 0 <= accepted <= drafted
            assert self.nature != "liar" or accepted == 0


def lives(loaded, asked, rng, count, looks=1.0, drafters=DRAFTERS):
    """Lives with up to 1 … 15 drafts a step by these drafters: their rounds, cells looked at, and deaths."""
    answers = {request.id: alone(loaded, request) for request in asked}
    rounds, looked, died = Counter(), Counter(), 0
    most, seeds = rng.sample(range(1, 16), 15), [rng.random() for _ in range(count)]
    for number, seed in enumerate(seeds):
        own = random.Random(seed)  # what serves takes as many steps as it finds to pay: no other life depends on it
        life = Life(
            loaded,
            asked,
            answers,
            own,
            drafters[number % len(drafters)],
            most=most[number % 15],
            seqs=own.choice([1, 2, 5, 16]),
            pages=own.choice([0, 17, 24]),
            deaths=own.choice([0, 1, 3]),
            cancels=own.choice([0, 0, 1]),
            looks=looks,
        ).live()
        rounds += life.rounds
        looked += life.looked
        died += life.died
    return rounds, looked, died

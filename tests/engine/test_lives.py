"""Same seed, same bytes, whatever the cache does and whoever drafts, and nothing is lost: random arrivals, turns,
cancels, crashes and evictions on a mock model that checks each cell and record it reads, for every mix of layouts."""

import random

import pytest
from guesser import NATURES, Guesser
from mock_engine import CHUNK, PAGE, Engine
from mock_runner import FULL, STATE, VOCAB, oracle, sliding
from msgspec.structs import replace

from fwd.kernels.sizes import MAX_ROWS
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Cancel, Failed, Finished, Ping, PromptLogprobs, Submit, Tokens
from fwd.protocol.values import Limits

MAX_SEQS = 16
LAYOUTS = {
    "full": (FULL,),
    "sliding": (sliding(6),),
    "window of one": (sliding(1),),
    "state": (STATE,),
    "full+sliding": (FULL, sliding(6)),
    "full+two windows": (FULL, sliding(1), sliding(11)),
    "full+state": (FULL, STATE),
    "all": (FULL, sliding(5), STATE),
}
LONGEST = 64  # tokens of prompt and answer


def units_of(groups, full, seqs, spare):
    """What a plan would give: enough of every sliding and state group, `full` pages."""
    sizes = {"full": lambda _: full, "state": lambda _: 3 * seqs + MAX_ROWS + spare}
    sizes["sliding"] = lambda group: seqs * ((group.window + max(CHUNK, MAX_ROWS)) // PAGE + 2) + spare
    return tuple(sizes[group.kind](group) for group in groups)


class World:
    """An engine that lives and dies, and the journal of a front that survives it."""

    def __init__(self, rng, layout, ahead):
        self.rng, self.groups, self.ahead = rng, LAYOUTS[layout], ahead
        self.nature, self.most = rng.choice([*NATURES, ""]), rng.randrange(1, MAX_ROWS)
        self.seqs = rng.choice([1, 2, 5, MAX_SEQS])
        self.full = rng.randrange(LONGEST // PAGE + 1, rng.choice([30, 100]))
        self.spare = rng.randrange(0, 40)
        self.requests, self.output, self.results, self.scores = {}, {}, {}, {}
        self.texts = [[]]
        self.start()

    def start(self):
        units = units_of(self.groups, self.full, self.seqs, self.spare)
        guesser = Guesser(self.rng, self.nature, self.most, PAGE) if self.nature else None
        self.engine = Engine(self.groups, units, self.seqs, ahead=self.ahead, speculator=guesser)

    def submit(self):
        rng, number = self.rng, len(self.requests) + 1
        prompt = self.prompt()
        request = Submit(
            id=number,
            prompt=pack_ids(prompt),
            seed=rng.randrange(3),
            choice=rng.randrange(2),
            limits=Limits(
                max_tokens=rng.randrange(1, LONGEST - len(prompt) + 1), stop_ids=tuple(rng.sample(range(VOCAB), 2))
            ),
            priority=rng.choice(["interactive", "interactive", "background"]),
            cache=rng.random() < 0.9,
            cache_key=rng.choice(["", "", "a", "b"]),
            prompt_logprobs=rng.choice([-1, -1, -1, 0]),
            adapter=rng.choice(["", "", "", "other"]),
        )
        self.requests[number], self.output[number], self.scores[number] = request, [], []
        self.texts.append([*prompt, *self.answer(request)])
        for copy in range(rng.choice([0, 0, 0, 2])):  # n > 1
            self.requests[number + copy + 1] = Submit(
                id=number + copy + 1,
                prompt=request.prompt,
                seed=request.seed,
                choice=copy + 2,
                limits=request.limits,
                prompt_logprobs=request.prompt_logprobs,
            )
            self.output[number + copy + 1], self.scores[number + copy + 1] = [], []
        self.engine.handle(*(self.requests[each] for each in range(number, len(self.requests) + 1)))

    def prompt(self):
        """A new text, or one that goes on where an older one, or a part of it, ended."""
        rng = self.rng
        if self.requests and rng.random() < 0.3:  # perhaps of one that is open, of any class
            return (
                self.requests[rng.randrange(max(1, len(self.requests) - 4), len(self.requests) + 1)]
                .prompt.cast("i")
                .tolist()
            )
        known = rng.choice(self.texts)[: LONGEST - 8]
        known = known[: rng.choice([len(known), rng.randrange(len(known) + 1), 0])]
        return known + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 8 if known else 40))]

    def answer(self, request):
        limits = request.limits
        return oracle(request.prompt.cast("i"), request.seed, limits.max_tokens, limits.stop_ids, request.choice)

    def step(self):
        self.engine.step()
        messages, self.engine.messages = self.engine.messages, []
        for message in messages:
            self.read(message)

    def read(self, message):
        match message:
            case Tokens():
                assert message.start == len(self.output[message.id])
                self.output[message.id] += message.ids
            case PromptLogprobs():
                scores = self.scores[message.id]
                scores += message.logprobs[len(scores) + 1 - message.start :]
            case Finished() | Failed():
                assert message.id not in self.results
                self.results[message.id] = message

    def cancel(self):
        if running := [number for number in self.requests if number not in self.results]:
            self.engine.handle(Cancel(id=self.rng.choice(running)))

    def crash(self):
        """Everything of the engine is gone; the front submits what is open once more, with what it has."""
        self.step()
        self.start()
        for number, request in self.requests.items():
            if number not in self.results:
                self.engine.handle(replace(request, emitted=pack_ids(self.output[number])))

    def evict(self):
        self.engine.space.tree.evict(self.rng.randrange(len(self.groups)))

    def ping(self):
        self.engine.handle(Ping(seq=1))

    def finish(self):
        self.step()
        while self.engine.loop.busy:
            self.step()
        for number, request in self.requests.items():
            answer, result = self.answer(request), self.results[number]
            if result.reason == "cancelled":
                assert self.output[number] == answer[: len(self.output[number])]
                continue
            assert self.output[number] == answer
            if request.prompt_logprobs >= 0:
                assert self.scores[number] == [-float(token) for token in request.prompt.cast("i")[1:]]
            assert 0 <= result.timing.cached_tokens <= len(request.prompt) // 4
            self.check_drafts(result)
        for pool in self.engine.space.pools:
            assert pool.available == pool.total

    def check_drafts(self, result):
        """Every right guess held up to the stop, and no wrong one."""
        drafted, accepted = (counts.get(self.nature, 0) for counts in (result.timing.drafted, result.timing.accepted))
        assert set(result.timing.drafted) <= {self.nature}
        right = drafted if result.reason == "length" else accepted
        assert {"oracle": right, "liar": 0}.get(self.nature, accepted) == accepted <= drafted


def live(seed, layout, events=60):
    rng = random.Random(f"{seed} {layout}")
    world = World(rng, layout, ahead=seed % 2 == 0)
    actions = [world.step] * 30 + [world.submit] * 6 + [world.cancel, world.evict, world.evict, world.ping]
    for _ in range(events):
        world.crash() if rng.random() < 0.01 else rng.choice(actions)()
    world.finish()
    return world


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", range(10))
def test_nothing_that_happens_changes_an_answer(layout, block):
    for seed in range(block * 30, block * 30 + 30):
        live(seed, layout)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tens_of_thousands_of_lives(layout):
    for seed in range(1000, 5000):
        live(seed, layout, events=80)

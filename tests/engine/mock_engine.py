"""A loop on the mock model without a peer or a thread: it is driven step by step."""

from mock_runner import FULL, VOCAB, MockRunner

from fwd.engine.grammar import Grammars
from fwd.engine.loop import Loop
from fwd.engine.space import Space
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Failed, Finished, Submit, Tokens
from fwd.protocol.values import Limits

PAGE, CHUNK = 4, 8


def submit(number, prompt, tokens=4, **fields):
    fields = {"seed": 0, "limits": Limits(max_tokens=tokens), **fields}
    return Submit(id=number, prompt=pack_ids(prompt), **fields)


class Engine:
    """`output` and `results` by request id; `read` is called with every message."""

    def __init__(self, groups=(FULL,), units=(64,), seqs=4, key=b"secret", nodes=1000, ahead=False, speculator=None):
        self.runner = MockRunner(PAGE, CHUNK, groups, ahead=ahead)
        self.space = Space(groups, units, PAGE, chunk=CHUNK, key=key, nodes=nodes)
        how = {"max_seqs": seqs, "chunk": CHUNK, "speculator": speculator, "grammars": Grammars(VOCAB)}
        self.loop = Loop(self, self.runner, self.space, **how)
        self.messages, self.output, self.results = [], {}, {}

    @property
    def scheduler(self):
        return self.loop._scheduler

    @property
    def prefilled(self):
        """Tokens of all prefill chunks so far."""
        return sum(launch[2] for launch in self.runner.launches if launch[0] == "prefill")

    def send(self, *messages):
        """What the loop says; it takes this object for its channel."""
        self.messages += messages
        for message in messages:
            match message:
                case Tokens():
                    self.output.setdefault(message.id, []).extend(message.ids)
                case Finished() | Failed():
                    assert message.id not in self.results
                    self.results[message.id] = message

    def handle(self, *messages):
        for message in messages:
            self.loop._handle(message)
        self.loop._flush()

    def step(self):
        if self.loop.busy:
            self.loop._step()
        self.loop._flush()
        self.space.check()

    def until(self, *numbers):
        """Run until these requests have ended."""
        while not set(numbers) <= set(self.results):
            assert self.loop.busy, "the engine stands still"
            self.step()

    def idle(self):
        """Run until there is nothing left to do."""
        while self.loop.busy:
            self.step()

    def ask(self, number, prompt, tokens=4, **fields):
        """Run one request to its end: its output and its timing."""
        self.handle(submit(number, prompt, tokens, **fields))
        self.until(number)
        return self.output.get(number, []), self.results[number].timing

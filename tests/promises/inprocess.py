"""Engines on real models in this process, and what they say to requests of every kind that have them alone."""

from collections import defaultdict
from dataclasses import dataclass, field

import checkpoints
import torch
from msgspec.structs import replace

from fwd.engine.device import cpu, host
from fwd.engine.grammar import Grammars
from fwd.engine.loop import Loop
from fwd.engine.plan import Plan, plan
from fwd.engine.space import Space
from fwd.engine.start import runner_of
from fwd.front.prompts import Prompts
from fwd.models.draft.config import read_draft
from fwd.models.draft.load import load_draft
from fwd.models.draft.model import DraftModel
from fwd.models.load import load as load_model
from fwd.models.model import Model
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Failed, Finished, Submit, Tokens, Vocabulary
from fwd.protocol.values import Limits, Sampling

CONTEXT = 256
PAGE = 16
RECORD = (
    '{"type": "object", "properties": {"name": {"enum": ["one", "two"]}, "ok": {"type": "boolean"}},'
    ' "required": ["name", "ok"], "additionalProperties": false, "x-guidance": {"whitespace_flexible": false}}'
)
GRAMMARS = ("regex:[a-f ]{3,30}", "regex:(yes|no, never)( indeed){0,5}", "json_schema:" + RECORD)
BEYOND = 15  # ids that are known to come after the end of an answer


@dataclass(frozen=True)
class Loaded:
    """A model, the plan of its engine, the text of its tokens, and perhaps a draft model."""

    model: Model
    plan: Plan
    vocabulary: Vocabulary
    draft: DraftModel | None = None


def load(cell, folder, device="cpu", seed=0):
    """A cell's random model, written to a folder."""
    checkpoints.make(cell.kind, folder, seed)
    return loaded(folder, device, cell.dtype, cell.kv_dtype)


def loaded(folder, device, dtype, kv_dtype="auto", wanted="none"):
    """The model in a folder, with the drafter that `--draft-model` names."""
    model = load_model(folder, device=device, dtype=dtype, context=CONTEXT)
    machine = {"cpu": cpu, "host": host}[device](1 << 34)
    spec = read_draft(wanted, folder, model.spec)
    draft = load_draft(spec, model, CONTEXT) if spec else None
    sized = plan(model.spec, machine, context=CONTEXT, max_seqs=16, kv_dtype=kv_dtype, draft=spec)
    return Loaded(model, sized, Prompts.load(folder).vocabulary, draft)


class Engine:
    """A loop without a peer; what it says is in `messages` once it is flushed, and lost where it dies before."""

    def __init__(self, loaded, seqs=16, pages=0, speculator=None):
        sized = loaded.plan
        units = (pages or sized.units[0], *sized.units[1:])
        self.runner = runner_of(loaded.model, sized)
        self.space = Space(sized.groups, units, sized.page_size, chunk=sized.chunk, key=b"key")
        self.loop = Loop(
            self,
            self.runner,
            self.space,
            max_seqs=seqs,
            chunk=sized.chunk,
            speculator=speculator and speculator(self),
            grammars=Grammars(sized.spec.vocab),
        )
        self.messages = []
        self.handle(loaded.vocabulary)

    def send(self, *messages):
        self.messages += messages

    def handle(self, *messages):
        for message in messages:
            self.loop._handle(message)
        self.loop._flush()

    def step(self):
        if self.loop.busy:
            self.loop._step()
        self.loop._flush()

    def take(self):
        said, self.messages = self.messages, []
        return said

    def cells(self, request, group, first):
        """The bytes of the committed cells from position `first` on: uint8 [positions, bytes of all layers]."""
        positions = torch.arange(first, request.computed)
        pages = torch.tensor(request.tables[group].pages, dtype=torch.int64)[positions // PAGE]
        assert (pages >= 0).all()
        parts = []
        for kv in self.runner._cache.layers:
            if kv.group == group:
                tensors = (getattr(kv, name) for name in kv.__slots__)
                parts += [
                    tensor[pages * PAGE + positions % PAGE].flatten(1).view(torch.uint8)
                    for tensor in tensors
                    if isinstance(tensor, torch.Tensor)
                ]
        return torch.cat(parts, dim=1)

    def visible(self, request, group):
        """The first position that the next row of a request sees."""
        window = self.space.groups[group].window
        return max(0, request.computed - window + 1) if window else 0

    @property
    def placed(self):
        return [request for request in self.loop._requests.values() if request.placed and not request.leader]


def requests(rng, count, vocab=checkpoints.VOCAB, tokens=32):
    """Requests of every kind of sampling and of every way of ending; some share a prompt."""
    made, texts = [], [[]]
    for number in range(1, count + 1):
        sampling = Sampling(
            temperature=rng.choice([0.0, 0.6, 1.0, 1.0, 1.5, 2.0]),
            top_k=rng.choice([0, 0, 5, 40]),
            top_p=rng.choice([1.0, 1.0, 0.9, 0.5]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.8]),
            presence_penalty=rng.choice([0.0, 0.0, 0.7, -0.5]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.4]),
            logit_bias=rng.choice([{}, {}, {3: 4.0, 9: -100.0}]),
            logprobs=rng.choice([-1, 0, 0, 5]),
        )
        prompt = _prompt(rng, texts, vocab, tokens)
        longest = CONTEXT - len(prompt)
        texts.append(prompt)
        limits = Limits(
            max_tokens=min(longest, rng.choice([1, *[tokens] * 5, rng.randrange(2, tokens)])),
            min_tokens=rng.choice([0, 0, 7, tokens - 3]),
            stop_ids=tuple(rng.sample(range(vocab), rng.choice([0, 1, 25, 60]))),
        )
        made.append(
            Submit(
                id=number,
                prompt=pack_ids(prompt),
                sampling=sampling,
                limits=limits,
                seed=rng.randrange(-(2**63), 2**63),
                choice=rng.randrange(3),
                cache=rng.random() < 0.8,
                grammar=rng.choice(GRAMMARS) if rng.random() < 0.2 else "",
                priority=rng.choice(["interactive", "interactive", "background"]),
            )
        )
    return made


def _prompt(rng, texts, vocab, tokens):
    """A text, perhaps that of another request or one that begins as it does, or so long that the context ends it."""
    start = rng.choice(texts)[: rng.randrange(120)]
    if rng.random() < 0.25 and texts[-1]:
        return texts[-1]
    more = CONTEXT - len(start) - tokens if rng.random() < 0.15 else rng.choice([1, 15, 16, 63, rng.randrange(2, 80)])
    return start + [rng.randrange(vocab) for _ in range(more)]


@dataclass
class Answer:
    """What a request is told: ids with all that stands beside them, how it ended; `cells` by group and position."""

    told: list = field(default_factory=list)
    end: object = None
    cells: dict = field(default_factory=lambda: defaultdict(dict))
    coming: list = field(default_factory=list)  # what drafts may foresee: all ids, also after the end

    @property
    def ids(self):
        return [token[0] for token in self.told]

    def read(self, message):
        match message:
            case Tokens():
                assert message.start == len(self.told)
                count = len(message.ids)
                columns = message.logprobs or [None] * count, message.top or [None] * count
                self.told += zip(message.ids, *columns, strict=True)
            case Finished():
                self.end = (message.reason, message.stop_id)
            case Failed():
                self.end = (message.code, message.message)


def alone(loaded, request):
    """What a request is told by an engine that has nothing else to do and never drafts; the cells it leaves."""
    engine, answer = Engine(loaded, seqs=1), Answer()
    drop = engine.loop._drop

    def noted(one):
        _note(engine, one, answer.cells)
        drop(one)

    engine.loop._drop = noted
    engine.handle(replace(request, cache=False))
    while engine.loop.busy:
        engine.step()
        for message in engine.take():
            answer.read(message)
        for one in engine.placed:
            _note(engine, one, answer.cells)
    answer.coming = answer.ids
    if answer.end[0] == "stop":
        answer.coming = _continued(loaded, request, answer.ids)
    return answer


def _note(engine, request, cells):
    for group in range(len(request.tables)):
        known = cells[group]
        first = max(known, default=-1) + 1
        known |= zip(range(first, request.computed), engine.cells(request, group, first), strict=True)


def _continued(loaded, request, ids):
    """The answer of a request and what would follow its end, as right drafts would have it."""
    left = request.limits.max_tokens - len(ids)
    limits = Limits(max_tokens=len(ids) + min(BEYOND, left))
    engine, found = Engine(loaded, seqs=1), list(ids)
    engine.handle(replace(request, emitted=pack_ids(ids), limits=limits, cache=False))
    while engine.loop.busy:
        engine.step()
    for message in engine.take():
        found += message.ids if isinstance(message, Tokens) else []
    return found

"""Drafters that are models: what they foresee is what a pass over the whole text foresees, whatever came between."""

import random
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import checkpoints
import pytest
from drafts import WIDE, Sizes, dflash_config, dflash_tensors, eagle_config, eagle_tensors, save, write_target
from msgspec import structs
from naive import Naive, Recorder
from reach import held_bytes
from test_draft_mtp import write as write_mtp

from fwd.engine.device import cpu, host
from fwd.engine.device_runner import DeviceRunner
from fwd.engine.loop import Loop
from fwd.engine.plan import plan
from fwd.engine.request import Request
from fwd.engine.runner import ModelRunner
from fwd.engine.scheduler import Span
from fwd.engine.space import Space
from fwd.engine.speculate import neural
from fwd.engine.speculate.drafter import NOTHING, Proposal, Wish
from fwd.engine.speculate.neural import Neural
from fwd.engine.speculate.passes import Passes
from fwd.kernels.reference import Reference
from fwd.kernels.sizes import MAX_ROWS
from fwd.models.draft.config import read_draft
from fwd.models.draft.load import load_draft
from fwd.models.load import load
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Finished, Submit, Tokens
from fwd.protocol.values import Draft, Limits, Sampling

CONTEXT = 256
KINDS = ("model", "windows", "mtp", "eagle", "dflash")
CASES = [(kind, "cpu") for kind in KINDS] + [(kind, "host") for kind in ("model", "eagle", "dflash")]
SMALL = Sizes(layers=1, heads=2, kv_heads=1, head_dim=64)
NORMED = replace(SMALL, qk_norm=True)
DEVICES = {"cpu": (cpu, "float32"), "host": (host, "bfloat16")}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory):
    """A target and its drafter on a device."""
    kind, device = request.param
    folder, (of, dtype) = tmp_path_factory.mktemp(kind), DEVICES[device]
    with pytest.MonkeyPatch.context() as patch:
        wanted = write(kind, folder, patch)
    found = SimpleNamespace(kind=kind, wanted=wanted, folder=folder / "target", dtype=dtype, device=of(1 << 34))
    return loaded(found)


def loaded(case, context=CONTEXT):
    """A case with its models, the drafter for so many positions."""
    found = copy(case)
    found.model = load(case.folder, device=case.device.kind, dtype=case.dtype, context=CONTEXT)
    found.spec = replace(read_draft(case.wanted, case.folder, found.model.spec), context=context)
    found.draft = load_draft(found.spec, found.model, context)
    return found


def write(kind, folder, patch):
    """A target and a drafter of a kind, both random; what `--draft-model` says of it."""
    if kind == "mtp":
        write_mtp("deepseek", folder / "target", patch)
        return "mtp"
    if kind == "windows":
        for seed, name in enumerate(("target", "draft")):
            checkpoints.make("qwen3-sliding", folder / name, seed)
        return str(folder / "draft")
    write_target(folder / "target", WIDE)
    match kind:
        case "model":
            write_target(folder / "draft", SMALL, seed=9)
        case "eagle":
            ids = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
            save(folder / "draft", eagle_config(SMALL, vocab=200, **ids), eagle_tensors(SMALL, vocab=200, target=WIDE))
        case "dflash":
            tensors = dflash_tensors(NORMED, taps=2, target=WIDE)
            save(folder / "draft", dflash_config(NORMED, ids=(0, 2)), tensors)
    return str(folder / "draft")


class Engine:
    """A loop over a model without a peer; `told` by request what its reader is told."""

    def __init__(self, case, speculator=None, *, seqs=4, pages=0, drafting=True):
        sized = plan(
            case.model.spec, case.device, context=CONTEXT, max_seqs=seqs, draft=case.spec if drafting else None
        )
        kernels = case.device.kernels
        self.plan = sized
        self.runner = DeviceRunner(case.model, case.model.ops, sized) if kernels else ModelRunner(case.model, sized)
        units = (pages or sized.units[0], *sized.units[1:])
        self.space = Space(sized.groups, units, sized.page_size, chunk=sized.chunk, key=b"key")
        self.loop = Loop(self, self.runner, self.space, max_seqs=seqs, chunk=sized.chunk, speculator=speculator)
        self.told = {}

    def neural(self, case):
        """The drafter, reading along."""
        drafter = Neural(case.draft, self.plan, self.ready)
        self.runner.follow(drafter)
        return drafter

    def ready(self):
        self.runner.copy(self.space.take_copies())

    def send(self, *messages):
        for message in messages:
            told = self.told.setdefault(message.id, [])
            match message:
                case Tokens():
                    told += message.ids
                case Finished():
                    told.append(message.reason)

    def run(self, requests, between=0):
        for request in requests:
            self.loop._handle(request)
            for _ in range(between):
                self.step()
        while self.loop.busy:
            self.step()
        return {request.id: self.told[request.id] for request in requests}

    def step(self):
        if self.loop.busy:
            self.loop._step()
        self.loop._flush()


class Checked:
    """A speculator that asks the drafter now and then, holds what it says against `naive`, and often drafts better."""

    def __init__(self, rng, naive, answers, most=MAX_ROWS):
        self.rng, self.naive, self.answers, self.most = rng, naive, answers, most
        self.neural, self.checked, self.ids = None, 0, 0

    def drafts(self, request):
        return request.room > 0 and self.rng.random() < 0.7

    def propose(self, wishes, rows):
        spare, asked = MAX_ROWS - rows, {}
        for request, most in wishes:
            count = self.rng.randrange(min(spare, most, self.most) + 1)
            spare -= count
            if count:
                asked[request.id] = Wish(request, count)
        found = dict(zip(asked, self.neural.propose(list(asked.values())), strict=True))
        for key, proposal in found.items():
            request, count = asked[key]
            wanted = min(count, self.neural._spec.block - 1) if self.neural.name == "dflash" else count
            assert list(proposal.ids) == self.naive.propose(request, wanted), f"request {key} at {request.length}"
            self.checked, self.ids = self.checked + 1, self.ids + len(proposal.ids)
        return [
            self._mixed(asked[wish.request.id], found[wish.request.id]) if wish.request.id in asked else NOTHING
            for wish in wishes
        ]

    def _mixed(self, wish, proposal):
        """The proposal, or one that is right up to somewhere."""
        request, count = wish
        if self.rng.random() < 0.3:
            return proposal
        coming = self.answers[request.id][request.output :][:count]
        right = self.rng.randrange(len(coming) + 1)
        ids = [token if place < right else (token + 1) % 200 for place, token in enumerate(coming)]
        return Proposal(proposal.drafter, tuple(ids)) if ids else NOTHING

    def settle(self, request, proposal, count):
        pass

    def measured(self, rows, drafts, seconds):
        pass

    def paused(self):
        pass

    def end(self, request):
        self.neural.end(request)


class Asking(Checked):
    """One that has everything drafted, and remembers after how many ids it asked and was answered."""

    def __init__(self):
        self.asked, self.ids, self.neural = [], [], None

    def drafts(self, request):
        return request.room > 0

    def propose(self, wishes, rows):
        share = (MAX_ROWS - rows) // len(wishes)
        found = self.neural.propose([wish._replace(most=min(wish.most, share)) for wish in wishes]) if share else []
        self.asked += [wish.request.length for wish in wishes]
        self.ids += [wish.request.length for wish, proposal in zip(wishes, found, strict=False) if proposal.ids]
        return found or [NOTHING] * len(wishes)


def naive_of(case, requests):
    """The answers of requests that share nothing but prefills, and what drafts must be."""
    engine = Engine(case, seqs=16)
    recorder = Recorder(engine.plan.chunk)
    if case.spec.taps:
        engine.runner.follow(recorder)
    told = engine.run([structs.replace(request, cache=False) for request in requests])
    answers = {each.id: [*each.emitted.cast("i"), *told[each.id][:-1]] for each in requests}
    sizes = {"chunk": engine.plan.chunk, "page": engine.plan.page_size, "context": CONTEXT, "kv": engine.plan.kv}
    return answers, Naive(case.draft, recorder.found, **sizes)


def wanted(rng, number, prompt, *, tokens=30, emitted=0, choice=0, plain=False):
    """A request for an answer to a prompt, drawn in one of several ways."""
    sampling = Sampling(
        temperature=rng.choice([0.0, 0.8, 1.2]),
        top_k=rng.choice([0, 20]),
        repetition_penalty=1.0 if plain else rng.choice([1.0, 1.0, 1.3]),
        logit_bias={} if plain else rng.choice([{}, {}, {3: 4.0}]),
    )
    known = [rng.randrange(200) for _ in range(emitted)]
    return Submit(
        id=number,
        prompt=pack_ids(prompt),
        emitted=pack_ids(known),
        sampling=sampling,
        limits=Limits(max_tokens=tokens),
        seed=number * 77 if not choice else 5,
        choice=choice,
    )


def text(rng, count):
    return [rng.randrange(200) for _ in range(count)]


def lives(rng, *, few=False):
    """Prompts around the edges of pages and chunks, resumed answers, forks, and prompts that begin as others do."""
    lengths, tokens = [1, 15, 16, 17, 64, 65, rng.randrange(20, 100)], 8 if few else 30
    prompts = [text(rng, count) for count in rng.sample(lengths, 2 if few else 4)]
    requests = [wanted(rng, number, prompt, tokens=tokens) for number, prompt in enumerate(prompts, 1)]
    requests.append(wanted(rng, 10, text(rng, rng.randrange(18, 80)), tokens=30, emitted=rng.randrange(20, 25)))
    common = text(rng, rng.choice([37, 68]))
    requests += [wanted(rng, 20 + choice, common, tokens=tokens, choice=choice) for choice in range(2 if few else 3)]
    return requests + [wanted(rng, number, common + text(rng, 5), tokens=tokens) for number in (30, 31)[: 2 - few]]


def life(case, rng, requests, **sizes):
    """What becomes of requests beside each other whose drafts are all checked: answers, engine, speculator."""
    answers, naive = naive_of(case, requests)
    checked = Checked(rng, naive, answers)
    engine = Engine(case, checked, **sizes)
    checked.neural = engine.neural(case)
    told = engine.run(requests, between=rng.randrange(3))
    found = {each.id: [*each.emitted.cast("i"), *told[each.id][:-1]] for each in requests}
    assert found == answers
    return told, engine, checked


@pytest.mark.parametrize("seed", [0, 1])
def test_drafts_are_those_of_a_pass_over_the_whole_text(case, seed):
    rng, few = random.Random(f"{seed} {case.kind}"), case.device.kernels
    sizes = {"seqs": rng.choice([3, 5, 16]), "pages": rng.choice([0, 24])}
    _, engine, checked = life(case, rng, lives(rng, few=few), **sizes)

    assert checked.checked > (10 if few else 40)
    engine.space.check()
    assert not checked.neural._states
    assert sorted(checked.neural._lines) == list(range(engine.plan.max_seqs))


def test_taps_change_no_bit_of_the_target(case):
    requests = lives(random.Random(3), few=True)
    told = Engine(case, seqs=16, drafting=False).run(requests)

    assert Engine(case, seqs=16).run(requests) == told


def test_what_is_planned_is_what_is_taken(case, monkeypatch):
    """Without what oneDNN pads the matrices with that it packs."""
    monkeypatch.setattr(Reference, "pack", lambda _, weight: replace(weight, data=weight.data.clone()))
    case = loaded(case)
    request, taken = wanted(random.Random(4), 1, [7] * 20, tokens=4), []
    for drafting in (False, True):
        checked = Asking() if drafting else None
        engine = Engine(case, checked, drafting=drafting)
        if checked:
            checked.neural = engine.neural(case)
        engine.run([request])
        reference = case.model.ops._chunks._reference if case.device.kernels else case.model.ops
        reference._step = None  # what it found out about the last rows
        taken.append(held_bytes(engine.runner))
    items = {name: size for name, size in engine.plan.items.items() if name.startswith("drafter_")}

    assert checked.ids
    assert taken[1] - taken[0] == sum(items.values()), items


def test_beyond_the_context_that_a_drafter_was_made_for_nothing_is_drafted(case):
    """Which ends in the middle of a chunk, and of an answer; the target goes on as if there were none."""
    short = loaded(case, 50)
    rng = random.Random(5)
    requests = [wanted(rng, number, text(rng, count), tokens=12) for number, count in enumerate((40, 49, 70), 1)]
    asking = Asking()
    engine = Engine(short, asking)
    asking.neural = engine.neural(short)
    told = engine.run(requests)

    assert told == Engine(case, drafting=False).run(requests)
    assert max(asking.ids) < 50 <= max(asking.asked)
    assert sorted(asking.neural._lines) == list(range(engine.plan.max_seqs))


@pytest.mark.parametrize("case", [("model", "cpu")], indirect=True)
def test_who_shares_a_prompt_is_known_though_lines_lack(case):
    """They have no pages yet when their prompt ends; lines are taken from those who were preempted."""
    drafter, rng = Engine(case, seqs=3).neural(case), random.Random(7)
    preempted, *sharing = [Request(wanted(rng, number, [1, 2, 3])) for number in range(1, 5)]
    drafter._begin(preempted, None)
    preempted.displace()
    for each in sharing:
        drafter._begin(each, None)

    assert sorted(drafter._states) == [2, 3, 4]
    assert drafter._lines == []


@pytest.mark.parametrize("case", [("model", "cpu")], indirect=True)
def test_who_never_asks_costs_nothing(case):
    drafter, rng = Engine(case).neural(case), random.Random(8)
    for number, wish in enumerate((Draft(drafter="off"), Draft(drafter="suffix"), Draft(max_draft=0))):
        drafter._begin(Request(structs.replace(wanted(rng, number, [1, 2, 3]), draft=wish)), None)
    assert not drafter._states
    drafter._begin(Request(structs.replace(wanted(rng, 9, [1, 2, 3]), draft=Draft(drafter="model"))), None)
    assert list(drafter._states) == [9]


@pytest.mark.parametrize("case", [("model", "cpu")], indirect=True)
def test_who_is_left_is_read_along_no_more_and_each_pass_for_that_is_told(case):
    drafter, limits = Engine(case).neural(case), Limits(max_tokens=200)
    passes, absorbed = drafter._passes, []
    passes.absorb = absorbed.append
    request = Request(structs.replace(wanted(random.Random(9), 1, [1, 2, 3]), limits=limits))
    drafter._begin(request, None)
    request.append([5] * (3 * MAX_ROWS))
    for reach in range(4, 3 + 2 * MAX_ROWS):
        drafter.launching([Span(request, reach - 1, reach)])
    assert drafter.read() == [1] == [1] * len(absorbed)
    assert drafter.read() == []
    drafter.end(request)
    drafter.launching([Span(request, 3 + 2 * MAX_ROWS, 4 + 2 * MAX_ROWS)])

    assert drafter.read() == []
    assert drafter.propose([Wish(request, 1)]) == [NOTHING]


def keep_further(passes, line, place, features, keep=Passes.keep):
    keep(passes, line, place + 1, features)


PLANTED = {
    "nothing is copied on write": ("model", Passes, "copy", lambda *_: None),
    "copies are made too late": ("model", Engine, "ready", lambda _: None),
    "drafts that did not hold are taken for known": ("model", neural, "_common", lambda guess, _: len(guess)),
    "what does not fit in a pass is left out": ("eagle", Passes, "absorb", lambda *_: None),
    "features stand a position further": ("eagle", Passes, "keep", keep_further),
    "what waits for its id is thought to be there": ("mtp", neural, "waits", lambda _: False),
}


PLACES = [((kind, "cpu"), planted) for kind, *planted in PLANTED.values()]


@pytest.mark.parametrize(("case", "planted"), PLACES, ids=PLANTED, indirect=["case"])
def test_a_planted_mistake_is_noticed(case, planted, monkeypatch):
    monkeypatch.setattr(*planted)
    with pytest.raises(AssertionError):
        lead(case, random.Random(6))


def lead(case, rng):
    """Some lives."""
    for _ in range(6):
        life(case, rng, lives(rng), seqs=4, pages=20)

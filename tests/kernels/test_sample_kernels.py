"""The sampler, verify and commit on a device against their definitions: the same tokens, whatever is asked for."""

import random
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from fwd.errors import KernelError
from fwd.kernels import sample
from fwd.kernels.drawing import (
    DRAWN,
    FIELDS,
    IN_PROMPT,
    PENALTIES,
    Drawing,
    drawing_bytes,
    fill_row,
    kinds_of,
    line_bias,
    line_counts,
    new_drawing,
    new_outcome,
)
from fwd.kernels.ops import Draw
from fwd.kernels.reference import Reference
from fwd.kernels.rows import Rows
from fwd.kernels.sampling import sample_row
from fwd.kernels.sizes import MAX_TOPS, mask_words, outcome_bytes, sampler_bytes

REFERENCE = Reference()
LOGPROB_BOUND = 1e-5
FIRST = 7  # of the seeds of everything random here


def normal(rows, vocab, seed=FIRST, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def coarse(rows, vocab, seed=FIRST):
    """Logits with many ties."""
    return (normal(rows, vocab, seed) * 2).round() / 4


def mask_of(ids, vocab):
    """Bits for these ids; those behind the vocabulary may be anything."""
    bits = np.zeros(32 * mask_words(vocab), np.bool_)
    bits[[*ids, *range(vocab, len(bits), 2)]] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


def any_mask(rng, vocab):
    """From one id to nearly all of them."""
    return mask_of(rng.sample(range(vocab), max(1, int(vocab * rng.choice([0, 0.01, 0.2, 0.9])))), vocab)


def any_draw(rng, vocab):
    """A draw of random parameters, each of them neutral half of the time."""

    def sometimes(value, neutral):
        return value if rng.random() < 0.5 else neutral

    tokens = range(vocab)
    some = rng.sample(tokens, min(vocab, 20))
    return Draw(
        seed=rng.getrandbits(64),
        position=rng.randrange(1 << 20),
        temperature=rng.choice([0.0, 1e-5, 0.3, 0.7, 1.0, 1.0, 1.5, 20.0]),
        top_k=sometimes(rng.choice([1, 2, 5, 40, vocab - 1, vocab, 10**10]), 0),
        top_p=sometimes(rng.choice([0.0, 0.1, 0.5, 0.9, 0.99, rng.random()]), 1.0),
        min_p=sometimes(rng.choice([1e-12, 0.01, 0.2, 1.0]), 0.0),
        repetition_penalty=sometimes(rng.uniform(0.5, 2.0), 1.0),
        presence_penalty=sometimes(rng.uniform(-2, 2), 0.0),
        frequency_penalty=sometimes(rng.uniform(-2, 2), 0.0),
        bias={token: rng.uniform(-5, 5) for token in some[: rng.randrange(5)]},
        banned=some[5 : 5 + rng.randrange(5)],
        mask=sometimes(any_mask(rng, vocab), None),
        seen=some,
        counts=Counter(rng.choices(some[::2], k=10)),
        top_logprobs=rng.choice([-1, -1, 0, 1, 5, MAX_TOPS]),
    )


def any_draws(vocab, seed=FIRST, count=16):
    rng = random.Random(seed)
    return [any_draw(rng, vocab) for _ in range(count)]


def drawn_by(launcher, logits, draws, times=1):
    """What `sample` gives, in values that compare, the last of `times` calls; the workspace must be left as it was."""
    workspace = sample.Workspace.new(launcher, logits.shape[1])
    for _ in range(times):
        sampled = sample.sample(launcher, workspace, logits.to(launcher.device), draws)
    for tensor in (workspace.level_counts, workspace.level_masses, workspace.arrivals, workspace.done):
        assert not tensor.any(), "a counter is not back at zero"
    tops = [None if top is None else (top.ids, top.logprobs) for top in sampled.tops]
    return sampled.ids, sampled.logprobs, sampled.finite, tops


def assert_defined(drawn, logits, draws):
    """`drawn` is what the definition draws."""
    ids, logprobs, finite, tops = drawn
    wanted = REFERENCE.sample(logits, draws)
    assert ids.tolist() == wanted.ids.tolist()
    assert finite.tolist() == wanted.finite.tolist()
    torch.testing.assert_close(logprobs, wanted.logprobs, atol=LOGPROB_BOUND, rtol=0, equal_nan=True)
    for top, other in zip(tops, wanted.tops, strict=True):
        assert (top is None) == (other is None)
        if top is not None:
            assert top[0] == other.ids
            assert top[1] == pytest.approx(other.logprobs, abs=LOGPROB_BOUND)


def agrees(execution, logits, draws, count=1, times=1):
    drawn = execution.everywhere(lambda launcher: drawn_by(launcher, logits, draws, times), count)
    assert_defined(drawn, logits, draws)


# ---- draws ----


@pytest.mark.parametrize("vocab", [1, 2, 33, 2049, 5003])
def test_draws_are_those_of_the_definition(execution, vocab):
    agrees(execution, normal(16, vocab), any_draws(vocab), count=2)


@pytest.mark.parametrize("seed", range(4))
def test_draws_among_many_ties_are_those_of_the_definition(execution, seed):
    agrees(execution, coarse(16, 700, seed), any_draws(700, seed))


@pytest.mark.parametrize("vocab", [128256, 262144])
def test_large_vocabularies(execution, vocab):
    draws = [
        Draw(seed=3, top_p=0.95, top_k=50, top_logprobs=3),
        Draw(seed=4, temperature=0.8),
        Draw(seed=5, top_p=0.99),
    ]
    agrees(execution, normal(3, vocab), draws)


@pytest.mark.parametrize("vocab", [100, 5000])  # 5000 on one level of the histogram: more than a list holds
def test_rows_of_equal_logits(execution, vocab):
    draws = [
        Draw(temperature=0.0),
        Draw(seed=1),
        Draw(seed=2, top_k=40),
        Draw(seed=3, top_p=0.013),
        Draw(seed=4, top_k=60, top_p=0.5),
        Draw(seed=5, min_p=1.0),
    ]
    agrees(execution, torch.full((6, vocab), -1.25), draws)


def test_more_tokens_let_through_than_a_list_holds(execution):
    limits = [{"top_p": 0.99}, {"top_k": 6000}, {"top_k": 7000, "top_p": 0.98}, {"min_p": 1e-6}]
    limits.append({"top_k": 5000, "top_p": 0.1})
    draws = [Draw(seed=seed, temperature=3.0, **limit) for seed, limit in enumerate(limits)]
    agrees(execution, normal(5, 9001), draws)


def test_heads_that_hold_nearly_all_the_mass(execution):
    logits = normal(5, 300)
    logits[:, 250] = 60.0
    logits[2:, 17] = 60.0
    logits[4, 90] = 60.0 - 2**-18
    draws = [Draw(seed=9, position=row, top_p=p) for row, p in enumerate([0.9, 1e-9, 0.5, 0.51, 0.7])]
    agrees(execution, logits, draws)


def test_every_token_but_a_few_is_banned_or_all_of_them(execution):
    logits = normal(4, 60)
    most = [token for token in range(60) if token not in {13, 44}]
    draws = [Draw(seed=1, banned=most), Draw(seed=2, banned=most, top_k=30, top_p=0.9)]
    draws += [Draw(seed=3, banned=range(60)), Draw(seed=4, banned=range(60), top_p=0.5)]
    agrees(execution, logits, draws)


def test_penalties_of_a_row_that_has_no_history(execution):
    draws = [Draw(seed=1, counts={5: 1}, presence_penalty=0.5), Draw(seed=2, presence_penalty=1.0)]
    draws += [Draw(seed=3, repetition_penalty=1.3), Draw(seed=4), Draw(seed=5, frequency_penalty=1.0)]
    for first in range(len(draws)):  # the first of them alone has any counts
        agrees(execution, normal(len(draws) - first, 300), draws[first:])


def test_numbers_at_the_ends_of_the_format(execution):
    logits = torch.tensor([[0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, 1e30, 2e-38], [1e-40, 0.0, -0.0, -1e-39] * 2])
    draws = [Draw(temperature=t, top_p=p, top_logprobs=8) for t in (0.0, 1.0, 1e-4, 50.0) for p in (1.0, 0.7)]
    for row in logits:
        rows = row.repeat(len(draws), 1)
        ids, _, finite, tops = drawn_by(execution.launcher, rows, draws)
        wanted = REFERENCE.sample(rows, draws)
        assert ids.tolist() == wanted.ids.tolist()
        assert [top[0] for top in tops] == [top.ids for top in wanted.tops]
        assert finite.all()


def test_a_row_draws_the_same_beside_any_others_and_at_any_index(execution):
    logits, draws = normal(16, 2500), any_draws(2500, seed=11)
    (launcher,) = execution.launchers(1)
    ids, logprobs, _, tops = drawn_by(launcher, logits, draws)
    order = random.Random(FIRST).sample(range(16), 16)
    turned = drawn_by(launcher, logits[order], [draws[row] for row in order])
    assert torch.equal(turned[0], ids[order])
    assert torch.equal(turned[1], logprobs[order])
    assert turned[3] == [tops[row] for row in order]
    for row in (0, 5, 15):
        alone = drawn_by(launcher, logits[row : row + 1], draws[row : row + 1])
        assert (alone[0][0], alone[1][0], alone[3][0]) == (ids[row], logprobs[row], tops[row])


def test_more_rows_than_a_launch_takes(execution):
    agrees(execution, normal(37, 40), any_draws(40, count=37))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_disturbs_no_other(execution, poison):
    logits, draws = normal(6, 3000), any_draws(3000, seed=5, count=6)
    (launcher,) = execution.launchers(1)
    healthy = drawn_by(launcher, logits, draws)
    logits[2, 2900] = logits[4, 0] = poison
    agrees(execution, logits, draws)
    ids, logprobs, finite, tops = drawn_by(launcher, logits, draws)
    assert finite.tolist() == [True, True, False, True, False, True]
    assert ids[[2, 4]].tolist() == [0, 0]
    others = [0, 1, 3, 5]
    assert torch.equal(ids[others], healthy[0][others])
    assert torch.equal(logprobs[others], healthy[1][others])
    assert [tops[row] for row in others] == [healthy[3][row] for row in others]


def test_scores_are_those_of_the_definition(execution):
    logits, ids, tops = coarse(20, 2100), [110 * row for row in range(20)], [-1, 0, 3, MAX_TOPS] * 5
    logits[3, 3] = float("nan")
    wanted = REFERENCE.score(logits, ids, tops)

    def run(launcher):
        workspace = sample.Workspace.new(launcher, 2100)
        scored = sample.score(launcher, workspace, logits.to(launcher.device), ids, tops)
        return scored.ids, scored.logprobs, scored.finite, [top and (top.ids, top.logprobs) for top in scored.tops]

    scored = execution.everywhere(run)
    assert scored[0].tolist() == ids
    assert scored[2].tolist() == wanted.finite.tolist()
    torch.testing.assert_close(scored[1], wanted.logprobs, atol=LOGPROB_BOUND, rtol=0, equal_nan=True)
    assert [top and top[0] for top in scored[3]] == [top and top.ids for top in wanted.tops]


def test_frequencies_follow_softmax(execution):
    logits = torch.tensor([1.5, 0.3, -0.7, 1.1, 0.0, 0.9, -1.5, 0.4])
    launcher, counts = execution.launcher, np.zeros(8)
    workspace, rows = sample.Workspace.new(launcher, 8), logits.repeat(16, 1).to(launcher.device)
    for call in range(120):
        draws = [Draw(seed=call, position=row, temperature=0.8) for row in range(16)]
        counts += np.bincount(sample.sample(launcher, workspace, rows, draws).ids.numpy(), minlength=8)
    expected = (logits / 0.8).double().softmax(-1).numpy() * counts.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # 99.9th percentile of chi-square at 7 degrees of freedom


# ---- verify and commit ----

VOCAB = 24


class Case:
    """A step of random chains and trees, in which most drafts hold: rows in order, by what they are."""

    def __init__(self, seed, *, penalties=False):
        self.rng = random.Random(seed)
        self.lines = 5
        self.ids, self.sequences, self.parents, self.kinds = [], [], [], []
        kinds = DRAWN | PENALTIES * penalties
        for line in self.rng.sample(range(self.lines), self.rng.randrange(1, self.lines)):
            tree = self.rng.random() < 0.5
            for _ in range(self.rng.randrange(2)):
                self.add(line, -1, 0)  # a known token that only writes KV
            root = len(self.ids)
            self.add(line, -1, kinds)
            for _ in range(self.rng.randrange(min(6, 16 - len(self.ids)) if len(self.ids) < 16 else 1)):
                before = len(self.ids) - 1
                self.add(line, self.rng.randrange(root, before + 1) if tree else self.rng.choice([-1, before]), kinds)
            if len(self.ids) > 8:
                break
        if self.rng.random() < 0.5:
            self.add(-1, -1, 0)  # padding
        self.place_of = [100 + 3 * row for row in range(len(self.ids))]
        self.logits = normal(len(self.ids), VOCAB, seed, 1.0)
        self.seen = {line: self.rng.sample(range(VOCAB), 4) for line in range(self.lines)}
        self.counts = {line: Counter(self.rng.choices(range(VOCAB), k=6)) for line in range(self.lines)}

    def add(self, line, parent, kinds):
        self.ids.append(self.rng.randrange(VOCAB))
        self.sequences.append(line)
        self.parents.append(parent)
        self.kinds.append(kinds)

    def root(self, line):
        rows = range(len(self.ids))
        return next((row for row in rows if self.sequences[row] == line and self.kinds[row]), -1)

    def parent(self, row):
        return self.parents[row] if self.parents[row] >= 0 else row - 1

    def draw(self, row):
        """How the row draws, with the drafts above it in its history."""
        line, drafts, above = self.sequences[row], [], row
        while above != self.root(line):
            drafts.append(self.ids[above])
            above = self.parent(above)
        penalties = bool(self.kinds[row] & PENALTIES)
        return Draw(
            seed=5,
            position=self.place_of[row],
            temperature=0.5,
            top_k=[0, 6][row % 2],
            repetition_penalty=1.4 if penalties else 1.0,
            presence_penalty=0.4 * penalties,
            frequency_penalty=0.7 * penalties,
            seen={*self.seen[line], *self.counts[line], *drafts},
            counts=self.counts[line] + Counter(drafts),
        )

    def drawn(self):
        """What each row draws; −1: nothing; None: it is not finite."""
        drawn = []
        for row, logits in enumerate(self.logits.numpy()):
            token = sample_row(logits, self.draw(row)) if self.kinds[row] and np.isfinite(logits).all() else None
            drawn.append(token if self.kinds[row] else -1)
        return drawn

    def hold(self):
        """Make three of four drafts what the row above them draws, in the order of rows."""
        for row in range(len(self.ids)):
            line = self.sequences[row]
            if self.kinds[row] and row != self.root(line) and self.rng.random() < 0.75:
                above = self.parent(row)
                self.ids[row] = sample_row(self.logits[above].numpy(), self.draw(above))

    def committed(self):
        """Of each line: the tokens that it commits, and the row of the last."""
        drawn, out = self.drawn(), []
        for line in range(self.lines):
            row, tokens, last = self.root(line), [], -1
            while row >= 0 and drawn[row] is not None:
                tokens.append(drawn[row])
                last = row
                below = [
                    each
                    for each in range(row + 1, len(self.ids))
                    if self.sequences[each] == line and self.parent(each) == row and self.ids[each] == drawn[row]
                ]
                row = below[0] if below else -1
            out.append((tokens, last))
        return out

    def drawing(self, device):
        drawing = new_drawing(torch.device("cpu"), len(self.ids), self.lines, VOCAB)
        arrays = {name: getattr(drawing, name).numpy() for name in FIELDS}
        for row, kinds in enumerate(self.kinds):
            if kinds:
                fill_row(arrays, row, self.draw(row), kinds)
        for line in range(self.lines):
            draw = Draw(seen=self.seen[line], counts=self.counts[line])
            ids, values = line_counts(draw)
            drawing.counts[line, torch.from_numpy(ids)] = torch.from_numpy(values)
        return Drawing(**{name: getattr(drawing, name).to(device) for name in Drawing.__dataclass_fields__})

    def run(self, launcher, stamp=77):
        """The outcome, what the next step starts from, and the counts."""
        device = launcher.device

        def int64(values):
            return torch.tensor(values, dtype=torch.int64, device=device)

        workspace = sample.Workspace.new(launcher, VOCAB)
        drawing, outcome = self.drawing(device), new_outcome(len(self.ids), self.lines, device)
        next_ids = int64([-5] * self.lines)
        rows = Rows(int64([0] * len(self.ids)), int64(self.sequences), int64(self.parents), ())
        sample.draw(
            launcher, workspace, self.logits.to(device), int64(self.ids), rows,
            drawing=drawing, outcome=outcome, next_ids=next_ids, step=int64([stamp]),
        )  # fmt: skip
        return (
            [outcome.ids.cpu(), outcome.accepted.cpu(), outcome.last.cpu(), outcome.stamp.cpu(), outcome.finite.cpu()],
            next_ids.cpu(),
            drawing.counts.cpu(),
        )

    def assert_committed(self, result):
        (ids, accepted, last, stamp, finite), next_ids, counts = result
        committed, drawn = self.committed(), self.drawn()
        rows = [row for row, kinds in enumerate(self.kinds) if kinds]
        assert ids[rows].tolist() == [drawn[row] or 0 for row in rows]
        assert finite[rows].tolist() == [int(drawn[row] is not None) for row in rows]
        assert accepted.tolist() == [len(tokens) for tokens, _ in committed]
        assert last.tolist() == [row for _, row in committed]
        assert next_ids.tolist() == [tokens[-1] if tokens else -5 for tokens, _ in committed]
        assert stamp.tolist() == [77]
        for line, (tokens, _) in enumerate(committed):
            penalties = any(k & PENALTIES for k, s in zip(self.kinds, self.sequences, strict=True) if s == line)
            after = self.counts[line] + Counter(tokens) if penalties else self.counts[line]
            found = {token: n % IN_PROMPT for token, n in enumerate(counts[line].tolist()) if n % IN_PROMPT}
            assert found == dict(after)


@pytest.mark.parametrize("seed", range(12))
def test_drafts_are_verified_and_committed(execution, seed):
    case = Case(seed, penalties=seed % 2 == 1)
    case.hold()
    case.assert_committed(execution.everywhere(case.run, 2))


def test_the_cases_accept_and_refuse_drafts():
    lengths = Counter()
    for seed in range(12):
        case = Case(seed, penalties=seed % 2 == 1)
        case.hold()
        lengths.update(len(tokens) for tokens, _ in case.committed())
    assert {0, 1, 2, 3} <= lengths.keys(), lengths


def chain(drafts):
    """One line with a root and drafts that all hold."""
    case = Case(0)
    case.ids, case.sequences, case.parents = [1] * (1 + drafts), [2] * (1 + drafts), [-1] * (1 + drafts)
    case.kinds = [DRAWN] * (1 + drafts)
    case.place_of = [100 + 3 * row for row in range(1 + drafts)]
    case.logits = normal(1 + drafts, VOCAB, 3)
    for row in range(1, 1 + drafts):
        case.ids[row] = sample_row(case.logits[row - 1].numpy(), case.draw(row - 1))
    return case


@pytest.mark.parametrize("row", [0, 1, 4])
def test_a_row_that_is_not_finite_ends_its_line_before_its_token(execution, row):
    case = chain(5)
    case.logits[row, 3] = float("nan")
    result = execution.everywhere(case.run, 1)
    case.assert_committed(result)
    assert result[0][1][2] == row


def test_a_chain_of_fifteen_drafts_is_accepted_whole(execution):
    case = chain(15)
    result = execution.everywhere(case.run, 1)
    case.assert_committed(result)
    assert result[0][1][2] == 16


def test_a_history_that_drafts_add_to_decides(execution):
    """Every draft is the best token of the row below it, which a penalty for what was just drawn forbids."""
    case = chain(4)
    case.kinds = [DRAWN | PENALTIES] * 5
    case.logits[:] = torch.linspace(0, 0.5, VOCAB)
    case.hold()
    case.assert_committed(execution.everywhere(case.run, 1))


def seen_with_the_stamp(launcher):
    """Whether a thread that polls the stamp, as the engine does, finds all of the outcome once it is there."""
    case, device = chain(15), launcher.device
    drawing, outcome = case.drawing(device), new_outcome(16, case.lines, device, pinned=device.type == "cuda")
    int64 = {"dtype": torch.int64, "device": device}
    rows = Rows(
        torch.zeros(16, **int64), torch.tensor(case.sequences, **int64), torch.tensor(case.parents, **int64), ()
    )
    stamp, ids, accepted = (getattr(outcome, name).numpy() for name in ("stamp", "ids", "accepted"))
    found, give_up = [], threading.Event()

    def poll():
        while not give_up.is_set():
            if stamp[0] == 9:
                found.append((ids.tolist(), accepted.tolist()))
                return

    poller = threading.Thread(target=poll)
    workspace = sample.Workspace.new(launcher, VOCAB)
    logits, tokens = case.logits.to(device), torch.tensor(case.ids, **int64)
    next_ids, step = torch.zeros(case.lines, **int64), torch.tensor([9], **int64)
    poller.start()
    try:
        sample.draw(
            launcher, workspace, logits, tokens, rows, drawing=drawing, outcome=outcome, next_ids=next_ids, step=step
        )
        poller.join(20)
    finally:
        give_up.set()
        poller.join()
    return found == [(case.drawn(), [len(tokens) for tokens, _ in case.committed()])]


def test_the_stamp_is_written_after_all_else(execution):
    assert all(seen_with_the_stamp(execution.launcher) for _ in range(5))


# ---- buffers ----


def test_bytes_are_those_of_the_buffers(execution):
    def size(buffers):
        return sum(getattr(buffers, name).nbytes for name in type(buffers).__dataclass_fields__)

    launcher, cpu = execution.launcher, torch.device("cpu")
    assert size(sample.Workspace.new(launcher, 5001)) == sampler_bytes(5001)
    assert size(sample.Workspace.new(launcher, 2048, rows=3)) == sampler_bytes(2048, 3)
    assert size(new_drawing(cpu, 16, 5, 33)) == drawing_bytes(16, 5, 33)
    assert size(new_outcome(16, 5, cpu)) == outcome_bytes(16, 5)


def test_grids():
    assert [sample.chunks(vocab) for vocab in (1, 2048, 2049, 262144)] == [1, 1, 2, 128]
    assert [sample.pieces(vocab, 1) for vocab in (1, 4096, 4097, 262144)] == [1, 1, 2, 64]
    assert [sample.pieces(128256, rows) for rows in (1, 4, 8, 16)] == [32, 32, 16, 8]


def test_a_draw_as_the_host_writes_it():
    fields = {name: torch.full((2,), 9, dtype=dtype).numpy() for name, dtype in FIELDS.items()}
    draw = Draw(seed=2**64 - 2, position=5, temperature=1e-40, top_k=2**40, min_p=0.25, banned=(3, 4), bias={7: 1.5})
    fill_row(fields, 1, replace(draw, seen=(1, 2), counts={2: 6}), kinds_of(draw))
    wanted = {"seeds": -2, "places": 5, "temperatures": 0.0, "top_ps": 1.0, "min_ps": 0.25, "repetitions": 1.0}
    wanted |= {"presences": 0.0, "frequencies": 0.0, "top_ks": 2**31 - 1, "tops": -1, "kinds": 5}
    assert {name: array[1].item() for name, array in fields.items()} == wanted
    assert all(array[0] == 9 for array in fields.values())
    assert [each.tolist() for each in line_bias(draw)] == [[7, 3, 4], [1.5, -np.inf, -np.inf]]
    assert [each.tolist() for each in line_counts(Draw(seen=(1, 2), counts={2: 6}))] == [[1, 2], [IN_PROMPT, 6]]
    assert [kinds_of(Draw(presence_penalty=1.0)), kinds_of(Draw())] == [DRAWN | PENALTIES, DRAWN]


# ---- planted bugs, and memory ----


def is_caught(execution, mutation, check):
    mutant = execution.mutated(*mutation)
    try:
        for launcher in mutant.launchers(3):
            check(launcher)
    except (AssertionError, KernelError):
        return True
    return False


@pytest.mark.parametrize(
    "mutation",
    [
        ("sampling.cuh", "a.id < b.id", "a.id > b.id"),  # ties go to the highest id
        ("sampling.cuh", " || (a.score == b.score && a.id < b.id)", ""),  # … or to whichever comes later
        ("sample.cu", "if (!last_arriver(arrivals + index, chunks)) return;", "if (chunk > 0) return;"),
        ("common.cuh", "if (last) *counter = 0;", ""),
        ("sample.cu", "counts[level] = 0, masses[level] = 0;", "counts[level] = 0;"),
        ("selection.cuh", "static_cast<uint64_t>(share) : top_k;", "static_cast<uint64_t>(share) : top_k + 1;"),
        ("selection.cuh", "if (found.sum >= limit)", "if (found.sum > limit)"),
        ("selection.cuh", "*held = 0;\n        block_barrier();", "*held = 0;"),
    ],
    ids=["highest id", "no tie rule", "not the last", "no reset", "mass left", "k + 1", "limit", "barrier"],
)
def test_planted_bugs_in_a_draw_are_caught(execution, mutation):
    logits = coarse(6, 5000)
    logits[:4] = torch.arange(5000) % 7 / 8
    limits = [{"temperature": 0.0}, {"top_k": 1}, {"top_k": 1}, {"top_k": 1}, {"top_k": 30}, {"top_p": 0.4}]
    draws = [Draw(seed=seed, **limit) for seed, limit in enumerate(limits)]

    def check(launcher):
        for position in range(4):
            placed = [replace(draw, position=position) for draw in draws]
            assert_defined(drawn_by(launcher, logits, placed), logits, placed)

    assert is_caught(execution, mutation, check)


@pytest.mark.parametrize(
    "mutation",
    [
        ("commit.cuh", " && rows.parent(draft) == row", ""),
        ("commit.cuh", "row >= 0 && results.rows[row].finite;", "row >= 0;"),
        ("commit.cuh", "++drawing.counts[", "drawing.counts["),
        ("sampling.cuh", "!rows.is_root(draft); draft = ", "false; draft = "),
    ],
    ids=["any parent", "not finite", "not counted", "history of drafts"],
)
def test_planted_bugs_in_a_commit_are_caught(execution, mutation):
    cases = [Case(seed, penalties=seed % 2 == 1) for seed in range(12)] + [chain(3)]
    for case in cases:
        case.hold()
    cases[-1].logits[1, 0] = float("nan")

    def check(launcher):
        for case in cases:
            case.assert_committed(case.run(launcher))

    assert is_caught(execution, mutation, check)


def test_an_early_stamp_is_caught(execution):
    old, new = (
        "    bool selected = ",
        "    if (threadIdx.x == 0) store_release_system(out_stamp, *step);\n    bool selected = ",
    )
    mutant = execution.mutated("sample.cu", old, new)
    assert not all(seen_with_the_stamp(launcher) for launcher in mutant.launchers(10))


def test_memory_is_respected(sanitized):
    done = sanitized("""
        from test_sample_kernels import *
        from fwd.kernels.host import HostLauncher
        launcher = HostLauncher(3, 0xFF, sanitize=True)
        for vocab in (1, 2049):
            logits, draws = coarse(4, vocab), any_draws(vocab, count=4)
            assert_defined(drawn_by(launcher, logits, draws), logits, draws)
        case = Case(3, penalties=True)
        case.hold()
        case.assert_committed(case.run(launcher))
        print("clean")
    """)
    assert (done.returncode, done.stdout.strip()) == (0, "clean"), done.stderr[-2000:]

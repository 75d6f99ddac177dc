"""Masks of the sampler on a device: what a grammar forbids is never drawn, and each row has a mask of its own."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_sample_kernels import FIRST, agrees, is_caught, mask_of, normal

from fwd.kernels import sample
from fwd.kernels.drawing import FIELDS, Drawing, fill_row, kinds_of, new_drawing, new_outcome
from fwd.kernels.ops import Draw
from fwd.kernels.rows import Rows
from fwd.kernels.sampling import sample_row

MASKS = "drawing.masks + static_cast<int64_t>(index) * ((vocab + 31) / 32)"
NOISY = "    best = better(best, {static_cast<double>(value) + gumbel(word), id});"
LINES = (0, 1, 1, 1, 2, 2)  # of the rows of a step
VOCAB = 75


@pytest.mark.parametrize("vocab", [31, 32, 33, 5003])
def test_masked_ids_are_not_drawn(execution, vocab):
    rng, last = random.Random(vocab), vocab - 1
    draws = []
    for seed, ids in enumerate([[last], [0, last], rng.sample(range(vocab), 20), range(vocab), []]):
        for limits in ({}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.6, "min_p": 0.01}):
            counts = Counter(rng.choices(range(vocab), k=9))
            history = {"seen": counts, "counts": counts, "repetition_penalty": 1.3, "presence_penalty": 0.4}
            wanted = Draw(seed=seed, mask=mask_of(ids, vocab), bias={last: -3.0, 0: 2.0}, top_logprobs=2, **limits)
            draws += [wanted, replace(wanted, **history), replace(wanted, mask=None)]
    agrees(execution, normal(len(draws), vocab), draws)


class Step:
    """Rows of three lines with drafts; the first four have masks, every second one penalties."""

    def __init__(self):
        rng = random.Random(FIRST)
        counts = Counter(rng.choices(range(VOCAB), k=12))
        masks = [mask_of(rng.sample(range(VOCAB), 9), VOCAB) for _ in range(4)] + [None, None]
        self.draws = [Draw(seed=row, mask=mask) for row, mask in enumerate(masks)]
        for row in range(1, 6, 2):
            self.draws[row] = replace(self.draws[row], counts=counts, presence_penalty=0.5)
        self.logits = normal(6, VOCAB)

    def drawing(self, device):
        drawing = new_drawing(torch.device("cpu"), 6, 3, VOCAB)
        arrays = {name: getattr(drawing, name).numpy() for name in FIELDS}
        for row, draw in enumerate(self.draws):
            fill_row(arrays, row, draw, kinds_of(draw))
            if draw.mask is not None:
                drawing.masks[row] = torch.from_numpy(draw.mask.view(np.int32))
            for token, count in draw.counts.items():
                drawing.counts[LINES[row], token] = count
        return Drawing(**{name: getattr(drawing, name).to(device) for name in Drawing.__dataclass_fields__})

    def check(self, launcher):
        """The drafts are all id 0, which the rows below them count."""
        device = launcher.device

        def int64(*values):
            return torch.tensor(values, dtype=torch.int64, device=device)

        outcome, ids = new_outcome(6, 3, device), int64(*[0] * 6)
        sample.draw(
            launcher, sample.Workspace.new(launcher, VOCAB), self.logits.to(device), ids,
            Rows(ids, int64(*LINES), int64(*[-1] * 6), ()),
            drawing=self.drawing(device), outcome=outcome, next_ids=int64(0, 0, 0), step=int64(1),
        )  # fmt: skip
        wanted = []
        for row, draw in enumerate(self.draws):
            drafts = Counter({0: row - LINES.index(LINES[row])})
            known = replace(draw, counts=draw.counts + drafts) if draw.counts else draw
            wanted.append(sample_row(self.logits[row].numpy(), known))
        assert outcome.ids.tolist() == wanted


def test_each_row_has_a_mask_of_its_own(execution):
    for launcher in execution.launchers(3):
        Step().check(launcher)


@pytest.mark.parametrize(
    "mutation",
    [
        ("    if (!row.allows(id)) return -INFINITY;\n", ""),
        (MASKS, MASKS.replace("index", "(index + 1) % 6")),
        (MASKS, MASKS.replace("index", "rows.sequences[index]")),
        (MASKS, MASKS.replace("(vocab + 31)", "vocab")),
        ("if (!row.allows(id)) return", "if (!row.counts && !row.allows(id)) return"),
        ("if (!row.allows(id)) return -INFINITY;", "if (!row.allows(id)) logit -= 1.0f;"),
        ("mask[id / 32] >> id % 32", "mask[id / 32] >> (31 - id % 32)"),
        (NOISY, f"    if (value == -INFINITY) value = 0.0f;\n{NOISY}"),
    ],
    ids=["none", "other row's", "the line's", "words cut off", "no penalties", "a penalty", "other end", "after noise"],
)
def test_planted_bugs_in_a_mask_are_caught(execution, mutation):
    assert is_caught(execution, ("sampling.cuh", *mutation), Step().check)


def test_memory_of_masks_is_respected(sanitized):
    done = sanitized("""
        from test_sample_masks import *
        from fwd.kernels.host import HostLauncher
        Step().check(HostLauncher(3, 0xFF, sanitize=True))
        print("clean")
    """)
    assert (done.returncode, done.stdout.strip()) == (0, "clean"), done.stderr[-2000:]

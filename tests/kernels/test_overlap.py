"""A whole step whose launches overlap: what a kernel finds of the one before it, it finds after it has waited."""

import torch
from agreement import same_bits
from execution import Execution
from layers import POSITIONS, Chance, angles
from quants import FORMS, damped

from fwd.kernels.device import DeviceOps
from fwd.kernels.drawing import FIELDS, fill_row, kinds_of, new_drawing, new_outcome
from fwd.kernels.host import HostLauncher
from fwd.kernels.kv import KV
from fwd.kernels.ops import QKV, Draw
from fwd.kernels.rows import Cells, Rows

HIDDEN, HEADS, KV_HEADS, DIM, INNER, VOCAB = 72, 4, 2, 64, 96, 307
LINES, PAGE, PAGES, STEPS = 5, 4, 2, 5
DRAWS = [
    Draw(temperature=0.0),
    Draw(seed=1, frequency_penalty=0.5),
    Draw(seed=2, top_k=20),
    Draw(seed=3, top_p=0.9),
    Draw(seed=4, top_k=5, repetition_penalty=1.3, top_logprobs=3),
]


# Of each layer: what its weights are, those with 72 inputs and the others.
PLAIN = [("bf16", "bf16")] * 2
QUANTISED = [("mxfp4", "int4-zeros"), ("nvfp4", "fp8-block"), ("fp8-channel", "int4-128")]


class Model:
    """Random layers over a cache, in bfloat16 (plain heads) or fp8 (heads are normed)."""

    def __init__(self, *, fp8, forms):
        chance = Chance(11)
        self.embedding = chance.matrix(VOCAB, HIDDEN).pack()
        self.last, self.rope = chance.norm(HIDDEN), torch.stack(angles(DIM), dim=1)
        self.layers = [self.layer(chance, fp8, *pair) for pair in forms]
        self.tables = torch.randperm(LINES * PAGES, generator=chance.generator).int().view(LINES, PAGES)

    def layer(self, chance, fp8, narrow, wide):
        width = (HEADS + 2 * KV_HEADS) * DIM
        norms = [chance.norm(DIM) if fp8 else None for _ in range(2)]
        qkv = QKV(chance.norm(HIDDEN), matrix(chance, narrow, width, HIDDEN), None, *norms, KV_HEADS, DIM)
        size = (LINES * PAGES * PAGE, KV_HEADS, DIM)
        cells = [torch.zeros(size).to(torch.float8_e4m3fn if fp8 else torch.bfloat16) for _ in range(2)]
        scales = [torch.zeros(size[:2]) if fp8 else None for _ in range(2)]
        output, gate_up = matrix(chance, wide, HIDDEN, HEADS * DIM), matrix(chance, narrow, 2 * INNER, HIDDEN)
        return (
            qkv,
            KV(*cells, PAGE, 0, 0, *scales),
            output,
            chance.norm(HIDDEN),
            gate_up,
            matrix(chance, wide, HIDDEN, INNER),
        )

    def logits(self, ops, ids, rows):
        hidden = ops.embed(ids, self.embedding)
        for qkv, kv, output, norm, gate_up, down in self.layers:
            mixed = ops.decode_attention(ops.qkv(hidden, qkv, self.rope, rows, kv), rows, kv)
            hidden = ops.linear(mixed, output, hidden)
            hidden = ops.linear(ops.gate_up(hidden, norm, gate_up), down, hidden)
        return ops.head(hidden, self.last, self.embedding)

    def rows(self, position):
        sequences = torch.arange(LINES)
        positions = torch.full_like(sequences, position)
        slots = self.tables[sequences, positions // PAGE].long() * PAGE + positions % PAGE
        return Rows(positions, sequences, torch.full_like(sequences, -1), (Cells(slots, self.tables),))


def matrix(chance, form, outputs, inputs):
    if form == "bf16":
        return chance.matrix(outputs, inputs).pack()
    return damped(form, outputs, inputs, seed=int(torch.randint(99, (), generator=chance.generator))).pack()


def decoded(launcher, *, fp8, forms=PLAIN):
    """Ids and log-probabilities of some steps, each of which begins with what the one before drew, and all logits."""
    model, ops, found = Model(fp8=fp8, forms=forms), DeviceOps(launcher), []
    drawing, outcome = new_drawing(ops.device, LINES, LINES, VOCAB), new_outcome(LINES, LINES, ops.device)
    for row, draw in enumerate(DRAWS):
        fill_row({name: getattr(drawing, name).numpy() for name in FIELDS}, row, draw, kinds_of(draw))
    ids = torch.arange(LINES)
    assert STEPS <= PAGE * PAGES <= POSITIONS
    for step in range(STEPS):
        rows = model.rows(step)
        logits = model.logits(ops, ids, rows)
        ops.draw(logits, ids, rows, drawing, outcome, step=torch.tensor([step]))
        found += [outcome.ids.clone(), outcome.logprobs.clone(), logits]
        ids = -1 - torch.arange(LINES)
    return found


def same_everywhere(folder=None, forms=PLAIN):
    for fp8 in (False, True):
        plain = decoded(HostLauncher(folder=folder), fp8=fp8, forms=forms)
        assert len({tuple(ids.tolist()) for ids in plain[::3]}) > 1, "every step draws the same"
        for seed, poison in ((1, 0xFF), (2, 0x3F)):
            overlapping = decoded(HostLauncher(seed, poison, dependent=True, folder=folder), fp8=fp8, forms=forms)
            if not all(map(same_bits, plain, overlapping)):
                return False
    return True


def test_launches_that_overlap_give_the_same_bits():
    assert same_everywhere()


def test_so_do_launches_over_quantised_weights():
    assert same_everywhere(forms=QUANTISED)
    kernels = {FORMS[form][2] for pair in QUANTISED for form in pair}
    assert kernels == {"fp8", "mxfp4", "nvfp4", "int4_32", "int4_128"}


def test_one_that_reads_too_early_is_seen(tmp_path):
    """Of what `embed` reads, only the ids that were drawn are another kernel's."""
    wait, after = "    fwd::grid_dependency_wait();\n", "    int64_t id = ids[blockIdx.x];\n"
    late = "    id = max("
    early = Execution("host", tmp_path).mutated("gemv.cu", wait + after, after).mutated("gemv.cu", late, wait + late)
    assert not same_everywhere(early.folder)

"""Bugs of the kernels over latents that their tests must see, and what the sanitizers say."""

from dataclasses import replace

import pytest
import torch
from agreement import difference, same_bits
from latent_contexts import Context, Layer, Shape, attend, hidden_of, reference, tree, trimmed

from fwd.errors import KernelError
from fwd.kernels.rows import Cells

SMALL = Shape("bf16", 64, 4, 32, 32, 16, 8, 16)
RAGGED = Shape("fp8", 136, 3, 16, 272, 8, 16, 20)
BOUNDS = (1e-6, 2e-5, 1e-4, 1e-6)  # of q, attention, latents and keys
KERNELS = ("latent_down_8", "latent_query_8", "latent_attention_bf16_16", "latent_attention_fp8_16", "latent_value")
QKV, ITEMS, TILES = "latent_qkv.cuh", "items.cuh", "latent_items.cuh"
ATTENTION, VALUE = "latent_attention.cu", "latent_value.cu"
BUGS = {
    "rows of up_key exchanged": (QKV, "keys + (n + pair + 1) * latent", "keys + (n + pair) * latent"),
    "another head's up_key": (QKV, "int64_t{head} * nope * latent", "int64_t{heads - 1 - head} * nope * latent"),
    "the rotated part first": (QKV, "angles.turn(of(row, head) + nope,", "angles.turn(of(row, head),"),
    "the rotated part in the latents' place": (ATTENTION, "q + place + (rotated ? call.latent : 0)", "q + place"),
    "a rotation backwards": (QKV, "fmaf(lower, c, -(upper * s))", "fmaf(lower, c, upper * s)"),
    "no norm of latents": (QKV, "        normalize(x);\n", ""),
    "a scale forgotten": (ATTENTION, "scores[i][j] * scale", "scores[i][j]"),
    "a page too far": ("attention.cuh", "int page = position / page_size;", "int page = (position + 1) / page_size;"),
    "a key too many": (ITEMS, "position < tag.stop ? find", "position <= tag.stop ? find"),
    "a sibling": (ITEMS, "parent >= 0 && at > position; --at", "parent >= 0 && at > position + 1; --at"),
    "another head's up_value": (VALUE, "int64_t{head()} * value", "int64_t{heads - 1 - head()} * value"),
    "shares of the first piece": (VALUE, "float part = shares[i];", "float part = shares[0];"),
    "no wait for the tile": (ATTENTION, "cp_async_wait<0>();", "cp_async_wait<1>();"),
    "no barrier before weights are used": (ATTENTION, "call.scale);\n        block_barrier();", "call.scale);"),
    "no barrier before shares are used": (VALUE, "kPieces);\n        block_barrier();", "kPieces);"),
}
"""A text of a file, and what stands there instead."""


def is_right(execution, shape):
    """Whether decode rows and a tree come out as they should, in every order."""
    layer, context = Layer(shape), Context(shape, (1, 64, 300))
    for case, all_rows in ((context, context.last_rows()), tree(shape, 60)):
        rows = of_eight(all_rows)
        hidden = hidden_of(shape, len(rows.positions))
        try:
            found = execution.everywhere(
                lambda launcher, hidden=hidden, rows=rows, kv=case.kv: attend(launcher, layer, hidden, rows, kv)
            )
        except (AssertionError, KernelError):
            return False
        wanted = reference(layer, hidden, rows, case.kv)
        if not all(difference(*pair) < bound for *pair, bound in zip(found, wanted, BOUNDS, strict=True)):
            return False
    return True


def of_eight(rows):
    """The first eight rows: what the smallest kernels take."""
    cells = tuple(Cells(each.slots[:8], each.tables) for each in rows.cells)
    positions, sequences, parents = (x[:8] for x in (rows.positions, rows.sequences, rows.parents))
    return replace(rows, positions=positions, sequences=sequences, parents=parents, cells=cells)


def test_what_finds_bugs_passes_the_right_kernels(execution):
    left = trimmed(execution, KERNELS) if execution.name == "host" else execution
    assert is_right(left, SMALL)
    assert is_right(left, RAGGED)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(execution, bug):
    assert not is_right(trimmed(execution, KERNELS).mutated(*BUGS[bug]), SMALL)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        (TILES, "scales[key * 4 + chunk / 8]", "scales[(key ^ 1) * 4 + chunk / 8]"),
        (TILES, "scales[key * 4 + chunk / 8]", "scales[key * 4]"),
        (QKV, "+ block] = scale;", "+ block] = 1.0f;"),
    ],
    ids=["another cell's scale", "the first block's scale", "a scale that is not written"],
)
def test_a_wrong_scale_is_seen(execution, file, old, new):
    assert not is_right(trimmed(execution, KERNELS).mutated(file, old, new), RAGGED)


@pytest.mark.parametrize(
    ("file", "later"),
    [(ATTENTION, "    for (int stage = 0"), (VALUE, "        block_barrier();")],
    ids=["cells before the wait", "pieces before the wait"],
)
def test_one_that_reads_too_early_is_seen(execution, file, later):
    wait = "grid_dependency_wait();\n"
    early = trimmed(execution, KERNELS).mutated(file, wait, "\n").mutated(file, later, wait + later)
    assert not is_right(early, SMALL)


def test_pieces_summed_in_another_order_are_seen(execution):
    """Latents that cancel but for their rounding: another order gives other bits."""
    shape = replace(SMALL, heads=2)
    layer, context = Layer(shape), Context(shape, (640 + 9,))
    cells = context.cell(0, torch.arange(640))
    context.kv.latents[cells] *= 1e6
    context.kv.latents[cells[320:]] = -context.kv.latents[cells[:320]]
    rows, hidden = context.last_rows(), torch.zeros(1, shape.hidden).bfloat16()  # all cells weigh the same

    def out(where):
        return attend(where.launcher, layer, hidden, rows, context.kv)[1]

    left = trimmed(execution, KERNELS)
    old = "for (int i = 0; i < count; ++i) {"
    wrong = left.mutated(VALUE, old, "for (int i = count - 1; i >= 0; --i) {")
    assert same_bits(out(left), out(left))
    assert not same_bits(out(left), out(wrong))


def test_sanitizers_find_nothing(sanitized, tmp_path):
    done = sanitized(f"""
        import shutil
        from pathlib import Path
        from fwd.kernels import sources
        from fwd.kernels.host import HostLauncher
        from latent_contexts import Context, Layer, Shape, attend, hidden_of, keep_only
        from latent_contexts import tree
        from test_latent_bugs import KERNELS, of_eight
        folder = Path({str(tmp_path / "cuda")!r})
        shutil.copytree(sources.home(), folder, ignore=shutil.ignore_patterns("host"))
        for path in folder.glob("latent_*.cu"):
            keep_only(path, KERNELS)
        shape = Shape("fp8", 72, 3, 16, 48, 24, 8, 24)
        context = Context(shape, (1, 65, 150))
        for case, rows in ((context, context.last_rows()), tree(shape, 60)):
            launcher, rows = HostLauncher(sanitize=True, folder=folder), of_eight(rows)
            attend(launcher, Layer(shape), hidden_of(shape, len(rows.positions)), rows, case.kv)
        print("done")
    """)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("done\n")

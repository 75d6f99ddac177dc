"""Bugs of decode attention over pages that its tests must see, and what the sanitizers say."""

from dataclasses import replace

import pytest
import torch
from agreement import difference
from contexts import Context, Shape, queries, reference, trimmed
from paged_contexts import BOUND, attend, last_rows, tree, window_only

from fwd.errors import KernelError

SOURCE, ITEMS, SHARED = "paged_attention.cu", "items.cuh", "attention.cuh"
BUGS = {
    "a page too far": (SHARED, "int page = position / page_size;", "int page = (position + 1) / page_size;"),
    "a window too wide": (SHARED, "? position + 1 - window : 0", "? position - window : 0"),
    "a key too many": (ITEMS, "position < tag.stop ? find", "position <= tag.stop ? find"),
    "a sibling": (ITEMS, "parent >= 0 && at > position; --at", "parent >= 0 && at > position + 1; --at"),
    "no wait for the tile": (SOURCE, "cp_async_wait<S::kSlots - 2>();", "cp_async_wait<S::kSlots - 1>();"),
    "no barrier before the warps are summed": (SOURCE, "block_barrier();\n    merge", "merge"),
    "no barrier before shares are used": (SOURCE, "shares);\n    block_barrier();", "shares);"),
}


def is_right(execution, shape):
    """Whether decode rows and a tree come out as they should, in every order."""
    lengths = (1, 64, 500, 1100)
    context = window_only(Context(shape, lengths))
    cases = [(context, last_rows(context)), tree(shape, 60)]
    for each, rows in cases:
        q = queries(shape, len(rows.positions))
        try:
            found = execution.everywhere(
                lambda launcher, q=q, rows=rows, kv=each.kv: attend(launcher, shape, q, rows, kv)
            )
        except (AssertionError, KernelError):
            return False
        if not difference(found, reference(q, rows, each.kv, None)) < BOUND:
            return False
    return True


SMALL = Shape("bf16", 64, 2, 2, 4, window=998)


def test_what_finds_bugs_passes_the_right_kernel(execution):
    assert is_right(execution, SMALL)
    assert is_right(execution, replace(SMALL, kv="fp8"))


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(execution, bug):
    wrong = trimmed(execution, SOURCE, "decode_attention_bf16_64").mutated(*BUGS[bug])
    assert not is_right(wrong, SMALL)


def test_pieces_summed_from_the_last_that_came_are_seen(execution):
    """Values that cancel but for their rounding: another order gives other bits."""
    context = Context(replace(SMALL, window=0), (1024 + 9,))
    cells = context.cell(0, torch.arange(1024))
    context.kv.values[cells] *= 1000
    context.kv.values[cells[512:]] = -context.kv.values[cells[:512]]
    q, rows = torch.zeros(1, 4, 64).bfloat16(), last_rows(context)

    def same_everywhere(where):
        try:
            where.everywhere(lambda launcher: attend(launcher, SMALL, q, rows, context.kv), count=6)
        except AssertionError:
            return False
        return True

    old = "uint4 sum = load_global(sums + i * kDim);\n            float part = shares[index * tag.pieces + i];"
    new = old.replace("uint4", "int n = (i + tag.piece) % tag.pieces; uint4").replace("+ i", "+ n")
    assert same_everywhere(execution)
    assert not same_everywhere(trimmed(execution, SOURCE, "decode_attention_bf16_64").mutated(SOURCE, old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("float scale = sizeof(T) == 1 ? scales[key]", "float scale = sizeof(T) == 1 ? scales[key ^ 1]"),
        ("slot + S::kValues, threadIdx.x % 32, scales + KEYS", "slot + S::kValues, threadIdx.x % 32, scales"),
    ],
    ids=["another key's scale", "the key's scale for the value"],
)
def test_a_wrong_scale_is_seen(execution, old, new):
    wrong = trimmed(execution, SOURCE, "decode_attention_fp8_64").mutated(SOURCE, old, new)
    assert not is_right(wrong, replace(SMALL, kv="fp8"))


def test_sanitizers_find_nothing(sanitized, tmp_path):
    done = sanitized(f"""
        from contexts import Context, Shape, queries, trimmed_folder
        from fwd.kernels.host import HostLauncher
        from paged_contexts import attend, last_rows, tree
        folder = trimmed_folder({str(tmp_path / "cuda")!r}, "paged_attention.cu", "decode_attention_fp8_64")
        shape = Shape("fp8", 64, 2, 3, 4, window=100)
        context = Context(shape, (1, 65, 150))
        for case, rows in ((context, last_rows(context)), tree(shape, 60)):
            launcher = HostLauncher(sanitize=True, folder=folder)
            attend(launcher, shape, queries(shape, len(rows.positions)), rows, case.kv)
        print("done")
    """)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("done\n")

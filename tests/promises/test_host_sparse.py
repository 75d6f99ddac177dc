"""`--device host` on shrunken models with experts and with latents, against the reference, and through the daemon."""

import checkpoints
import numpy as np
import pytest
import torch
from forced import Forced, differences
from harness import ended, kill, record, run, serving, submissions, tokens_more
from msgspec.structs import replace
from quantised import quantise, quantise_gpt_oss

from fwd.kernels.prefill import Prefill
from fwd.kernels.rows import Cells, Rows
from fwd.models.layout import groups
from fwd.models.load import load

POSITIONS = 64
CLOSE = 4  # positions at most where a router's call is so close that the kernels choose another expert
# kind, format, KV, bound of what logits differ by
MODELS = [
    ("gpt-oss-64", "mxfp4", "bfloat16", 1e-3),
    ("gpt-oss-64", "mxfp4", "fp8", 3e-3),
    ("qwen3-moe-64", "", "bfloat16", 1e-3),
    ("qwen3-moe-64", "nvfp4-compressed", "fp8", 3e-3),
    ("glm4-moe-lite", "", "bfloat16", 1e-3),
    ("glm4-moe-lite", "fp8-channel", "fp8", 3e-3),
    ("deepseek", "fp8-deepseek", "bfloat16", 3e-3),  # in blocks that no kernel takes: rounded to bfloat16
]


def write(kind, form, folder):
    """A random checkpoint in a format."""
    source = folder if not form else folder.with_name("source")
    checkpoints.make(kind, source)
    if form == "mxfp4":
        quantise_gpt_oss(source, folder, folder.with_name("plain"))
    elif form:
        quantise(source, form, folder, folder.with_name("plain"))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: "-".join(model[:3]))
def test_teacher_forced_the_logits_are_the_reference_s(model, tmp_path):
    kind, form, kv, bound = model
    write(kind, form, folder := tmp_path / "model")
    ids = np.random.default_rng(1).integers(checkpoints.VOCAB, size=POSITIONS).tolist()
    ours, theirs = (Forced(folder, device, kv).logits(ids) for device in ("host", "cpu"))

    assert np.sort(differences(ours, theirs))[-1 - CLOSE] < bound
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean() > 0.9


def requests():
    return submissions(seed=6, count=3, vocab=checkpoints.VOCAB, tokens=12, longest=70)


async def served(folder, *, kills):
    """Each alone, then all at once, the engine killed while they run."""
    async with serving(folder, device="host", dtype="bfloat16") as service:
        alone = []
        for request in requests():
            stream = service.open(replace(request, cache=False))
            await ended(stream)
            alone.append(record(stream))
        streams = [service.open(request) for request in requests()]
        for _ in range(kills):
            await tokens_more(streams, 8)
            kill(service)
        await ended(*streams)
        return alone, [record(stream) for stream in streams]


@pytest.mark.parametrize(("kind", "form"), [("gpt-oss-64", "mxfp4"), ("glm4-moe-lite", "")])
def test_same_seed_same_bytes_alone_and_beside_others_that_see_a_kill(kind, form, tmp_path):
    write(kind, form, folder := tmp_path / "model")
    alone, together = run(served(folder, kills=1))

    assert together == alone


def chunk_hidden(model, ids):
    """What the 128 rows of a chunk are after the last layer, the first and the last of them padding."""
    rows, pages = 128, torch.randperm(16, generator=torch.Generator().manual_seed(2)).int()
    positions = torch.arange(rows)
    live = (positions >= 5) & (positions < len(ids))
    slots = torch.where(live, pages[positions // 16].long() * 16 + positions % 16, -1)
    kinds = len(groups(model.spec.cache))
    cells = (Cells(slots, pages[None]),) * kinds
    step = Rows(positions, torch.where(live, 0, -1), torch.full_like(positions, -1), cells, chunk=0)
    cache = model.new_cache([16] * kinds, 16, "bfloat16")
    for kv in cache.layers:  # cells of a prefix that is cached
        for tensor in (getattr(kv, name, None) for name in ("keys", "values", "latents")):
            if tensor is not None:
                tensor.zero_()
    padded = torch.nn.functional.pad(torch.tensor(ids), (0, rows - len(ids)))
    return model.forward(padded, step, cache)[live].double().numpy()


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("gpt-oss-64", "mxfp4"),
        ("qwen3-moe-64", "nvfp4-compressed"),
        ("glm4-moe-lite", "fp8-channel"),
        ("llama-64", "awq"),
        ("deepseek", ""),
    ],
)
def test_a_chunk_of_a_gpu_is_the_reference_s(kind, form, tmp_path):
    """Its products are the library's, whatever the device; here too all else is kernels, executed by the CPU."""
    write(kind, form, folder := tmp_path / "model")
    ids = np.random.default_rng(3).integers(checkpoints.VOCAB, size=107).tolist()
    ours, theirs = (load(folder, device=device, dtype="bfloat16") for device in ("host", "cpu"))
    ours.ops._chunks = Prefill(ours.ops.launcher)
    found = differences(chunk_hidden(ours, ids), chunk_hidden(theirs, ids))

    assert np.median(found) < 1e-3
    assert np.quantile(found, 0.9) < 3e-3  # other experts were close where it is more

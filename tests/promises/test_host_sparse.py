"""`--device host` on shrunken models with experts and with latents, against the reference, and through the daemon."""

import checkpoints
import numpy as np
import pytest
from forced import Forced, differences
from harness import ended, kill, record, run, serving, submissions, tokens_more
from msgspec.structs import replace
from quantised import quantise, quantise_gpt_oss

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

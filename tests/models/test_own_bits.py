"""Every family against itself: the same bits whatever a step holds, nearly the same numbers in narrower dtypes."""

import checkpoints
import parity
import pytest
import torch
from kinds import DENSE, GPT_OSS, MOE
from parity import PROMPT, TOTAL, logits_of, tokens

from fwd.kernels import attention
from fwd.models.layout import KV_ITEMSIZE
from fwd.models.load import load

SLIDING = ("qwen2-sliding", "qwen3-sliding", "long")  # full layers, too
LATENT = ("deepseek-odd", "deepseek-yarn")
STEPS = ("llama", "qwen2", "qwen3", *SLIDING, *GPT_OSS, *MOE, *LATENT, "glm4-moe-lite")
WARM = ("llama", *SLIDING, "gpt-oss-odd", "qwen3-moe-odd", *LATENT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", STEPS)
def test_steps_of_any_width_give_the_same_bits(kind, dtype, tmp_path):
    checkpoints.make(kind, tmp_path, seed=4)
    parity.check_steps_of_any_width(load(tmp_path, dtype=dtype))


@pytest.mark.parametrize("kv", KV_ITEMSIZE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", WARM)
def test_a_prefill_that_begins_behind_a_cached_prefix_gives_the_same_bits(kind, dtype, kv, tmp_path):
    checkpoints.make(kind, tmp_path, seed=8)
    parity.check_warm_prefill(load(tmp_path, dtype=dtype), kv)


@pytest.mark.parametrize("kind", [*DENSE, *LATENT])
def test_pieces_of_a_context_agree_with_the_whole(kind, pair, monkeypatch):
    model, ids = load(pair(kind)[0], dtype="float32"), tokens(TOTAL, seed=7)
    whole = logits_of(model, ids, PROMPT, 16).log_softmax(-1)
    monkeypatch.setattr(attention, "PIECE", 16)
    torch.testing.assert_close(logits_of(model, ids, PROMPT, 16).log_softmax(-1), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "kv", "bound"), [("bfloat16", "bfloat16", 1e-3), ("float32", "bfloat16", 1e-4), ("bfloat16", "fp8", 1e-2)]
)
@pytest.mark.parametrize("kind", DENSE)
def test_narrow_dtypes_stay_near_float32(kind, dtype, kv, bound, pair):
    parity.check_near_float32(pair(kind)[0], dtype, kv, bound)


@pytest.mark.parametrize(("dtype", "kv", "bound"), [("bfloat16", "bfloat16", 3e-3), ("bfloat16", "fp8", 2e-2)])
@pytest.mark.parametrize("kind", [*GPT_OSS, *MOE])
def test_half_of_the_rows_of_experts_do(kind, dtype, kv, bound, pair):
    parity.check_mostly_near_float32(pair(kind)[0], dtype, kv, bound, share=0.5)


@pytest.mark.parametrize(
    ("dtype", "kv", "bound"), [("bfloat16", "bfloat16", 1e-3), ("float32", "bfloat16", 1e-4), ("float32", "fp8", 1e-2)]
)
@pytest.mark.parametrize("kind", [*LATENT, "deepseek-mscale"])
def test_three_quarters_of_those_over_latents_do(kind, dtype, kv, bound, pair):
    parity.check_mostly_near_float32(pair(kind)[0], dtype, kv, bound, share=0.75)

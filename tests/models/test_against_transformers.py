"""Every family against `transformers` on random checkpoints: prefill on the chunk grid, then decode steps."""

import parity
import pytest
from kinds import DENSE, GPT_OSS, KINDS, MOE

from fwd.models.load import load


@pytest.mark.parametrize("kind", KINDS)
def test_float32_logprobs_agree_with_transformers(kind, pair):
    parity.check_logprobs(*pair(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(kind, pair):
    parity.check_greedy(*pair(kind))


@pytest.mark.parametrize("kind", [*GPT_OSS, *MOE])
def test_parameters_are_those_of_the_checkpoint(kind, pair):
    folder, reference = pair(kind)
    assert load(folder).spec.parameters() == sum(parameter.numel() for parameter in reference.parameters())


@pytest.mark.parametrize("kind", DENSE)
def test_weight_bytes_are_those_of_the_checkpoint(kind, pair):
    folder, reference = pair(kind)
    spec = load(folder, dtype="bfloat16").spec
    assert spec.weight_bytes() == 2 * sum(parameter.numel() for parameter in reference.parameters())
    assert spec.step_bytes(1, 0, "fp8") - spec.step_bytes(0, 0, "fp8") == 2 * spec.hidden
    keys = sum(min(100, window or 100) for window in spec.windows)
    for kv, head in (("float32", 4 * spec.head_dim), ("bfloat16", 2 * spec.head_dim), ("fp8", spec.head_dim + 4)):
        assert spec.kv_bytes(100, kv) == keys * 2 * spec.kv_heads * head
        assert spec.step_bytes(2, 100, kv) - spec.step_bytes(2, 0, kv) == 2 * spec.kv_bytes(100, kv)

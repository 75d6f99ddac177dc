"""DeepSeek-V3, GLM-4.7-Flash and Kimi K2.5 against `transformers`, and against themselves."""

import checkpoints
import parity
import pytest

KINDS = sorted(checkpoints.DEEPSEEK)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    return parity.pair(request.param, tmp_path_factory.mktemp(request.param))


def test_float32_logprobs_agree_with_transformers(pair):
    parity.check_logprobs(*pair)


def test_greedy_tokens_are_those_of_transformers(pair):
    parity.check_greedy(*pair)

"""Qwen3-MoE against `transformers` on random checkpoints, and its own bits."""

import checkpoints
import parity
import pytest

from fwd.models.blocks import MLP
from fwd.models.load import load


@pytest.fixture(scope="module", params=sorted(checkpoints.MOE))
def folder(request, tmp_path_factory):
    return parity.pair(request.param, tmp_path_factory.mktemp(request.param))


def test_float32_logprobs_agree_with_transformers(folder):
    parity.check_logprobs(*folder)


def test_greedy_tokens_are_those_of_transformers(folder):
    parity.check_greedy(*folder)

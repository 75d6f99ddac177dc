"""What the tests of models share: random checkpoints beside the models of `transformers` that they hold."""

import random
from functools import cache

import parity
import pytest


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Return what makes the pair of a kind (`parity.pair`), once: nobody may change it."""
    return cache(lambda kind: parity.pair(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture
def random_bytes():
    return random.Random(20261126)


@pytest.fixture
def path(tmp_path):
    """Where the only file of a folder stands."""
    return tmp_path / "model.safetensors"

"""What the tests of models share: random checkpoints beside the models of `transformers` that they hold."""

from functools import cache

import parity
import pytest


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Return what makes the pair of a kind (`parity.pair`), once: nobody may change it."""
    return cache(lambda kind: parity.pair(kind, tmp_path_factory.mktemp(kind)))

"""What tests of engines in this process share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """As an engine has for a model as small as those of tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

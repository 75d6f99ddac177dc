"""The folder with the byte tokenizer."""

import pytest
from apiserver import write_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes")
    write_folder(path)
    return path

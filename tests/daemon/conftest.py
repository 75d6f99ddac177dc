"""The folder with the byte tokenizer."""

import apiserver
import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes")
    apiserver.write_folder(path)
    return path

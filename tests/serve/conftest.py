"""The adapters of the tiny Llama."""

from __future__ import annotations

import pytest

from tests.support import served_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the adapters a0 … a4, for the tests of one file, which may change it."""
    path = tmp_path_factory.mktemp("adapters")
    served_llama.write_adapters(path)
    return path

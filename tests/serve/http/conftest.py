"""The tiny Llama and its adapters as files."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", "5.24", reason="the engine is for transformers 5.24")

from tests.support import http_server, served_llama


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """A folder with the adapters a0 … a4."""
    folder = tmp_path_factory.mktemp("adapters")
    served_llama.write_adapters(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    http_server.write_model(folder)
    return folder

"""peftk._cuda is the module that tests/support/host_cuda.py compiled for the host; these files run only in its
process."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest

import peftk
from tests.support.executor import Executor

collect_ignore_glob = [] if "PEFTK_CUDA_ON_HOST" in os.environ else ["*.py"]

if "PEFTK_CUDA_ON_HOST" in os.environ:
    assert "peftk._cuda" not in sys.modules, "peftk._cuda was imported too early"
    spec = importlib.util.spec_from_file_location("peftk._cuda", os.environ["PEFTK_CUDA_ON_HOST"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["peftk._cuda"] = peftk._cuda = module


@pytest.fixture
def executor() -> Iterator[Executor]:
    """The executor, with seed 0, no limit and all counters zero."""
    executor = Executor(ctypes.CDLL(os.environ["PEFTK_CUDA_ON_HOST"]))
    executor.seed(0)
    executor.limit_resident(0)
    executor.reset()
    yield executor
    executor.limit_resident(0)

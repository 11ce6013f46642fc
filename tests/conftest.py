"""Fixtures for all tests."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest

# torch takes seconds to import. pytest-xdist's controller, which runs no test, does without: it is imported where it is
# used. With a process per core, more threads would only take each other's time. kernels/cpu has two nonetheless.
if "PYTEST_XDIST_WORKER" in os.environ:
    import torch

    torch.set_num_threads(1)

# Imports make almost nothing but what stays, and each search for garbage would go through all of it again.
gc.disable()


# A shell lets what it starts in the background ignore Ctrl-C, and tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """From here on garbage is collected as always, though not looked for in what was imported."""
    gc.freeze()
    gc.enable()


# What starts long processes of its own. In turn at the end, they would leave the other workers without work.
FIRST = ("test_interpreter.py", "test_on_host.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture(scope="session", autouse=True)
def _no_measured_choice(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Uses the shipped choice of backend, whatever was measured on this machine, and measures nothing."""
    os.environ["PEFTK_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["PEFTK_FIRST_USE"] = "0"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises the fixture `level`, unless a test has an argument of its own by that name."""
    marks = metafunc.definition.iter_markers("parametrize")
    if "level" in metafunc.fixturenames and not any("level" in mark.args[0] for mark in marks):
        from peftk import _cpu

        metafunc.parametrize("level", _cpu.simd_levels(), indirect=True)


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test at every SIMD level that this build and machine support."""
    from peftk import _cpu

    before = _cpu.simd_level()
    _cpu.use_simd_level(request.param)
    yield request.param
    _cpu.use_simd_level(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads after a test that changes it."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: None) -> None:
    """A single thread, for models so small that several would only wait for each other."""
    import torch

    torch.set_num_threads(1)

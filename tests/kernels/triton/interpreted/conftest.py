"""Fixtures for all tests of the kernels in the interpreter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True, scope="session")
def _patch_language_once_per_launch() -> Iterator[None]:
    """Patches Triton's language once per launch. Triton does so for each function that a kernel calls, 6 ms each."""
    patch_lang = interpreter._patch_lang

    @functools.cache
    def languages(function: Callable[..., Any]) -> list[Any]:
        return [value for value in function.__globals__.values() if value is tl or value is tl.core]

    def patch(function: Callable[..., Any]) -> Any:
        if any(tl.core.is_builtin(language.load) for language in languages(function)):  # none that is patched is one
            return patch_lang(function)
        return interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch)
        yield


@pytest.fixture(autouse=True)
def _fill_uninitialized_memory() -> Iterator[None]:
    """Makes torch fill new memory with NaN and the largest integer, so that reading unwritten memory shows."""
    torch.set_deterministic_debug_mode("warn")  # like use_deterministic_algorithms, which would import torch's compiler
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(4).isnan().all()
    yield
    torch.set_deterministic_debug_mode("default")

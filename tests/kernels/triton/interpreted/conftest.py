"""Fixtures for all tests of the kernels in the interpreter."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from peftk.triton_kernels import tuned


@pytest.fixture(autouse=True)
def _no_plans_of_another_test() -> None:
    tuned.derived.clear()


@pytest.fixture(autouse=True, scope="session")
def _skip_repeated_work() -> Iterator[None]:
    """Skips what the interpreter does again and again to no effect: half of its time.

    It patches Triton's language again for each function that a kernel calls, 6 ms each. For every +, - and * it
    computes whether integers overflow, and drops the result unless it debugs. It builds a table of dtypes for each
    value, and the shape of each value from its numbers. It takes the exclusive or of one element after the other, which
    a sort does very often, and takes bfloat16 and float32 apart, where one is the upper half of the other.
    """
    patch_lang = interpreter._patch_lang
    builder = interpreter.interpreter_builder

    @functools.cache
    def languages(function: Callable[..., Any]) -> list[Any]:
        return [value for value in function.__globals__.values() if value is tl or value is tl.core]

    def patch(function: Callable[..., Any]) -> Any:
        if any(tl.core.is_builtin(language.load) for language in languages(function)):  # none that is patched is one
            return patch_lang(function)
        return interpreter._LangPatchScope()

    of_scalars = functools.cache(interpreter._get_np_dtype)

    def numpy_dtype(dtype: tl.dtype) -> np.dtype[Any]:
        scalar = dtype.scalar
        return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else of_scalars(scalar)

    init_block_type, block_types = tl.block_type.__init__, {}

    def init_known_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        key = (str(element_ty), *(getattr(size, "value", size) for size in shape))
        if key not in block_types:
            init_block_type(self, element_ty, shape)
            block_types[key] = vars(self).copy()
        vars(self).update(block_types[key])

    @functools.cache
    def shape_of(*sizes: int) -> tuple[tl.tuple, tl.constexpr]:
        return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))

    def init_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_of(*(type.shape if type.is_block() else ()))

    reduce = interpreter.ReduceOps.generic_reduce

    def generic_reduce(self: interpreter.ReduceOps, input: tuple[tl.tensor, ...]) -> Any:
        if self.combine_fn != tl.standard._xor_combine or self.axis is None:
            return reduce(self, input)
        [of] = input
        return self.to_tensor(np.bitwise_xor.reduce(of.handle.data, axis=self.axis, keepdims=self.keep_dims), of.dtype)

    convert_float = interpreter._convert_float

    def convert(input: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> np.ndarray:
        pair = (source.name, target.name)
        if rounding is not None or pair not in (("bf16", "fp32"), ("fp32", "bf16")):
            return convert_float(input, source, target, rounding)
        given = np.frombuffer(input.tobytes(), np.uint16 if pair[0] == "bf16" else np.uint32)
        bits = given.astype(np.uint32) << 16 if pair[0] == "bf16" else given
        magnitudes = bits & 0x7FFFFFFF
        if np.any((magnitudes < 0x800000) & (magnitudes > 0)):  # denormal numbers
            return convert_float(input, source, target, rounding)
        return (bits if pair[0] == "bf16" else (bits >> 16).astype(np.uint16)).reshape(input.shape)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", generic_reduce)
        monkeypatch.setattr(interpreter, "_convert_float", convert)
        monkeypatch.setattr(tl.block_type, "__init__", init_known_block_type)
        monkeypatch.setattr(tl.tensor, "__init__", init_tensor)
        monkeypatch.setattr(interpreter, "_patch_lang", patch)
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        monkeypatch.setattr(interpreter, "_get_np_dtype", numpy_dtype)
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

"""Every check of arguments, in one place. Each error names the argument, what was expected and what came.

Checks look at shapes, dtypes and devices only, never at values on a GPU: looking would synchronise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftk.adapters import activations
from peftk.adapters.adapter import Adapter, both_factors
from peftk.adapters.table import AdapterTable
from peftk.system import memory, storage

_FLOAT32_MAX = torch.finfo(torch.float32).max
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    of_floats(name, tensor.dtype)
    stored(name, tensor)


def of_floats(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"{name}: expected dtype float32, bfloat16, float16 or float64, got {dtype}")


def stored(name: str, tensor: Tensor) -> None:
    """A dense tensor, or one that torch computes with as with a dense one (`peftk.system.storage`)."""
    if torch.compiler.is_compiling() or storage.dense(tensor):
        return
    if not storage.by_torch(tensor):
        raise TypeError(f"{name}: expected a dense tensor, got {storage.reason(tensor)}")


def dense(name: str, tensor: Tensor) -> None:
    """A tensor whose elements lie in memory as its shape and strides say: the only ones with an address to read."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not storage.dense(tensor):
        raise TypeError(f"{name}: expected a dense tensor, got {storage.reason(tensor)}")


def for_torch(**tensors: Tensor) -> None:
    """What a layer of plain torch operations is given: tensors of floats that torch can read, with tangents kept."""
    if torch.compiler.is_compiling():  # torch says what it can't record
        return
    plain, first = storage.dense(*tensors.values()), next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if not plain:
            floating(name, tensor)
            same_device(name, tensor, first.device, "the input")
        of_floats(name, tensor.dtype)
    keeps_tangents(*tensors.values())


def for_kernels(**tensors: Tensor | None) -> None:
    """What a recorded operation is given when it runs at last, where nobody can ask torch to compute it instead."""
    if not storage.dense(*tensors.values()):
        for name, tensor in tensors.items():
            if tensor is not None:
                dense(name, tensor)
    if storage.has_tangent(*tensors.values()):
        raise RuntimeError("x: expected tensors without tangents, which a compiled call drops; run it without compile")


def keeps_tangents(*tensors: Tensor | None) -> None:
    """Raises RuntimeError where forward-mode AD would lose a tangent without a word."""
    if torch.is_inference_mode_enabled() and storage.has_tangent(*tensors):
        raise RuntimeError(
            "x: expected tensors without tangents in inference mode, which drops them; forward-mode AD works in no_grad"
        )


def mixes(name: str, dtype: torch.dtype, other: str, other_dtype: torch.dtype) -> None:
    """fp32, bf16 and fp16 mix with one another; fp64 with nothing."""
    if (dtype == torch.float64) != (other_dtype == torch.float64):
        raise TypeError(f"{name}: expected a dtype that mixes with {other}'s {other_dtype}, got {dtype}")


def adapter_dtype(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> None:
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
        raise TypeError(f"adapter_dtype: expected torch.float32, bfloat16, float16 or float64, got {dtype!r}")
    if weight_dtype is not None:
        mixes("adapter_dtype", dtype, "weight", weight_dtype)


def shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: expected shape {meaning} = {list(expected)}, got {list(tensor.shape)}")


def same_device(name: str, tensor: Any, device: torch.device, like: str = "weight") -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: expected on {device} like {like}, got {tensor.device}")


def base(weight: Tensor, bias: Tensor | None) -> None:
    """weight [N, K], bias [N]: frozen weight, one device."""
    floating("weight", weight)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected shape [N, K] with N, K ≥ 1, got {list(weight.shape)}")
    if weight.requires_grad:
        raise ValueError("weight: expected a frozen weight (requires_grad=False), got one that requires a gradient")
    if bias is not None:
        floating("bias", bias)
        shape("bias", bias, (weight.shape[0],), "[N]")
        same_device("bias", bias, weight.device)
        mixes("bias", bias.dtype, "weight", weight.dtype)


def input(x: Tensor, weight: Tensor) -> None:
    """x [..., K] beside a frozen weight [N, K]."""
    floating("x", x)
    floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [N, K], got {list(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected shape [..., K] with K = {weight.shape[1]}, got {list(x.shape)}")
    _beside(x, "weight", weight.device, weight.dtype)
    if weight.requires_grad:
        raise ValueError("weight: expected a frozen weight (requires_grad=False), got one that requires a gradient")


def width(x: Tensor) -> int:
    """K of x [..., K], which the adapter of a series has on both sides."""
    floating("x", x)
    if x.dim() == 0:
        raise ValueError(f"x: expected shape [..., K], got {list(x.shape)}")
    return x.shape[-1]


def block(
    x: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    activation: str,
    bias_A: Tensor | None,
    bias_B: Tensor | None,
) -> None:
    """x [..., K] and a series adapter: `adapter_shapes` for [K, K], all on one device, of one dtype beside x's."""
    K, named = width(x), _named(lora_A, lora_B, bias_A, bias_B)
    if not named:
        raise ValueError("lora_A: expected an adapter's tensors, got none of lora_A, lora_B, bias_B")
    adapter_shapes(K, K, lora_A, lora_B, scaling, activation, bias_A, bias_B)
    first = named[0][1]
    _of_one_kind(named, first.device, "the adapter's other tensors")
    _beside(x, "the adapter", first.device, first.dtype)


def block_input(x: Tensor, lora_A: Tensor) -> None:
    """x [..., K] before a series adapter with A [R, K]."""
    floating("lora_A", lora_A)
    if lora_A.dim() != 2:
        raise ValueError(f"lora_A: expected shape [R, K], got {list(lora_A.shape)}")
    if width(x) != lora_A.shape[1]:
        raise ValueError(f"x: expected shape [..., K] with K = {lora_A.shape[1]}, got {list(x.shape)}")
    _beside(x, "the adapter", lora_A.device, lora_A.dtype)


def block_bank(x: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """x [..., K] beside a bank of series adapters."""
    width(x)
    _beside(x, "bank", device, dtype)


def _beside(x: Tensor, other: str, device: torch.device, dtype: torch.dtype) -> None:
    """x on the device, and of a dtype that mixes."""
    same_device("x", x, device, other)
    mixes("x", x.dtype, other, dtype)


def adapter_shapes(
    N: int,
    K: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    activation: str = "identity",
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
) -> None:
    """One adapter for a weight [N, K]: A [R, K] and B [N, R] together or neither, a [R], β [N]."""
    both_factors(lora_A, lora_B)
    if not isinstance(scaling, (int, float)) or isinstance(scaling, bool):
        raise TypeError(f"scaling: expected a number, got {type(scaling).__name__}")
    if not -_FLOAT32_MAX <= scaling <= _FLOAT32_MAX:
        raise ValueError(f"scaling: expected a finite number (in float32), got {scaling}")
    if not isinstance(activation, str) or activation not in activations.CODES:
        raise ValueError(f"activation: expected one of {', '.join(activations.CODES)}, got {activation!r}")
    for name, tensor in _named(lora_A, lora_B, bias_A, bias_B):
        floating(name, tensor)
    if lora_A is not None and lora_B is not None:
        if lora_A.dim() != 2 or lora_A.shape[0] < 1:
            raise ValueError(f"lora_A: expected shape [R, K] with R ≥ 1, got {list(lora_A.shape)}")
        shape("lora_A", lora_A, (lora_A.shape[0], K), "[R, K]")
        shape("lora_B", lora_B, (N, lora_A.shape[0]), "[N, R]")
        if bias_A is not None:
            shape("bias_A", bias_A, (lora_A.shape[0],), "[R]")
    elif bias_A is not None:
        raise ValueError("bias_A: expected None where there is no lora_A, got a tensor")
    if bias_B is not None:
        shape("bias_B", bias_B, (N,), "[N]")


def adapter(
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    activation: str = "identity",
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
) -> None:
    """`adapter_shapes` for weight [N, K], and: all on weight's device, of one dtype that mixes with weight's."""
    N, K = weight.shape
    adapter_shapes(N, K, lora_A, lora_B, scaling, activation, bias_A, bias_B)
    named = _named(lora_A, lora_B, bias_A, bias_B)
    _of_one_kind(named, weight.device, "weight")
    for name, tensor in named:
        mixes(name, tensor.dtype, "weight", weight.dtype)


def _of_one_kind(named: Sequence[tuple[str, Tensor]], device: torch.device, like: str) -> None:
    """An adapter's tensors: all on the device, of one dtype."""
    for name, tensor in named:
        same_device(name, tensor, device, like)
        dtype = named[0][1].dtype
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} like the adapter's other tensors, got {tensor.dtype}")


def _named(
    lora_A: Tensor | None, lora_B: Tensor | None, bias_A: Tensor | None, bias_B: Tensor | None
) -> list[tuple[str, Tensor]]:
    named = (("lora_A", lora_A), ("lora_B", lora_B), ("bias_A", bias_A), ("bias_B", bias_B))
    return [(name, tensor) for name, tensor in named if tensor is not None]


def fits(name: str, adapter: Adapter, N: int, K: int) -> None:
    """The tensors that a kernel will read by address have the shapes that it expects. Asked at every call."""
    if len(adapter.pages_A) != len(adapter.pages_B):
        raise ValueError(
            f"{name}: expected as many pages of A as of B, got {len(adapter.pages_A)}, {len(adapter.pages_B)}"
        )
    for A, B in zip(adapter.pages_A, adapter.pages_B, strict=True):
        ranks = A.shape[:1]
        if A.shape != (*ranks, K) or B.shape != (N, *ranks) or len(ranks) == 0 or A.dtype != B.dtype:
            raise ValueError(
                f"{name}: expected lora_A [R, {K}] and lora_B [{N}, R] of one dtype, "
                f"got {list(A.shape)} {A.dtype} and {list(B.shape)} {B.dtype}"
            )
    for what, bias, length in (("bias_A", adapter.bias_A, adapter.rank), ("bias_B", adapter.bias_B, N)):
        if bias is not None and bias.shape != (length,):
            raise ValueError(f"{name}: expected {what} of shape [{length}], got {list(bias.shape)}")
    dtypes = {tensor.dtype for tensor in adapter.tensors()}
    if len(dtypes) > 1:
        raise TypeError(f"{name}: expected tensors of one dtype, got {', '.join(sorted(map(str, dtypes)))}")


def writable(name: str, tensor: Tensor) -> None:
    """Every element has a place of its own."""
    reach = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1 and stride < reach:
            raise ValueError(f"{name}: expected elements that do not overlap, got strides {tensor.stride()}")
        reach = stride * (size - 1) + reach if size > 1 else reach


def apart(weights: Sequence[Tensor]) -> None:
    """No two share memory."""
    for one, other in memory.overlapping(weights):
        raise ValueError(f"weights: expected no two in the same memory, got layers {one} and {other} in one")


def dropout(p: float, seed: Tensor | None, device: torch.device) -> None:
    if not isinstance(p, (int, float)) or not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p: expected 0 ≤ p < 1, got {p!r}")
    if seed is not None:
        if not isinstance(seed, Tensor):
            raise TypeError(f"seed: expected an int64 tensor of one element, got {type(seed).__name__}")
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed: expected an int64 tensor of one element, got {seed.dtype} {list(seed.shape)}")
        stored("seed", seed)
        same_device("seed", seed, device)


def ids(ids: Tensor, x: Tensor) -> None:
    """ids int32/int64 of x.shape[:-1] (per token) or x.shape[:1] (per sequence), on x's device."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids: expected a tensor of adapter numbers, got {type(ids).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: expected dtype int32 or int64, got {ids.dtype}")
    stored("ids", ids)
    if ids.shape != x.shape[:-1] and not (x.dim() > 2 and ids.shape == x.shape[:1]):
        per_sequence = f" or {list(x.shape[:1])} (per sequence)" if x.dim() > 2 else ""
        raise ValueError(f"ids: expected shape {list(x.shape[:-1])} (per token){per_sequence}, got {list(ids.shape)}")
    if ids.device != x.device:
        raise ValueError(f"ids: expected on {x.device} like x, got {ids.device}")


def look_at_ids(device: torch.device) -> bool:
    """Whether ids are looked at before use: always on a CPU; on a GPU, where it synchronises, with PEFTK_CHECK=1."""
    return device.type == "cpu" or os.environ.get("PEFTK_CHECK") == "1"


def bank(adapters: Sequence[Adapter | None], columns: Sequence[int], N: int, K: int) -> None:
    """Adapters by number, of every slice of packed outputs, fit W [N, K]. Raises ValueError for one that does not."""
    slices = max(len(columns) - 1, 1)
    if columns and columns[-1] != N:
        raise ValueError(f"bank: expected slices of {N} columns together like weight, got {columns[-1]}")
    for number, adapter in enumerate(adapters):
        if adapter is not None:
            j = number // (len(adapters) // slices)
            fits(f"bank[{number}]", adapter, columns[j + 1] - columns[j] if columns else N, K)


def ids_in_table(ids: Tensor, table: AdapterTable) -> None:
    """Every id is -1 or names a taken slot. Raises ValueError with the first that does not."""
    count = table.count
    _ids_taken(ids, table.rows[:, 3].reshape(table.slices, count).amax(0).bool() if count else table.rows[:, 3].bool())


def ids_in_bank(ids: Tensor, adapters: Sequence[Adapter | None], slices: int) -> None:
    """The same for adapters by number, of every slice of packed outputs. ids without values are not looked at."""
    if storage.dense(ids) and look_at_ids(ids.device):
        count = len(adapters) // slices
        taken = [any(adapter is not None for adapter in adapters[number::count]) for number in range(count)]
        _ids_taken(ids, torch.tensor(taken, dtype=torch.bool, device=ids.device))


def _ids_taken(ids: Tensor, slots: Tensor) -> None:
    count = len(slots)
    taken = torch.cat([slots, torch.ones(1, dtype=torch.bool, device=ids.device)])  # [-1]: base layer
    outside = (ids < -1) | (ids >= count)
    bad = outside | ~taken[torch.where(outside, -1, ids).long()]
    if bad.any():
        row = int(bad.nonzero()[0])
        number = int(ids[row])
        empty = ", an empty slot" if 0 <= number < count else ""
        raise ValueError(f"ids[{row}]: expected -1 or an adapter's number below {count}, got {number}{empty}")

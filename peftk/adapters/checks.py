"""All checks of arguments. Each error names the argument, what was expected and what was passed.

Checks read shapes, dtypes and devices, but no values on a GPU, which would synchronise (see `ids_are_checked`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftk.adapters import activations
from peftk.adapters.adapter import Adapter, check_both_factors
from peftk.adapters.table import AdapterTable
from peftk.system import memory, storage

_FLOAT32_MAX = torch.finfo(torch.float32).max
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an integer of 1 or more, got {value!r}")


def floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    float_dtype(name, tensor.dtype)
    stored(name, tensor)


def float_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"{name}: expected dtype float32, bfloat16, float16 or float64, got {dtype}")


def stored(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the tensor is dense, or torch can still compute with it (`peftk.system.storage`)."""
    if torch.compiler.is_compiling() or storage.dense(tensor):
        return
    if not storage.by_torch(tensor):
        raise TypeError(f"{name}: expected a dense tensor, got {storage.reason(tensor)}")


def dense(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless kernels can read the tensor: its elements are in memory as its shape and strides say."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not storage.dense(tensor):
        raise TypeError(f"{name}: expected a dense tensor, got {storage.reason(tensor)}")


def for_torch(**tensors: Tensor) -> None:
    """Checks the inputs of a layer of plain torch operations: floating point, readable by torch, tangents not lost."""
    if torch.compiler.is_compiling():  # torch raises for what it cannot record
        return
    plain, first = storage.dense(*tensors.values()), next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if not plain:
            floating(name, tensor)
            same_device(name, tensor, first.device, "the input")
        float_dtype(name, tensor.dtype)
    keeps_tangents(*tensors.values())


def for_kernels(**tensors: Tensor | None) -> None:
    """Checks the inputs of a custom op when it runs: it cannot go back to plain torch, so they must be dense."""
    if not storage.dense(*tensors.values()):
        for name, tensor in tensors.items():
            if tensor is not None:
                dense(name, tensor)
    if storage.has_tangent(*tensors.values()):
        raise RuntimeError(
            "x: expected tensors without tangents, as a compiled call drops them, got some; run it without compile"
        )


def keeps_tangents(*tensors: Tensor | None) -> None:
    """Raises RuntimeError if forward-mode AD would silently lose a tangent."""
    if torch.is_inference_mode_enabled() and storage.has_tangent(*tensors):
        raise RuntimeError(
            "x: expected tensors without tangents in inference mode, which drops them, got some; use no_grad instead"
        )


def mixes(name: str, dtype: torch.dtype, other: str, other_dtype: torch.dtype) -> None:
    """Raises TypeError if one dtype is fp64 and the other is not. fp32, bf16 and fp16 can be mixed."""
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
    """Checks a base layer: weight [N, K], frozen; bias [N]; same device, dtypes that mix."""
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
    """Checks x [..., K] against a frozen weight [N, K]."""
    floating("x", x)
    floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [N, K], got {list(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected shape [..., K] with K = {weight.shape[1]}, got {list(x.shape)}")
    _x_matches(x, "weight", weight.device, weight.dtype)
    if weight.requires_grad:
        raise ValueError("weight: expected a frozen weight (requires_grad=False), got one that requires a gradient")


def width(x: Tensor) -> int:
    """K of x [..., K]: the input and output width of a series adapter."""
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
    """Checks x [..., K] and a series adapter: its shapes, one device, one dtype that mixes with x's."""
    K, named = width(x), _named(lora_A, lora_B, bias_A, bias_B)
    if not named:
        raise ValueError("lora_A: expected an adapter's tensors, got none of lora_A, lora_B, bias_B")
    adapter_shapes(K, K, lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias_B)
    first = named[0][1]
    _same_device_and_dtype(named, first.device, "the adapter's other tensors")
    _x_matches(x, "the adapter", first.device, first.dtype)


def block_input(x: Tensor, lora_A: Tensor) -> None:
    """Checks x [..., K] against a series adapter with A [R, K]."""
    floating("lora_A", lora_A)
    if lora_A.dim() != 2:
        raise ValueError(f"lora_A: expected shape [R, K], got {list(lora_A.shape)}")
    if width(x) != lora_A.shape[1]:
        raise ValueError(f"x: expected shape [..., K] with K = {lora_A.shape[1]}, got {list(x.shape)}")
    _x_matches(x, "the adapter", lora_A.device, lora_A.dtype)


def block_bank(x: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Checks x [..., K] against a bank of series adapters."""
    width(x)
    _x_matches(x, "bank", device, dtype)


def _x_matches(x: Tensor, other: str, device: torch.device, dtype: torch.dtype) -> None:
    """Checks that x is on the device and that its dtype mixes."""
    same_device("x", x, device, other)
    mixes("x", x.dtype, other, dtype)


def adapter_shapes(
    N: int,
    K: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    *,
    activation: str = "identity",
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
) -> None:
    """Checks one adapter for a weight [N, K]: A [R, K] and B [N, R], both or neither; a [R]; β [N]; finite scaling."""
    check_both_factors(lora_A, lora_B)
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
    *,
    activation: str = "identity",
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
) -> None:
    """Checks one adapter for weight [N, K]: `adapter_shapes`, weight's device, one dtype that mixes with weight's."""
    N, K = weight.shape
    adapter_shapes(N, K, lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias_B)
    named = _named(lora_A, lora_B, bias_A, bias_B)
    _same_device_and_dtype(named, weight.device, "weight")
    for name, tensor in named:
        mixes(name, tensor.dtype, "weight", weight.dtype)


def _same_device_and_dtype(named: Sequence[tuple[str, Tensor]], device: torch.device, like: str) -> None:
    """Checks that an adapter's tensors are on the device and have one dtype."""
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
    """Checks that an adapter's tensors have the shapes that kernels will read by address. Called in every call."""
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
    if len(adapter.pages_A) == 1 and adapter.bias_A is None and adapter.bias_B is None:
        return
    for what, bias, length in (("bias_A", adapter.bias_A, adapter.rank), ("bias_B", adapter.bias_B, N)):
        if bias is not None and bias.shape != (length,):
            raise ValueError(f"{name}: expected {what} of shape [{length}], got {list(bias.shape)}")
    dtypes = {tensor.dtype for tensor in adapter.tensors()}
    if len(dtypes) > 1:
        raise TypeError(f"{name}: expected tensors of one dtype, got {', '.join(sorted(map(str, dtypes)))}")


def writable(name: str, tensor: Tensor) -> None:
    """Raises ValueError if two elements of the tensor share memory."""
    reach = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1 and stride < reach:
            raise ValueError(f"{name}: expected elements that do not overlap, got strides {tensor.stride()}")
        reach = stride * (size - 1) + reach if size > 1 else reach


def separate_memory(weights: Sequence[Tensor]) -> None:
    """Raises ValueError if two weights share memory."""
    for first, second in memory.overlapping(weights):
        raise ValueError(f"weights: expected separate memory for each, got layers {first} and {second} sharing memory")


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
    """Checks ids: int32 or int64 of shape x.shape[:-1] (per token) or x.shape[:1] (per sequence), on x's device."""
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


def ids_are_checked(device: torch.device) -> bool:
    """Whether the values of ids are checked: always on a CPU; on a GPU, where that synchronises, if PEFTK_CHECK=1."""
    return device.type == "cpu" or os.environ.get("PEFTK_CHECK") == "1"


def bank(adapters: Sequence[Adapter | None], columns: Sequence[int], N: int, K: int) -> None:
    """Raises ValueError if an adapter does not fit W [N, K]. adapters: by slot, per slice; columns: of the slices."""
    slices = max(len(columns) - 1, 1)
    if columns and columns[-1] != N:
        raise ValueError(f"bank: expected slices of {N} columns together like weight, got {columns[-1]}")
    for number, adapter in enumerate(adapters):
        if adapter is not None:
            j = number // (len(adapters) // slices)
            fits(f"bank[{number}]", adapter, columns[j + 1] - columns[j] if columns else N, K)


def ids_in_table(ids: Tensor, table: AdapterTable) -> None:
    """Raises ValueError for the first id that is neither -1 nor a taken slot."""
    count = table.count
    _ids_taken(ids, table.rows[:, 3].reshape(table.slices, count).amax(0).bool() if count else table.rows[:, 3].bool())


def ids_in_bank(ids: Tensor, adapters: Sequence[Adapter | None], slices: int) -> None:
    """The same for adapters by slot, for each slice of packed outputs. ids without values are not checked."""
    if storage.dense(ids) and ids_are_checked(ids.device):
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

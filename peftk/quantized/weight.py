"""`QuantizedWeight`: a weight W [N, K] that is stored packed, and acts as the tensor that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from peftk.quantized.formats import FORMATS, Block, Parts
from peftk.system import storage

_aten: Any = torch.ops.aten


class QuantizedWeight(Tensor):
    """W [N, K] in one of the formats of `peftk.quantized.formats`: packed codes, their scales and zeros.

    A frozen operand: peftk's operations read it packed where a kernel knows the format, and any other torch operation
    reads `dequantize()`, rounded to `dtype`. It cannot be changed in place, except by `copy_` from one of its form.
    `.to(device)` moves the packed tensors; `.to(dtype)` changes what other operations see, and no packed bit.

    format: int8, int8_absmax, int4, nf4, fp4, fp8_e4m3, mxfp4, q8_0 or q4_0. shape: (N, K). block: the rows and columns
    of W that share a scale. dtype: what W was before, for those who ask; kernels do not round to it.

    Raises ValueError or TypeError for tensors that do not fit the format; it names the tensor, what was expected and
    what came.
    """

    format: str
    block: Block
    packed: Tensor
    scales: Tensor | None
    zeros: Tensor | None

    def __new__(
        cls,
        format: str,
        shape: Sequence[int],
        packed: Tensor,
        scales: Tensor | None = None,
        zeros: Tensor | None = None,
        *,
        block: Block,
        dtype: torch.dtype = torch.float32,
    ) -> QuantizedWeight:
        N, K = check(format, shape, packed, scales, zeros, block)
        made: QuantizedWeight = Tensor._make_wrapper_subclass(cls, (N, K), dtype=dtype, device=packed.device)
        made.format, made.block = format, (int(block[0]), int(block[1]))
        made.packed, made.scales, made.zeros = packed, scales, zeros
        return made

    def check_parts(self) -> None:
        """Raises TypeError or ValueError if the parts do not fit any more: replaced since, or their memory freed."""
        check(self.format, self.shape, self.packed, self.scales, self.zeros, self.block)

    def dequantize(self) -> Tensor:
        """W [N, K] in fp32, exactly as the format says. Raises as `check_parts`."""
        if not torch.compiler.is_compiling():
            self.check_parts()
        shape = (self.shape[0], self.shape[1])
        return FORMATS[self.format].values(Parts(shape, self.block, self.packed, self.scales, self.zeros))

    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that hold it."""
        return tuple(part for part in (self.packed, self.scales, self.zeros) if part is not None)

    @property
    def stored_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts())

    def map(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> QuantizedWeight:
        """The same weight with `function` of each of its tensors."""
        packed, scales, zeros = (
            None if part is None else function(part) for part in (self.packed, self.scales, self.zeros)
        )
        assert packed is not None
        return QuantizedWeight(
            self.format, self.shape, packed, scales, zeros, block=self.block, dtype=dtype or self.dtype
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        rest = f"block={self.block}, {self.dtype}, device={self.device}"
        return f"QuantizedWeight({self.format}, {list(self.shape)}, {rest})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = [name for name in ("packed", "scales", "zeros") if getattr(self, name) is not None]
        return names, (self.format, tuple(self.shape), self.block, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> QuantizedWeight:
        format, shape, block, dtype = context
        tensors = (inner["packed"], inner.get("scales"), inner.get("zeros"))
        return QuantizedWeight(format, shape, *tensors, block=block, dtype=dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        tensors = (self.format, tuple(self.shape), self.packed, self.scales, self.zeros)
        return _rebuild, (*tensors, self.block, self.dtype, getattr(self, "_is_param", False))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (_aten.detach.default, _aten.alias.default):
            return args[0].map(lambda part: part)
        if func is _aten.clone.default:
            return args[0].map(torch.clone)
        if func is _aten._to_copy.default:
            device = kwargs.get("device")
            return args[0].map(lambda part: part.to(device, copy=True), kwargs.get("dtype"))
        if func is _aten.copy_.default and isinstance(args[0], QuantizedWeight):
            return _copy(*args[:2])
        if func._schema.is_mutable and any(isinstance(arg, QuantizedWeight) for arg in args[:1]):
            raise TypeError(f"{func}: expected a tensor that can be changed in place, got {args[0]!r}")
        return func(*tree_map(wide, args), **tree_map(wide, kwargs))


def _rebuild(
    format: str,
    shape: tuple[int, int],
    packed: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    block: Block,
    dtype: torch.dtype,
    is_parameter: bool,
) -> Tensor:
    weight = QuantizedWeight(format, shape, packed, scales, zeros, block=block, dtype=dtype)
    return torch.nn.Parameter(weight, requires_grad=False) if is_parameter else weight


def wide(value: Any, dtype: torch.dtype | None = None) -> Any:
    """What plain torch computes with: a quantized weight dequantized, then rounded to `dtype`, its own by default.

    Other tensors are converted to `dtype` if one is given, and other values are returned as they are.
    """
    if isinstance(value, QuantizedWeight):
        return value.dequantize().to(dtype or value.dtype)
    return value if dtype is None else value.to(dtype)


def _copy(to: QuantizedWeight, source: Tensor) -> QuantizedWeight:
    same = isinstance(source, QuantizedWeight) and to.__tensor_flatten__()[0] == source.__tensor_flatten__()[0]
    if not same or (to.format, to.shape, to.block) != (source.format, source.shape, source.block):  # type: ignore[attr-defined]
        raise TypeError(f"copy_: expected another {to!r}, got {source!r}")
    for part, new in zip(to.parts(), source.parts(), strict=True):  # type: ignore[attr-defined]
        part.copy_(new)
    return to


def tensors_of(weight: Tensor | None) -> tuple[Tensor | None, ...]:
    """What holds a weight in memory: a quantized one's tensors, else itself."""
    return weight.parts() if isinstance(weight, QuantizedWeight) else (weight,)


def check(
    format: str,
    shape: Sequence[int],
    packed: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    block: Block,
) -> tuple[int, int]:
    """N, K. Raises TypeError or ValueError unless the tensors are those of a W [N, K] in this format."""
    if not isinstance(format, str) or format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    N, K = _pair("shape", shape)
    n, k = _pair("block", block)
    found = FORMATS[format]
    multiple = found.codes_in_block
    if K % multiple:
        raise ValueError(f"shape: expected K to be a multiple of {multiple} in format {format}, got {K}")
    if format != "fp8_e4m3" and n != 1:
        raise ValueError(f"block: expected (1, columns) in format {format}, got {(n, k)}")
    if found.columns is not None and k != found.columns:
        raise ValueError(f"block: expected (1, {found.columns}) in format {format}, got {(n, k)}")
    if k % multiple:
        raise ValueError(f"block: expected a multiple of {multiple} columns in format {format}, got {(n, k)}")
    if format == "int8_absmax" and k != K:
        raise ValueError(f"block: expected (1, {K}), a whole row, in format {format}, got {(n, k)}")
    if format in ("int8", "int4") and K % k:
        raise ValueError(f"block: expected columns that divide K = {K} in format {format}, got {(n, k)}")
    layout = found.layout((N, K), (n, k))
    _check_part("packed", packed, (layout.packed_dtype,), layout.packed, packed)
    for name, part, dtypes, expected in (
        ("scales", scales, layout.scale_dtypes, layout.scales),
        ("zeros", zeros, (torch.uint8,), layout.zeros),
    ):
        if expected is None and part is not None:
            raise ValueError(f"{name}: expected None in format {format}, got a {type(part).__name__}")
        if expected is not None and (part is not None or name == "scales"):
            _check_part(name, part, dtypes, expected, packed)
    return N, K


def _pair(name: str, value: Any) -> tuple[int, int]:
    if len(tuple(value)) != 2 or not all(isinstance(size, int) and size >= 1 for size in value):
        raise ValueError(f"{name}: expected two integers of 1 or more, got {tuple(value)}")
    return int(value[0]), int(value[1])


def _check_part(name: str, part: Any, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], packed: Tensor) -> None:
    if not isinstance(part, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(part).__name__}")
    if part.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(str(dtype) for dtype in dtypes)}, got {part.dtype}")
    if tuple(part.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(part.shape)}")
    if not part.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {part.stride()}")
    if not storage.by_torch(part):
        raise TypeError(f"{name}: expected a dense tensor, got {storage.reason(part)}")
    if part.device != packed.device:
        raise ValueError(f"{name}: expected on {packed.device} like packed, got {part.device}")

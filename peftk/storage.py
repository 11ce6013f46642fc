"""Whether a tensor's elements lie in memory as its shape and strides say. Asked here, before any address is taken.

Kernels read plain dense tensors: `torch.Tensor`, `nn.Parameter`, and subclasses that leave torch's own meaning alone.
For everything else `reason` says what it is, and `by_torch` whether plain torch operations compute right with it.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor, nn

_EXACT = (Tensor, nn.Parameter)


def dense(*tensors: Tensor | None) -> bool:
    """Whether kernels may read all of these (None is no tensor)."""
    return all(tensor is None or reason(tensor) is None for tensor in tensors)


def reason(tensor: Tensor) -> str | None:
    """What a tensor is that kernels may not read, as in "got …"; None for a plain dense one."""
    kind = type(tensor)
    if kind not in _EXACT and _means_something(kind):
        return f"a {kind.__name__}, a tensor subclass with operations of its own"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}"
    if tensor.is_quantized:
        return f"a quantized tensor ({tensor.dtype})"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "a tensor inside of torch.func or vmap"
    if torch._is_functional_tensor(tensor):
        return "a functional tensor"
    if tensor.is_meta:
        return "a meta tensor, which has no values"
    if tensor.is_neg() or tensor.is_conj():
        return "a negated or conjugated view"
    if tensor._is_zerotensor():
        return "a zero tensor without memory"
    return _short(tensor)


def by_torch(tensor: Tensor) -> bool:
    """Whether plain torch operations compute with a tensor as with a dense one, though no kernel can read it."""
    kind = type(tensor)
    if kind not in _EXACT and _means_something(kind):
        return not (nn.parameter.is_lazy(tensor) or tensor.is_nested or _distributed(kind))
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor):
        return True
    return tensor.is_meta or tensor._is_zerotensor() or _short(tensor) is None


@functools.cache
def _means_something(kind: type[Tensor]) -> bool:
    """Whether a subclass says itself what operations do with it."""
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    plain = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)  # type: ignore[attr-defined]
    return function not in plain or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def _distributed(kind: type[Tensor]) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # without it, nobody has made a DTensor
    return module is not None and issubclass(kind, module.DTensor)


def _short(tensor: Tensor) -> str | None:
    """Where the memory ends before the elements do: freed by untyped_storage().resize_(0), as FSDP and offloading do."""
    if not tensor.numel():
        return None
    try:
        has = tensor.untyped_storage().nbytes()
    except NotImplementedError:
        return "a tensor without storage"
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needs = (tensor.storage_offset() + reach + 1) * tensor.itemsize
    return None if needs <= has else f"one whose memory has {has} of {needs} bytes (freed or offloaded)"

"""Whether a tensor's elements lie in memory as its shape and strides say. Asked here, before any address is taken.

Kernels read plain dense tensors: `torch.Tensor`, `nn.Parameter`, and subclasses that leave torch's own meaning alone.
For everything else `reason` says what it is, and `by_torch` whether plain torch operations compute right with it:

    by kernels  dense tensors
    by torch    subclasses that compute (torchao's, FakeTensor, …), tensors inside of vmap and torch.func, functional
                ones, meta, negated views, zero tensors; and those with a tangent (forward-mode AD)
    refused     sparse, MKL-DNN, nested and quantized tensors, DTensors, lazy Parameters, and memory that was freed
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch

try:
    import peftk._cpu as _cpu
except ImportError:  # without the C++ module the same is asked in Python
    _cpu = None  # type: ignore[assignment]

_EXACT = (Tensor, nn.Parameter)


def dense(*tensors: Tensor | None) -> bool:
    """Whether kernels may read all of these together (None is no tensor): each has memory of its own, on one device."""
    if _cpu is not None and _cpu.dense(*tensors):
        return True
    found = [tensor for tensor in tensors if tensor is not None]
    return all(reason(tensor) is None and tensor.device == found[0].device for tensor in found)


def recordable(*tensors: Tensor | None) -> bool:
    """The same for tensors of which operations are recorded, which have no memory yet: none computes by itself."""
    return all(
        tensor is None or type(tensor) in _EXACT or type(tensor).__module__.startswith("torch._subclasses")
        for tensor in tensors
    )


def reason(tensor: Any) -> str | None:
    """What a tensor is that kernels may not read, as in "got …"; None for a plain dense one."""
    kind: Any = type(tensor)
    if not isinstance(tensor, Tensor):
        return f"a {kind.__name__}"
    if kind not in _EXACT and _computes(kind):
        return f"a {kind.__name__}, a tensor subclass with operations of its own"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"layout {tensor.layout}"
    if tensor.is_quantized:
        return f"a quantized tensor ({tensor.dtype})"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "a tensor that has left its vmap" if _escaped(tensor) else "a tensor inside of vmap or torch.func"
    if torch._is_functional_tensor(tensor):
        return "a functional tensor"
    if tensor.is_meta:
        return "a meta tensor, which has no values"
    if tensor.is_neg() or tensor.is_conj():
        return "a negated or conjugated view"
    if tensor._is_zerotensor():
        return "a zero tensor without memory"
    if not _has_storage(tensor):
        return "a tensor without storage"
    return _short(tensor)


def by_torch(tensor: Any) -> bool:
    """Whether plain torch operations compute with a tensor as with a dense one, though no kernel may be able to."""
    kind: Any = type(tensor)
    if not isinstance(tensor, Tensor):
        return False
    if kind not in _EXACT and _computes(kind):
        return not (nn.parameter.is_lazy(tensor) or tensor.is_nested or _distributed(kind))
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return not _escaped(tensor)
    if torch._is_functional_tensor(tensor):
        return True
    return tensor.is_meta or tensor._is_zerotensor() or not _has_storage(tensor) or _short(tensor) is None


def computes(tensor: Tensor) -> bool:
    """Whether it is of a subclass that says itself what operations do with it."""
    return type(tensor) not in _EXACT and _computes(type(tensor))


def tangents() -> bool:
    """Whether forward-mode AD is at work: tensors may have tangents, of which no kernel knows."""
    return forward_ad._current_level >= 0


def has_tangent(*tensors: Tensor | None) -> bool:
    if not tangents():
        return False
    if torch.compiler.is_compiling():
        return True  # perhaps: what is traced doesn't show
    with torch.inference_mode(False):  # where torch does not show them
        return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


@functools.cache
def _computes(kind: type[Tensor]) -> bool:
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    plain = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)  # type: ignore[attr-defined]
    return function not in plain or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def _escaped(tensor: Tensor) -> bool:
    """Whether it belongs to a vmap that has ended, or to none of those around. (torch takes those of grad and jvp.)"""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) and functorch.maybe_get_level(tensor) > (
        functorch.maybe_current_level() or 0
    )


def _distributed(kind: type[Tensor]) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # without it, nobody has made a DTensor
    return module is not None and issubclass(kind, module.DTensor)


def _has_storage(tensor: Tensor) -> bool:
    try:
        return tensor.untyped_storage() is not None
    except NotImplementedError:  # in a vmapped backward (is_grads_batched), say
        return False


def _short(tensor: Tensor) -> str | None:
    """Memory that ends before the elements do: freed by untyped_storage().resize_, as FSDP and offloading do."""
    if not tensor.numel():
        return None
    has = tensor.untyped_storage().nbytes()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needs = (tensor.storage_offset() + reach + 1) * tensor.itemsize
    return None if needs <= has else f"one whose memory has {has} of {needs} bytes (freed or offloaded)"


def _introduce() -> None:
    """Tells the C++ module what plain tensors are. Without these functions of torch's it takes none for plain."""
    library = ctypes.CDLL(torch._C.__file__)
    names = ("aoti_torch_get_storage_size", "aoti_torch_get_storage_offset", "_ZN2at6native6is_negERKNS_6TensorE")
    try:
        addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names]
    except AttributeError:
        return
    with torch._C.DisableTorchFunction(), no_dispatch():  # whatever mode this is imported in
        tensor = torch.empty(0, device="cpu")
    _cpu.plain_tensors(tensor, nn.Parameter(tensor, requires_grad=False), *addresses)


if _cpu is not None:
    _introduce()

"""Tells which tensors kernels may read: those whose elements are in memory as shape and strides say.

Kernels read plain dense tensors: `torch.Tensor`, `nn.Parameter`, and subclasses that do not override operations. For
every other tensor `reason` says what it is, and `by_torch` whether plain torch computes with it correctly. Check this
before taking any address:

    by kernels  dense tensors
    by torch    subclasses that override operations (torchao's, FakeTensor, …), tensors inside of vmap and torch.func,
                functional, meta and zero tensors, negated views; and tensors with a tangent (forward-mode AD)
    refused     sparse, MKL-DNN, nested and quantized tensors, DTensors, lazy Parameters, and freed memory
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch

from peftk.system.sharded import is_sharded_type

try:
    import peftk._cpu as _cpu
except ImportError:  # without the C++ module, Python checks the same
    _cpu = None  # type: ignore[assignment]

_EXACT = (Tensor, nn.Parameter)


def dense(*tensors: Tensor | None) -> bool:
    """Whether kernels may read all of these tensors in one call: dense, and on one device. None is ignored."""
    if _cpu is not None and _cpu.dense(*tensors):
        return True
    present = [tensor for tensor in tensors if tensor is not None]
    return all(reason(tensor) is None and tensor.device == present[0].device for tensor in present)


def recordable(*tensors: Tensor | None) -> bool:
    """`dense` for recorded operations, whose tensors have no memory yet: whether no subclass overrides operations."""
    return all(
        tensor is None or type(tensor) in _EXACT or type(tensor).__module__.startswith("torch._subclasses")
        for tensor in tensors
    )


def reason(tensor: Any) -> str | None:
    """What kind of tensor this is, for "got …" in an error, if kernels may not read it; None for a dense tensor."""
    tensor_type: Any = type(tensor)
    if not isinstance(tensor, Tensor):
        return f"a {tensor_type.__name__}"
    if tensor_type not in _EXACT and _overrides(tensor_type):
        return f"a {tensor_type.__name__}, a tensor subclass with operations of its own"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"layout {tensor.layout}"
    if tensor.is_quantized:
        return f"a quantized tensor ({tensor.dtype})"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "a tensor that has left its vmap" if _left_vmap(tensor) else "a tensor inside of vmap or torch.func"
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
    return _missing_memory(tensor)


def by_torch(tensor: Any) -> bool:
    """Whether plain torch operations compute with it as with a dense tensor, even if kernels may not read it."""
    tensor_type: Any = type(tensor)
    if not isinstance(tensor, Tensor):
        return False
    if tensor_type not in _EXACT and _overrides(tensor_type):
        return not (nn.parameter.is_lazy(tensor) or tensor.is_nested or is_sharded_type(tensor_type))
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return not _left_vmap(tensor)
    if torch._is_functional_tensor(tensor):
        return True
    return tensor.is_meta or tensor._is_zerotensor() or not _has_storage(tensor) or _missing_memory(tensor) is None


def overrides_operations(tensor: Tensor) -> bool:
    """Whether the tensor is of a subclass that overrides torch operations."""
    return type(tensor) not in _EXACT and _overrides(type(tensor))


def forward_ad_active() -> bool:
    """Whether a forward-mode AD level is open. Tensors may then have tangents, which kernels ignore."""
    return forward_ad._current_level >= 0


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether any of the tensors has a tangent. True while torch.compile traces inside of forward-mode AD."""
    if not forward_ad_active():
        return False
    if torch.compiler.is_compiling():
        return True  # unknown: a traced tensor does not show its tangent
    with torch.inference_mode(False):  # inference mode hides tangents
        return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


@functools.cache
def _overrides(tensor_type: type[Tensor]) -> bool:
    function = getattr(tensor_type.__torch_function__, "__func__", tensor_type.__torch_function__)
    plain = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)  # type: ignore[attr-defined]
    return function not in plain or tensor_type.__torch_dispatch__ is not Tensor.__torch_dispatch__


def _left_vmap(tensor: Tensor) -> bool:
    """Whether it is a batched tensor of a vmap that is not active. (torch can compute with those of grad and jvp.)"""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) and functorch.maybe_get_level(tensor) > (
        functorch.maybe_current_level() or 0
    )


def _has_storage(tensor: Tensor) -> bool:
    try:
        return tensor.untyped_storage() is not None
    except NotImplementedError:  # for example in a vmapped backward (is_grads_batched)
        return False


def _missing_memory(tensor: Tensor) -> str | None:
    """The reason if memory was freed by untyped_storage().resize_, as FSDP and offloading do; None if it was not."""
    if not tensor.numel():
        return None
    available = tensor.untyped_storage().nbytes()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    required = (tensor.storage_offset() + reach + 1) * tensor.itemsize
    return (
        None if required <= available else f"one whose memory has {available} of {required} bytes (freed or offloaded)"
    )


def register_plain_tensors(register: Callable[[Tensor, nn.Parameter, int, int, int, int], None]) -> None:
    """Tells a C++ module how to recognise plain tensors. If torch lacks one of the functions, it recognises none."""
    library = ctypes.CDLL(torch._C.__file__)
    stable = ("storage_size", "storage_offset", "device_type")
    names = [f"aoti_torch_get_{name}" for name in stable] + ["_ZN2at6native6is_negERKNS_6TensorE"]
    try:
        addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names]
    except AttributeError:
        return
    with torch._C.DisableTorchFunction(), no_dispatch():  # the import may happen inside a torch mode
        tensor = torch.empty(0, device="cpu")
    register(tensor, nn.Parameter(tensor, requires_grad=False), *addresses)


if _cpu is not None:
    register_plain_tensors(_cpu.plain_tensors)

"""torch.autocast, as nn.Linear follows it: x and W are cast to its dtype. Biases and adapters keep theirs.

W's cast is made once and cached under the rules of torch's own cache: for fp32 weights, until the outermost autocast
ends, and not with `cache_enabled=False`. (torch's has no place for a frozen weight, so nn.Linear casts it in every
call.) A cast that a graph has saved for its backward lives as long as the graph.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from peftk.system import storage, streams
from peftk.system.lasting import lasting

F = TypeVar("F", bound=Callable[..., Any])


def dtype_for(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype that x of `dtype` is cast to in a call on this device; None if it keeps its own."""
    kind = device.type
    if dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def cast(x: Tensor, weight: Tensor | None = None, *, recording: bool = False) -> tuple[Tensor, Tensor | None]:
    """x and W as a call multiplies them. recording: operations are being recorded, so nothing is cached.

    A weight that plain torch cannot compute with, or of a subclass that casts by its own rules, is returned as it is.
    """
    dtype = dtype_for(x.device, x.dtype)
    if dtype is None:
        return x, weight
    return x.to(dtype), None if weight is None else _cast_weight(weight, dtype, recording)


def off(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside, torch's products keep the dtype of their factors."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def without(function: F) -> F:
    """Runs a function, whose first argument is a tensor, with autocast off."""

    @functools.wraps(function)
    def wrapper(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with off(first.device):
            return function(first, *args, **kwargs)

    return wrapper  # type: ignore[return-value]


class _Cast(NamedTuple):
    source: Tensor  # of W's memory, so that no other tensor is given it while this is cached
    version: int  # of W when it was cast
    weight: Tensor


class _Casts(dict[Any, _Cast]):
    """The casts of one autocast region."""


_region: weakref.ref[_Casts] | None = None  # torch's cache holds them


def _cast_weight(weight: Tensor, dtype: torch.dtype, recording: bool) -> Tensor:
    if weight.dtype in (dtype, torch.float64):
        return weight
    if recording:
        return weight.to(dtype) if storage.recordable(weight) else weight
    if not storage.dense(weight):
        plain = storage.by_torch(weight) and not storage.overrides_operations(weight)
        return weight.to(dtype) if plain else weight
    return _cached(weight, dtype) if _may_be_cached(weight) else weight.to(dtype)


def _may_be_cached(weight: Tensor) -> bool:
    """Inference tensors don't count their changes. A captured graph makes its own casts, in its own memory."""
    differentiated = weight.requires_grad or storage.forward_ad_active() or torch._C._are_functorch_transforms_active()
    return (
        torch.is_autocast_cache_enabled()
        and weight.dtype == torch.float32
        and not (differentiated or weight.is_inference())
        and not streams.capturing(weight.device)
    )


def _cached(weight: Tensor, dtype: torch.dtype) -> Tensor:
    key = (weight.device, weight.data_ptr(), weight.shape, weight.stride(), dtype, streams.handle(weight.device))
    casts = _casts_of_region(weight.device)
    found = casts.get(key)
    if found is None or found.version != weight._version:
        with lasting():
            found = casts[key] = _Cast(weight.detach(), weight._version, weight.to(dtype))
    return found.weight


def _casts_of_region(device: torch.device) -> _Casts:
    global _region
    casts = None if _region is None else _region()
    if casts is None:
        casts = _Casts()
        _keep_until_autocast_ends(casts, device)
        _region = weakref.ref(casts)
    return casts


def _keep_until_autocast_ends(casts: _Casts, device: torch.device) -> None:
    """torch tells nobody when autocast ends, but it empties its own cache then. So a cast in that cache holds `casts`.

    It is the cast of an empty tensor, which launches nothing. Its node in the autograd graph has a dict for such
    things. If torch has cached nothing, `casts` live no longer than this call.
    """
    own_hooks = torch.autograd.graph.saved_tensors_hooks(_same, _same)  # activation checkpoints count what is saved
    with torch.inference_mode(False), torch.enable_grad(), own_hooks:
        empty = _empty(device)
        product: Any = torch.mm(empty, empty).grad_fn
    product.next_functions[0][0].metadata["peftk"] = casts


def _same(tensor: Tensor) -> Tensor:
    return tensor


@functools.cache
def _empty(device: torch.device) -> Tensor:
    """A leaf that requires grad: what torch's cache takes."""
    return torch.empty(0, 0, device=device, requires_grad=True)

"""Tensors of every kind of storage, each made from a plain tensor. `KINDS` has them by name.

A kind returns the tensor and a plain tensor of the same values, or None if it has no values (results computed with it
have none either).
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

Made = tuple[Any, Tensor | None]


class Scaled(torch.Tensor):
    """q · s as a wrapper without its own memory, which supports all operations: quantization as in torchao."""

    @staticmethod
    def __new__(cls, q: Tensor, s: Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, q.shape, strides=q.stride(), dtype=s.dtype, device=q.device)

    def __init__(self, q: Tensor, s: Tensor) -> None:
        self.q, self.s = q, s

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].q, args[0].s)
        args = torch.utils._pytree.tree_map_only(cls, lambda t: t.q * t.s, args)
        return func(*args, **(kwargs or {}))


class OnlyLinear(Scaled):
    """The same, but it supports only matrix products."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.t.default):
            q = args[0].q.t() if func is torch.ops.aten.t.default else args[0].q
            return cls(q, args[0].s)
        if func not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            raise NotImplementedError(f"OnlyLinear has no {func}")
        return func(*(t.q * t.s if isinstance(t, cls) else t for t in args), **(kwargs or {}))


class Negated(torch.Tensor):
    """A tensor whose values are those of its memory negated, through __torch_function__ only."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        def plain(t: Any) -> Any:
            return -t.as_subclass(torch.Tensor) if isinstance(t, cls) else t

        with torch._C.DisableTorchFunctionSubclass():
            if getattr(func, "__name__", "") in ("__get__", "requires_grad_", "dim", "stride", "size"):
                return func(*args, **(kwargs or {}))
            return func(*torch.utils._pytree.tree_map(plain, args), **(kwargs or {}))


class Harmless(torch.Tensor):
    pass


class OwnParameter(nn.Parameter):
    pass


def _of_subclass(kind: type, t: Tensor) -> Made:
    scale = t.detach().abs().max().clamp(min=1e-3) / 127
    q = (t.detach() / scale).round().to(torch.int8)
    return kind(q, scale), (q * scale)


def _freed(t: Tensor, left: int = 0, offset: int = 0) -> Made:
    room = torch.zeros(offset + t.numel())
    view = room[offset:].view(t.shape).copy_(t)
    view.untyped_storage().resize_(left)
    return view, None


def _apart(t: Tensor) -> Made:
    """Every other element of a larger tensor."""
    room = torch.full([2 * size + 1 for size in t.shape], torch.nan, dtype=t.dtype)
    view = room[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t), t


def _expanded(t: Tensor) -> Made:
    if not t.dim():
        return t, t
    return t[:1].expand_as(t), t[:1].expand_as(t).clone()


def _overlapping(t: Tensor) -> Made:
    """Rows that share all but one element with the next row."""
    if t.dim() != 2:
        return t, t
    room = torch.arange(float(sum(t.shape))).sin().to(t.dtype)
    view = room.as_strided(t.shape, (1, 1))
    return view, view.clone()


def _imaginary(t: Tensor) -> Made:
    """The imaginary part of a conjugate: its memory holds the negated values."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag, t


def _leaked(t: Tensor) -> Made:
    """A tensor of a vmap that has ended."""
    kept = []
    torch.func.vmap(lambda one: (kept.append(one), one)[1])(torch.stack([t, t]))
    return kept[0], None


def _leaked_gradient(t: Tensor) -> Made:
    """A tensor of a torch.func.grad that has ended: torch unwraps it."""
    kept = []
    torch.func.grad(lambda one: (kept.append(one), one.sum())[1])(t)
    return kept[0], t


def _fake(t: Tensor) -> Made:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return mode.from_tensor(t), None


def _masked(t: Tensor) -> Made:
    return torch.masked.masked_tensor(t.clone(), torch.ones_like(t, dtype=torch.bool)), t


@functools.cache
def _mesh() -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    return init_device_mesh("cpu", (1,))


def _distributed(t: Tensor) -> Made:
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(t.detach().clone(), _mesh(), [Replicate()]), t


def _mapped(t: Tensor) -> Made:
    """A tensor in mapped memory that torch does not own."""
    room = mmap.mmap(-1, max(1, t.numel() * t.element_size()))
    view = torch.frombuffer(room, dtype=t.dtype, count=t.numel()).view(t.shape) if t.numel() else t.clone()
    return view.copy_(t), t


def _nested(t: Tensor, layout: torch.layout) -> Made:
    return torch.nested.nested_tensor(list(t) if t.dim() > 1 else [t, t], layout=layout), None


def _inference(t: Tensor) -> Made:
    with torch.inference_mode():
        return t.clone(), t


def _dual(t: Tensor) -> Made:
    """A tangent from a level that has ended."""
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.make_dual(t.clone(), t), t


KINDS: dict[str, Callable[[Tensor], Made]] = {
    "plain": lambda t: (t.clone(), t),
    "Parameter": lambda t: (nn.Parameter(t.clone(), requires_grad=False), t),
    "Buffer": lambda t: (nn.Buffer(t.clone()), t),
    "Parameter of a class of its own": lambda t: (OwnParameter(t.clone(), requires_grad=False), t),
    "subclass without meaning": lambda t: (t.clone().as_subclass(Harmless), t),
    "quantizing subclass": lambda t: _of_subclass(Scaled, t),
    "quantizing Parameter": lambda t: (lambda made: (nn.Parameter(made[0], False), made[1]))(_of_subclass(Scaled, t)),
    "subclass of products": lambda t: _of_subclass(OnlyLinear, t),
    "subclass by function": lambda t: (t.neg().as_subclass(Negated), t),
    "negated view": lambda t: (torch._neg_view(-t), t),
    "imaginary part": _imaginary,
    "zero tensor": lambda t: (torch._efficientzerotensor(t.shape, dtype=t.dtype), torch.zeros_like(t)),
    "meta": lambda t: (t.to("meta"), None),
    "fake": _fake,
    "functional": lambda t: (torch._to_functional_tensor(t.clone()), t),
    "leaked from vmap": _leaked,
    "leaked from grad": _leaked_gradient,
    "coo": lambda t: (t.to_sparse(), t),
    "csr": lambda t: (t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(), t),
    "csc": lambda t: (t.to_sparse_csc() if t.dim() == 2 else t.to_sparse(), t),
    "MKL-DNN": lambda t: (t.float().to_mkldnn(), t),
    "nested": lambda t: _nested(t, torch.strided),
    "jagged": lambda t: _nested(t, torch.jagged),
    "qint8": lambda t: (torch.quantize_per_tensor(t.float(), 0.05, 0, torch.qint8), None),
    "qint8 by channel": lambda t: (
        torch.quantize_per_channel(t.float(), torch.ones(len(t)), torch.zeros(len(t)), 0, torch.qint8), None),
    "freed": _freed,
    "freed, a view": lambda t: _freed(t, offset=20_000_000),
    "freed in part": lambda t: _freed(t, left=4),
    "lazy": lambda t: (nn.UninitializedParameter(requires_grad=False), None),
    "DTensor": _distributed,
    "masked": _masked,
    "inference": _inference,
    "dual, ended": _dual,
    "apart": _apart,
    "transposed": lambda t: (t.t().contiguous().t() if t.dim() == 2 else t, t),
    "expanded": _expanded,
    "overlapping": _overlapping,
    "mapped": _mapped,
    "empty": lambda t: (t[:0], t[:0]),
    "empty at the end": lambda t: (t[..., :0], t[..., :0]),
    "scalar": lambda t: (t.flatten()[0], t.flatten()[0]),
    "one more dimension": lambda t: (t[None], t[None]),
    "longer": lambda t: (torch.cat([t, t]), torch.cat([t, t])),
    "half": lambda t: (t.half(), t.half().to(t.dtype)),
    "fp64": lambda t: (t.double(), t),
    "fp8": lambda t: (t.to(torch.float8_e4m3fn), None),
    "int": lambda t: (t.int(), None if t.is_floating_point() else t),
    "bool": lambda t: (t.bool(), None),
    "complex": lambda t: (t.to(torch.complex64), None),
    "bits": lambda t: (t.to(torch.uint8).view(torch.bits8), None),
    "list": lambda t: (t.tolist(), None),
    "array": lambda t: (t.numpy(), None),
    "None": lambda t: (None, None),
    "text": lambda t: ("tensor", None),
}  # fmt: skip

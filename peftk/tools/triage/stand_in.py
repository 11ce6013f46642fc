"""A stand-in for a GPU, on which every launch of a Triton kernel is compiled for it and not run.

Tensors on it have shapes, strides, dtypes and addresses, and no values. So the triage's own checks can run where no GPU
is, with the arguments of their launches: what Triton compiles, and its key for it, are those of the same launch on the
GPU. A value that the host asks for is 0, no two tensors are equal, a mask selects nothing, and `all` is true.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from peftk import functional
from peftk.ops import dispatch, layer_calls
from peftk.system import storage, streams

_ADDRESS = 1 << 40  # of all memory: torch's allocator gives addresses that are multiples of 512
_ANSWERS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._local_scalar_dense.default: lambda tensor: 0,
    torch.ops.aten.equal.default: lambda *_: False,
    torch.ops.aten.nonzero.default: lambda tensor: tensor.new_empty(0, tensor.dim(), dtype=torch.int64),
    torch.ops.aten.index.Tensor: lambda tensor, masks: tensor.new_empty(0, *tensor.shape[masks[0].dim() :]),
}


@contextlib.contextmanager
def gpu(capability: int) -> Iterator[None]:
    """Inside, torch has one GPU of this compute capability (90: 9.0)."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Returns no kernel: a launcher would keep it, and launch it the next time."""
        run(kernel, *args, grid=grid, warmup=True, **options)

    _let_torch_name_cuda()
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(driver, "_active", _Driver(capability)))
        enter(mock.patch.object(JITFunction, "run", compile_only))
        for name, value in _cuda(capability).items():
            enter(mock.patch.object(torch.cuda, name, value))
        enter(mock.patch.object(torch._C, "_cuda_getDevice", create=True, return_value=0))
        for name, value in {"current": None, "handle": 0, "capturing": False}.items():
            enter(mock.patch.object(streams, name, return_value=value))
        enter(mock.patch.object(torch.version, "cuda", None))  # so that nothing goes to the CUDA C++ kernels
        for module in (dispatch, layer_calls, functional):
            enter(mock.patch.object(module, "is_recording", return_value=False))
        enter(mock.patch.object(storage, "reason", return_value=None))
        enter(mock.patch.object(fake_tensor, "init_gpu_context"))  # there is none
        enter(mock.patch.object(FakeTensor, "data_ptr", _address))
        enter(mock.patch.object(torch.autograd, "grad", _gradients))
        enter(_Tensors(allow_non_fake_inputs=True))
        enter(_Values())
        yield


class _Tensors(FakeTensorMode):
    avoid_device_init = True  # whatever torch.cuda says


class _Values(TorchDispatchMode):
    """Answers what only values could tell."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.all.default:
            return torch.tensor(True)
        try:
            return function(*args, **(kwargs or {}))
        except (DataDependentOutputException, DynamicOutputShapeException):
            if function not in _ANSWERS:
                raise
            return _ANSWERS[function](*args)


def gpu_target(capability: int) -> Any:
    """What Triton compiles for."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", capability, 32)


class _Driver:
    """The parts of a Triton driver that compiling needs."""

    def __init__(self, capability: int) -> None:
        self.target = gpu_target(capability)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def _cuda(capability: int) -> dict[str, Any]:
    """What replaces functions of torch.cuda."""
    properties = SimpleNamespace(multi_processor_count=132, name="stand-in")
    stream = mock.MagicMock(cuda_stream=0)

    def context(*_: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    return {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: divmod(capability, 10),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: "",
        "current_stream": lambda device=None: stream,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: None,
        "device": context,
        "stream": context,
    }


def _address(tensor: Tensor) -> int:
    return _ADDRESS + int(tensor.storage_offset()) * tensor.itemsize if tensor.numel() else 0


def _gradients(y: Tensor, leaves: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    """`torch.autograd.grad` in this thread. torch's engine has threads for devices that a torch without CUDA lacks."""
    found: dict[int, Tensor] = {}
    arrived: dict[Any, Tensor] = {y.grad_fn: dy}
    with torch.no_grad():
        for node in _from_result(y.grad_fn):
            if hasattr(node, "variable"):
                found[id(node.variable)] = arrived[node]
                continue
            for before, grad in _step(node, arrived[node]):
                arrived[before] = arrived[before] + grad if before in arrived else grad
    return [found[id(leaf)] for leaf in leaves]


def _step(node: Any, arrived: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """The nodes that a node hands gradients on to, and those."""
    edges = [before for before, _ in node.next_functions]
    grads = node.apply(arrived) if hasattr(node, "apply") else node(arrived)
    grads = grads if isinstance(grads, tuple) else (grads,)
    if hasattr(node, "needs_input_grad"):  # of a Function in Python: None for what is no tensor, too
        edges = [before for before in edges if before is not None]
        grads = [grad for grad, needed in zip(grads, node.needs_input_grad, strict=True) if needed]
    return ((before, grad) for before, grad in zip(edges, grads, strict=True) if before is not None)


def _from_result(root: Any) -> list[Any]:
    """The nodes of a graph, each before those that it hands gradients on to."""
    ended: dict[Any, None] = {}

    def visit(node: Any) -> None:
        if node is not None and node not in ended:
            for before, _ in node.next_functions:
                visit(before)
            ended[node] = None

    visit(root)
    return list(reversed(ended))


_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


def _let_torch_name_cuda() -> None:
    """A torch without CUDA refuses even fake tensors on "cuda", until it has something that switches devices."""
    if torch.version.cuda is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD)
        root = Path(torch.__file__).parent
        command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", str(source), "-o", str(library)]
        subprocess.run([*command, f"-L{root / 'lib'}", "-lc10"], check=True)
        ctypes.CDLL(str(library))

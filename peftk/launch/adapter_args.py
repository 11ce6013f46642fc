"""One adapter as arguments of a GPU kernel: addresses and strides, so nothing is copied to the device."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from peftk.adapters.activations import CODES
from peftk.adapters.adapter import Adapter


class AdapterArgs(NamedTuple):
    """Addresses in bytes, strides in elements, 0 where there is no tensor."""

    A: int
    stride_A: int
    B: int
    stride_Bn: int
    stride_Br: int
    bias_A: int
    bias_B: int
    rank: int
    activation: int
    scaling: float


NO_ADAPTER = AdapterArgs(0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0)


class Tensors(NamedTuple):
    """The tensors whose addresses are passed: A [R, K] with contiguous rows, B [N, R], contiguous biases."""

    A: Tensor | None
    B: Tensor | None
    bias_A: Tensor | None
    bias_B: Tensor | None

    def any(self) -> Tensor | None:
        """The first tensor there is; None for an empty adapter."""
        return next((tensor for tensor in self if tensor is not None), None)


def adapter_args(adapter: Adapter | None) -> tuple[AdapterArgs, Tensors]:
    """An adapter's kernel arguments, and the tensors they point to. Several pages are first copied into one tensor.

    Keep the tensors alive until the launch; after it torch's allocator reuses their memory in stream order.
    """
    if adapter is None:
        return NO_ADAPTER, Tensors(None, None, None, None)
    A, B = adapter.lora_A, adapter.lora_B
    if A is not None and A.stride(1) != 1:
        A = A.contiguous()
    tensors = Tensors(A, B, contiguous(adapter.bias_A), contiguous(adapter.bias_B))
    args = AdapterArgs(
        A=0 if A is None else A.data_ptr(),
        stride_A=0 if A is None else A.stride(0),
        B=0 if B is None else B.data_ptr(),
        stride_Bn=0 if B is None else B.stride(0),
        stride_Br=0 if B is None else B.stride(1),
        bias_A=0 if tensors.bias_A is None else tensors.bias_A.data_ptr(),
        bias_B=0 if tensors.bias_B is None else tensors.bias_B.data_ptr(),
        rank=adapter.rank,
        activation=CODES[adapter.activation],
        scaling=float(adapter.scaling),
    )
    return args, tensors


def contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()

"""Where the tensors of a sharded layer lie, which of their gradients are sums over the ranks, and their local shards.

    y = xWᵀ + bias + s·(xAᵀ)Bᵀ         W [N, K], A [R, K], B [N, R]

Colwise splits N: every rank has all of x and A, and its rows of W, bias and B. Its part of y is complete; the gradients
of x and of A are sums over the ranks. Rowwise splits K: every rank has its columns of x, W and A, and all of B. y is
the sum of what the ranks compute, base and adapter together, and so is the gradient of B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor


class Layout(NamedTuple):
    """How one kind of sharding treats the tensors of a layer, by their roles.

    dims: which dimension is split; None for a tensor that every rank has. summed: every rank computes a part of the
    gradient. first: added on the first rank only, as the ranks' results are summed.
    """

    dims: Mapping[str, int | None]
    summed: frozenset[str]
    first: frozenset[str]


COLWISE = Layout(
    {"weight": 0, "bias": 0, "lora_A": None, "bias_A": None, "lora_B": 0, "bias_B": 0},
    summed=frozenset({"lora_A", "bias_A"}),
    first=frozenset(),
)
ROWWISE = Layout(
    {"weight": 1, "bias": None, "lora_A": 1, "bias_A": None, "lora_B": None, "bias_B": None},
    summed=frozenset({"lora_B", "bias_A", "bias_B"}),
    first=frozenset({"bias_A", "bias_B"}),
)


def complete(layout: Layout) -> Layout:
    """The same split where what follows a sum is the same on every rank, as after an activation of a rowwise layer."""
    return Layout(layout.dims, summed=frozenset(), first=frozenset())


def role_of(path: str) -> str:
    """What a Parameter is in its layer, from its name there.

    PEFT's layers have `base_layer.weight`, `lora_A.<adapter>.weight` and `lora_B.<adapter>.bias`, ours `weight`,
    `lora_A`, `lora_bias`, and those of `MultiLoRALinear.trained` `trained.slot0.lora_A`.
    """
    first, *rest = path.split(".")
    last = rest[-1] if rest else first
    if rest and first in ("lora_A", "lora_B"):
        return first if last == "weight" else f"bias_{first[-1]}"
    return "bias_B" if last == "lora_bias" else last


class Range(NamedTuple):
    """A rank's part of a dimension: [first, last) of `size`, as torch.chunk splits it."""

    size: int
    first: int
    last: int

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.narrow(dim, self.first, self.last - self.first)


def range_of(size: int, mesh: DeviceMesh) -> Range:
    """This rank's part of a dimension."""
    length = -(-size // mesh.size())
    first = min(mesh.get_local_rank() * length, size)
    return Range(size, first, min(first + length, size))


def check_splits(name: str, size: int, mesh: DeviceMesh) -> None:
    """Raises ValueError unless every rank gets a part of a dimension of this size."""
    if (mesh.size() - 1) * -(-size // mesh.size()) >= size:
        raise ValueError(f"{name}: expected a size that gives each of {mesh.size()} ranks a part, got {size}")


def distribute(parameter: nn.Parameter, mesh: DeviceMesh, dim: int | None, source: int | None) -> nn.Parameter:
    """The Parameter as a DTensor. source: the rank whose values all get; None: every rank takes its own."""
    placement: Placement = Replicate() if dim is None else Shard(dim)
    value = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=source)
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def local(parameter: Tensor, layout: Layout, role: str) -> Tensor:
    """The shard of a Parameter that this rank's kernels read; gradients that are sums are summed in the backward."""
    if not isinstance(parameter, DTensor):
        return parameter
    shard = _shard(parameter, summed=role in layout.summed)
    if role in layout.first and parameter.device_mesh.get_local_rank() != 0:
        # not None: every rank takes part in the sum of the gradients
        return torch.where(torch.zeros_like(shard, dtype=torch.bool), shard, 0.0)
    return shard


def _shard(parameter: DTensor, *, summed: bool) -> Tensor:
    if not (torch.is_grad_enabled() and parameter.requires_grad):
        with torch.no_grad():
            return parameter.to_local()
    if summed:  # to the same placement: nothing moves, but the gradient arrives as a sum and leaves replicated
        return parameter.redistribute(placements=parameter.placements).to_local(grad_placements=[Partial()])
    return parameter.to_local()


def bias_after_sum(bias: Tensor, output: Placement) -> Tensor:
    """The base layer's bias, to be added after the sum. Where each rank has other rows, its gradient is a sum."""
    return _shard(bias, summed=not output.is_replicate()) if isinstance(bias, DTensor) else bias

"""Tensors that are spread over the ranks of a process group (DTensors): whole values, and writing into them.

Nothing here imports torch.distributed.tensor: if nobody has, there are no DTensors. What gathers is collective: every
rank that has a part must call it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return isinstance(tensor, Tensor) and is_sharded_type(type(tensor))


def is_sharded_type(tensor_type: type[Tensor]) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and issubclass(tensor_type, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor: of a DTensor gathered from its ranks, else the tensor itself."""
    sharded: Any = tensor
    return sharded.detach().full_tensor() if is_sharded(tensor) else tensor


def copy(place: Tensor, value: Tensor) -> None:
    """place ← value, in place, without gradients. Every rank of a DTensor has the whole `value`, and takes its part."""
    if not is_sharded(place) or is_sharded(value):
        place.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = place
    place.copy_(distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None))


def mesh_of(tensors: Iterable[Tensor]) -> Any:
    """The DeviceMesh of the first DTensor among the tensors; None if there is none."""
    found: Any = next(filter(is_sharded, tensors), None)
    return None if found is None else found.device_mesh


def on_first_rank(mesh: Any, write: Callable[[], None]) -> None:
    """Runs `write` on the first rank of a mesh (None: here) while the others wait.

    What it raises is raised there, and a RuntimeError on every other rank.
    """
    if mesh is None:
        write()
        return
    here, error = mesh.get_coordinate(), None
    if not any(here):
        try:
            write()
        except BaseException as caught:
            error = caught
    done = torch.tensor([error is None], dtype=torch.int32, device=mesh.device_type)
    for dim in range(mesh.ndim):  # from rank 0 along the first dimension, from all of these along the second, …
        if not any(here[dim + 1 :]):
            group = mesh.get_group(dim)
            torch.distributed.broadcast(done, torch.distributed.get_global_rank(group, 0), group=group)
    if error is not None:
        raise error
    if not done.item():
        raise RuntimeError("path: expected the first rank to write the checkpoint, got an error there")

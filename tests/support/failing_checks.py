"""Checks for the test of `tests.support.ranks` itself."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def check_good(mesh: DeviceMesh) -> None:
    assert mesh.size() == 2


def check_one_rank_fails(mesh: DeviceMesh) -> None:
    assert mesh.get_local_rank() == 0, "on purpose"
    dist.barrier()


def check_later(mesh: DeviceMesh) -> None:
    raise AssertionError("never reached")

"""Tensor parallelism of peftk's layers and of accelerated PEFT layers (docs/distributed.md).

    mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (4,))
    peftk.distributed.parallelize(model, mesh)                          # by the model's own tp_plan
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})   # or by torch's function

FSDP2's `fully_shard` needs nothing from here: it works on models with adapters as on any other.
"""

from peftk.distributed.plan import parallelize
from peftk.distributed.styles import ColwiseParallel, RowwiseParallel

__all__ = ["ColwiseParallel", "RowwiseParallel", "parallelize"]

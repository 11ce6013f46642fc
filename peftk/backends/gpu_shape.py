"""A call as the tables and models of the GPU kernels describe it: a backward has N and K swapped, ranks are pages."""

from __future__ import annotations

from peftk.adapters.adapter import pages_of
from peftk.backends.call import Call
from peftk.triton_kernels.config import CallShape


def of(call: Call) -> CallShape:
    """Assumes that a backward wants dX, and rows of x and dY that lie as W's do."""
    backward = call.op.backward
    return CallShape(
        M=call.M,
        N=call.K if backward else call.N,
        K=call.N if backward else call.K,
        many=call.op.many,
        packed=call.slices > 1,
        backward=backward,
        wide=call.aligned and call.K % 16 == 0 and (not backward or call.N % 16 == 0),
        x=call.x_dtype,
        weight=call.weight_dtype,
        adapters=call.adapter_dtype or call.x_dtype,
        own_sums=backward and call.dropout,
        z_pages=call.slices * pages_of(call.rank),
        identity=call.op.kind == "adapter_block",
    )

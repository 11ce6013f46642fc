"""Sorts the rows of a batch by adapter, for the kernels of every backend that need it. `docs/segments.md`.

Which backend sorts is chosen as for any operation (`peftk.backends.choice`). All layers of a route share one sort.
"""

from __future__ import annotations

from torch import Tensor

from peftk.adapters import route
from peftk.backends import choice
from peftk.backends.call import SEGMENTS, Call
from peftk.backends.contract import require
from peftk.launch.segments import Segments
from peftk.system.lasting import lasting


def of(ids: Tensor, adapters: int) -> Segments:
    """The segments of ids (int32 or int64 [M], any stride). An id outside 0 … adapters - 1 counts as -1.

    With a route, sorted once for all its layers and their backward. Ids that a user passes are sorted in every call.
    """
    return route.derive_once(ids, (adapters, choice.forced()), lambda: _sorted(ids, adapters))


@lasting()
def _sorted(ids: Tensor, adapters: int) -> Segments:
    call = Call(
        op=SEGMENTS,
        device=ids.device.type,
        x_dtype=ids.dtype,
        weight_dtype=ids.dtype,
        adapter_dtype=None,
        M=ids.shape[0],
        K=1,
        N=1,
        rank=0,
        adapters=adapters,
    )
    return require(choice.backend_for(call).sort).segments(ids, adapters)

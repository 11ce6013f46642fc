"""The rows of a batch in the order of their adapters: what it is made of, and who makes it. `docs/segments.md`.

`of` serves the kernels of every backend that walk rows so. It is a choice like any other
(`peftk.backends.choice`), made once for all layers of a route.
"""

from __future__ import annotations

from torch import Tensor

from peftk.adapters import route
from peftk.backends import choice
from peftk.backends.call import SEGMENTS, Call
from peftk.backends.contract import served
from peftk.launch.segments import Segments
from peftk.system.lasting import lasting


def of(ids: Tensor, adapters: int) -> Segments:
    """The segments of ids (int32 or int64 [M], any stride). An id outside 0 … adapters - 1 counts as -1.

    Sorted once for all layers of a route and their backward; ids that a user passes, in every call.
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
    return served(choice.serving(call).sort).segments(ids, adapters)

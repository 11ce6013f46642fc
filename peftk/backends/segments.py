"""The rows of a batch in the order of their adapters: what it is made of, and who makes it. `docs/segments.md`.

`of` serves the kernels of every backend that walk rows so. It is a choice like any other (`peftk.backends.choose`, op
"segments"), made once for all layers of a route.
"""

from __future__ import annotations

from torch import Tensor

from peftk.adapters import route
from peftk.backends import choice
from peftk.backends.call import Call
from peftk.launch.segments import Segments
from peftk.system.lasting import lasting


def of(ids: Tensor, adapters: int) -> Segments:
    """The segments of ids (int32 or int64 [M], any stride). An id outside 0 … adapters - 1 counts as -1.

    Sorted once for all layers of a route and their backward; ids that a user passes, in every call.
    """
    return route.once(ids, (adapters, choice.forced()), lambda: _sorted(ids, adapters))


@lasting()
def _sorted(ids: Tensor, adapters: int) -> Segments:
    call = Call("segments", ids.device.type, ids.dtype, ids.dtype, None, ids.shape[0], 1, 1, 0, adapters)
    found: Segments = choice.module(choice.choose(call).backend).segments(ids, adapters)
    return found

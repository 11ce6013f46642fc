"""`peftk.deterministic`: which choices the surrounding code allows. Threads and tasks have it as a route."""

from __future__ import annotations

import torch

from peftk.adapters import carry
from peftk.adapters.carry import RouteContext

_KEY = object()
ever_entered = False  # until then no call needs to ask further


def deterministic(*, batch_invariant: bool = False) -> RouteContext:
    """A context manager or decorator: inside, only peftk's own kernels run, whose sums have a fixed order.

    It asks of peftk what `torch.use_deterministic_algorithms` asks of it: no library multiplies (backend `gemm`). Same
    input, same bits, with any number of threads.

    Args:
        batch_invariant: also, in the forward of `lora_linear`, `multi_lora_linear` and the adapter blocks, without
            dropout, the bits of a row depend on nothing but the row, the weights and the row's own adapter: not on how
            many rows there are, on the adapters beside it, on padding, or on the row's place. That holds for peftk's
            layers; what else a model computes (attention, norms) is as torch computes it. The bits are not those
            without the mode. CPU only. A call that no such kernel can run (on other devices, in fp64, with another
            backend forced, with tensors that only torch can read) raises BackendError. Nothing is promised of
            backwards. `docs/numerics.md` says what it costs.

    Modes nest: an inner one adds to what the outer one asks. Threads, pools and tasks that are started inside have the
    mode as they have a route (`docs/routes.md`), and so has a graph of torch.compile that is called inside.

        with peftk.deterministic(batch_invariant=True):
            model.generate(**inputs)

    Raises TypeError if batch_invariant is not a bool.
    """
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant: expected a bool, got {type(batch_invariant).__name__}")
    return RouteContext(_KEY, lambda: _entered(batch_invariant), lambda _: None)


def _entered(batch_invariant: bool) -> bool:
    global ever_entered
    ever_entered = True
    return batch_invariant or is_batch_invariant()


def is_deterministic() -> bool:
    """Whether only our own kernels may run: within `deterministic`, or after torch.use_deterministic_algorithms."""
    return torch._C._get_deterministic_algorithms() or (ever_entered and carry.route_for(_KEY) is not None)


def is_batch_invariant() -> bool:
    """Whether this is within `deterministic(batch_invariant=True)`."""
    return ever_entered and carry.route_for(_KEY) is True

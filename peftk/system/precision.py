"""How the adapters' products are rounded on a GPU: exactly, or as other libraries round them.

    exact   products of factors are exact, sums are fp32, y is rounded once (docs/numerics.md)
    field   v = act(z), and fp32 factors, are rounded once to x's 16-bit dtype before they are multiplied

One setting for the process, because the backward runs in threads of its own.
"""

from __future__ import annotations

from types import TracebackType
from typing import Literal, get_args

Precision = Literal["exact", "field"]

_current: Precision = "exact"


def field() -> bool:
    """Whether products are rounded as other libraries round them."""
    return _current == "field"


class precision:
    """Sets how the Triton kernels round the adapters' products: at once, and in a `with` block until its end.

    "exact" (the default): v = act(xAᵀ + a) stays in fp32, and so do fp32 factors. With 16-bit x that takes 3 products
    on tensor cores beside bf16 factors, 5 beside fp16 and 6 beside fp32 ones.

    "field": one product. v and fp32 factors are rounded once to x's dtype, which is what others do. With u = 2⁻⁸ (bf16)
    or 2⁻¹¹ (fp16), the bound of an element of y grows, to first order and for activations of slope at most 1, by

        u · |s| · (|v||B|ᵀ + [fp32 factors] · (|v| + |x||A|ᵀ)|B|ᵀ)

    and fp16 overflows where |s · v| exceeds 65,504. The same holds for dX and the gradients. Products of a batch of
    many adapters that are computed without tensor cores stay exact, and so do fp32 calls, and all other backends.

    Compiled models and CUDA graphs keep what was set when they were compiled or captured. Raises ValueError for any
    other name.

        with peftk.precision("field"):
            y = layer(x)
    """

    def __init__(self, name: Precision) -> None:
        global _current
        if name not in get_args(Precision):
            raise ValueError(f"precision: expected 'exact' or 'field', got {name!r}")
        self._before, _current = _current, name

    def __enter__(self) -> precision:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = self._before

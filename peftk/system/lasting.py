"""Makes ordinary tensors, also inside torch.inference_mode(), for objects that outlive the call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Tensors made inside, or by a function decorated with `@lasting()`, are ordinary tensors without gradients.

    The caller may be in torch.inference_mode(). Inference tensors cannot be trained, or changed outside of that mode.
    One kept by a layer, a bank, a table or a receipt would fail later, far from where it was made.
    """
    with torch.inference_mode(False), torch.no_grad():  # inference_mode(False) alone would record gradients
        yield

"""Tensors that outlive the call that makes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """What is made inside, or by a function under `@lasting()`, are ordinary tensors without gradients.

    A caller may be in torch.inference_mode(), whose tensors can be neither trained nor, outside of it, written to: one
    that a layer, a bank, a table or a receipt keeps would fail later, far from where it was made.
    """
    with torch.inference_mode(False), torch.no_grad():  # the first of these alone would record gradients
        yield

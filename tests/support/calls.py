"""`Call` objects, for tests of the choice of a backend."""

from __future__ import annotations

import torch

from peftk.backends.call import Call, Op


def call(op: str | Op = "lora_linear", *, dtype: torch.dtype = torch.float32, **rest: object) -> Call:
    """A call with one adapter of rank 8 on a small layer on the CPU, all of one dtype. rest: other fields of `Call`."""
    form = {"device": "cpu", "x_dtype": dtype, "weight_dtype": dtype, "adapter_dtype": dtype}
    form |= {"M": 4, "K": 64, "N": 64, "rank": 8, "adapters": 1}
    return Call(op=Op.parse(op) if isinstance(op, str) else op, **{**form, **rest})

"""The operations in plain torch, for tensors that no kernel can read and for forward-mode AD.

    y[m] = x[m] Wᵀ + bias + s_i · act(x̃[m] A_iᵀ + a_i) B_iᵀ + β_i

Every step is a torch operation, so torch can differentiate it in forward and reverse mode any number of times, vmap it,
and dispatch it to tensor subclasses. A weight of a tensor subclass (a quantized one of torchao, for example) is
multiplied by `nn.functional.linear` in x's dtype, as its own library does, under torch.autocast if that is on; one of
ours is dequantized.
Everything else is computed as in `peftk.reference`: in fp32 (fp64 for fp64 inputs), rounded once at the end.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from peftk.adapters import checks
from peftk.adapters.adapter import Adapter
from peftk.adapters.bank import AnyBank
from peftk.adapters.dropout import Dropout
from peftk.adapters.flat import flat_tensors
from peftk.backends import choice, determinism
from peftk.backends.call import BackendError
from peftk.quantized.weight import QuantizedWeight, tensors_of
from peftk.reference.lora_linear import accumulate_dtype, adapter_term, base_term, with_dropout
from peftk.system import autocast, storage


def should_run(recording: bool, x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether plain torch must compute with these tensors, because no kernel can.

    recording: whether operations are being recorded (`torch.compile`, …). Raises RuntimeError if tangents would be
    lost.
    """
    if any(isinstance(tensor, QuantizedWeight) for tensor in tensors):
        if recording:
            return True  # torch's graph dequantizes it
        tensors = tuple(part for tensor in tensors for part in tensors_of(tensor))
    if storage.has_tangent(x, *tensors):
        checks.keeps_tangents(x, *tensors)
        return True
    if recording:
        return torch._C._are_functorch_transforms_active() or not storage.recordable(x, *tensors)
    return not storage.dense(x, *tensors)


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapter: Adapter | None,
    *,
    dropout: Dropout | None = None,
    backend: str | None = None,
) -> Tensor:
    """x [..., K] → y [..., N] in x's dtype."""
    tensors = () if adapter is None else adapter.tensors()
    with _error_context("lora_linear", (x, weight, bias, _seed(dropout), *tensors), backend):
        rows = x.reshape(-1, x.shape[-1])
        acc = accumulate_dtype(rows, weight, *tensors)
        y = _base(rows, weight, bias, acc)
        if adapter is not None:
            with autocast.off(x.device):
                y = y + adapter_term(with_dropout(rows, dropout, acc), adapter, acc)[0]
        return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    bank: AnyBank,
    ids: Tensor,
    *,
    dropout: Dropout | None = None,
    backend: str | None = None,
) -> Tensor:
    """x [..., K], ids int32 [M] → y [..., N] in x's dtype."""
    adapters, columns = bank.adapters, bank.columns
    tensors = flat_tensors(adapters)
    count = len(adapters) // max(len(columns) - 1, 1)
    with _error_context("multi_lora_linear", (x, weight, bias, ids, _seed(dropout), *tensors), backend):
        rows = x.reshape(-1, x.shape[-1])
        acc = accumulate_dtype(rows, weight, *tensors)
        y, inputs = _base(rows, weight, bias, acc), with_dropout(rows, dropout, acc)
        ends = columns or (0, y.shape[-1])
        parts = [y[:, first:last] for first, last in itertools.pairwise(ends)]
        for entry, adapter in enumerate(adapters):
            if adapter is None:
                continue
            # masked before and after: an inf in one adapter must not reach the rows of others, in y or in a gradient
            row_mask = (ids == entry % count)[:, None]
            with autocast.off(x.device):
                term, _ = adapter_term(torch.where(row_mask, inputs, 0.0), adapter, acc)
            parts[entry // count] = parts[entry // count] + torch.where(row_mask, term, 0.0)
        y = torch.cat(parts, dim=1)
        return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def _base(rows: Tensor, weight: Tensor | None, bias: Tensor | None, acc: torch.dtype) -> Tensor:
    if weight is None or isinstance(weight, QuantizedWeight) or not storage.overrides_operations(weight):
        with autocast.off(rows.device):
            return base_term(rows, weight, bias, acc)
    y = functional.linear(rows, weight).to(acc)
    return y if bias is None else y + bias.to(acc)


def _seed(dropout: Dropout | None) -> Tensor | None:
    return None if dropout is None else dropout.seed


def _error_context(
    op: str, tensors: Sequence[Tensor | None], backend: str | None
) -> contextlib.AbstractContextManager[None]:
    """Adds to torch's errors which kind of tensor was passed. Raises BackendError if a backend is forced.

    Does nothing while torch.compile traces.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _explain_errors(op, tensors, backend)


@contextlib.contextmanager
def _explain_errors(op: str, tensors: Sequence[Tensor | None], backend: str | None) -> Iterator[None]:
    reasons = (storage.reason(tensor) for tensor in tensors if tensor is not None)
    got = next((why for why in reasons if why is not None), "a tensor with a tangent")
    forced = backend or choice.forced() or os.environ.get("PEFTK_BACKEND") or "reference"
    if forced != "reference":
        raise BackendError(f"backend {forced!r} was forced and cannot run {op}: it got {got}")
    if determinism.is_batch_invariant():
        raise BackendError(f"{op}: no backend can run this call with batch_invariant=True: it got {got}")
    try:
        yield
    except (RuntimeError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else RuntimeError
        raise kind(
            f"{op}: expected dense tensors, or tensors that torch can compute it with, got {got}: {error}"
        ) from error

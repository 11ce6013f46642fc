"""`peftk.explain`: which backend runs a call, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftk.backends import choice
from peftk.backends.call import LORA_LINEAR, OPS, Call, Op, Packing
from peftk.interop import peft_model
from peftk.system import autocast

_NAMES = tuple(map(str, OPS))


def explain(
    what: str | nn.Module,
    x: Tensor | None = None,
    *,
    M: int = 1,
    K: int = 4096,
    N: int = 4096,
    rank: int = 16,
    adapters: int = 1,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    dropout: bool = False,
    backend: str | None = None,
) -> Any:  # Choice, or Explanation for a model of HF PEFT
    """Which backend would run a call and why, and why the preferred ones would not. Computes nothing.

    Three ways to ask: `explain("lora_linear", M=64, K=4096, N=4096, dtype=torch.bfloat16)`; `explain(layer, x)` with a
    LoRALinear, a MultiLoRALinear or a LoRA layer of HF PEFT and an input (or M=); `explain(peft_model)` with a whole
    model of HF PEFT: which of its layers run on peftk's kernels, and which keep PEFT's own code and why.

    Args:
        what: lora_linear, multi_lora_linear, adapter_block, multi_adapter_block, one of these with _backward appended,
            merge, unmerge, or segments (the sort of a batch's ids, which depends on M and adapters only); or a layer or
            model as above.
        x: an input of the layer; None: M rows in the weight's dtype.
        M: rows of x (tokens); K: in_features; N: out_features; rank: the largest of the adapters; adapters: how many
            adapters the call has.
        dtype: of x; weight_dtype and adapter_dtype default to it. dropout: whether the call has dropout.
        backend: the backend to force; None uses PEFTK_BACKEND if it is set, as a call does.

    Returns:
        Choice: `.backend`, `.reason`, `.rejected`, `.kernel`; print it for a readable form. The backend "peft" is
            PEFT's own code.
        Explanation, for a whole model: `.peftk` maps what runs, and `.peft` why peftk does not, to names of layers.

    Raises:
        ValueError, TypeError: an unknown operation, a size out of range, or an unsupported layer.
        BackendError: the forced backend cannot run this call.
    """
    if isinstance(what, nn.Module) and peft_model.has_lora(what):
        return peft_model.explain(what, M if x is None else x.numel() // x.shape[-1], backend)
    if isinstance(what, nn.Module):
        call = _layer_call(what, x, M)
    else:
        if what not in _NAMES:
            raise ValueError(f"what: expected a layer or one of {', '.join(_NAMES)}, got {what!r}")
        for name, size, minimum in (
            ("M", M, 0),
            ("K", K, 1),
            ("N", N, 1),
            ("rank", rank, 0),
            ("adapters", adapters, 0),
        ):
            if size < minimum:
                raise ValueError(f"{name}: expected {minimum} or more, got {size}")
        call = Call(
            op=Op.parse(what),
            device=torch.device(device).type,
            x_dtype=dtype,
            weight_dtype=weight_dtype or dtype,
            adapter_dtype=adapter_dtype or dtype,
            M=M,
            K=K,
            N=N,
            rank=rank,
            adapters=adapters,
            dropout=dropout,
        )
    return choice.choose_and_describe(call, backend)


def _layer_call(layer: nn.Module, x: Tensor | None, M: int) -> Call:
    from peftk.nn import LoRALinear, MultiLoRALinear

    if isinstance(layer, LoRALinear):
        op, rank, adapters = LORA_LINEAR, 0 if layer.merged else layer.r, 0 if layer.merged else 1
        adapter_dtype: torch.dtype | None = layer.lora_A.dtype
        dropout = layer.training and layer.lora_dropout > 0 and not layer.merged
    elif isinstance(layer, MultiLoRALinear):
        present = [a for a in layer.bank.adapters if a is not None]
        op, rank = LORA_LINEAR._replace(many=True), max((a.rank for a in present), default=0)
        adapters = len(layer.bank.adapters)
        adapter_dtype = layer.bank.pool.dtype
        dropout = False
    else:
        raise TypeError(f"what: expected a LoRALinear, a MultiLoRALinear or an operation, got {type(layer).__name__}")
    weight = layer.matrix
    N, K = weight.shape
    x_dtype = weight.dtype if x is None else x.dtype
    cast = autocast.dtype_for(weight.device, x_dtype)
    return Call(
        op=op,
        device=weight.device.type,
        x_dtype=cast or x_dtype,
        weight_dtype=cast or weight.dtype,
        packing=Packing.of(weight),
        adapter_dtype=adapter_dtype,
        M=M if x is None else x.numel() // x.shape[-1],
        K=K,
        N=N,
        rank=rank,
        adapters=adapters,
        dropout=dropout,
    )

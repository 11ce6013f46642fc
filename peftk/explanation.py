"""`peftk.explain`: which backend runs a call, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftk.backends import choice
from peftk.backends.call import LORA_LINEAR, OPS, Call, Op
from peftk.interop import peft_model

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
) -> Any:  # Choice or Explanation, by what is asked
    """The backend that would run a call, why, and why the preferred ones would not. Nothing is computed.

    Three ways to ask: `explain("lora_linear", M=64, K=4096, N=4096, dtype=torch.bfloat16)`; `explain(layer, x)` with a
    LoRALinear, a MultiLoRALinear or a LoRA layer of HF PEFT and an input (or M=); `explain(peft_model)` with a whole
    model of HF PEFT: which of its layers run on peftk's kernels, and which keep PEFT's own code and why.

    Args:
        what: one of lora_linear, multi_lora_linear, adapter_block, multi_adapter_block, their _backward, merge,
            unmerge, segments (the sort of a batch's ids: of M and adapters alone); or a layer.
        M, K, N: tokens, in_features, out_features; rank: the largest; adapters: how many a batch mixes.
        dtype: of x; weight_dtype and adapter_dtype default to it.
        backend: what would be forced (else PEFTK_BACKEND is looked at, as in a call).

    Returns:
        Choice: `.backend`, `.reason`, `.rejected`; print it to read it. The backend "peft" is PEFT's own code.
        Explanation, of a whole model: `.peftk` and `.peft`, which map what runs, or why not, to names of layers.

    Raises:
        ValueError, TypeError: an unknown operation or layer.
        BackendError: the forced backend could not run this call.
    """
    if isinstance(what, nn.Module) and peft_model.has_lora(what):
        return peft_model.explain(what, M if x is None else x.numel() // x.shape[-1], backend)
    if isinstance(what, nn.Module):
        call = _of_layer(what, x, M)
    else:
        if what not in _NAMES:
            raise ValueError(f"what: expected a layer or one of {', '.join(_NAMES)}, got {what!r}")
        for name, size, least in (("M", M, 0), ("K", K, 1), ("N", N, 1), ("rank", rank, 0), ("adapters", adapters, 0)):
            if size < least:
                raise ValueError(f"{name}: expected {least} or more, got {size}")
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
    return choice.explained(call, backend)


def _of_layer(layer: nn.Module, x: Tensor | None, M: int) -> Call:
    from peftk.nn import LoRALinear, MultiLoRALinear

    if isinstance(layer, LoRALinear):
        op, rank, adapters = LORA_LINEAR, 0 if layer.merged else layer.r, 0 if layer.merged else 1
        adapter_dtype: torch.dtype | None = layer.lora_A.dtype
        dropout = layer.training and layer.lora_dropout > 0 and not layer.merged
    elif isinstance(layer, MultiLoRALinear):
        taken = [a for a in layer.bank.adapters if a is not None]
        op, rank = LORA_LINEAR._replace(many=True), max((a.rank for a in taken), default=0)
        adapters = len(layer.bank.adapters)
        adapter_dtype = layer.bank.pool.dtype
        dropout = False
    else:
        raise TypeError(f"what: expected a LoRALinear, a MultiLoRALinear or an operation, got {type(layer).__name__}")
    weight = layer.matrix
    N, K = weight.shape
    return Call(
        op=op,
        device=weight.device.type,
        x_dtype=weight.dtype if x is None else x.dtype,
        weight_dtype=weight.dtype,
        adapter_dtype=adapter_dtype,
        M=M if x is None else x.numel() // x.shape[-1],
        K=K,
        N=N,
        rank=rank,
        adapters=adapters,
        dropout=dropout,
    )

"""The same layer in other libraries, built with their own public functions and left at their defaults."""

from __future__ import annotations

import contextlib
import io
import math
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftk.system import extras


class UnavailableError(RuntimeError):
    """A peer cannot be had on this machine; the message says why."""


def has_peft() -> bool:
    return extras.installed("peft")


def peft_layer(linear: nn.Linear, adapters: Mapping[str, tuple[Tensor, Tensor]], scaling: float) -> Any:
    """HF PEFT's LoRA layer over `linear` (which it keeps, not copies), the first adapter active.

    PEFT holds adapters in fp32 over a 16-bit base, as it does by default. The layer is called itself, without the
    wrapper of a PeftModel, which would only add time.
    """
    import peft

    model: Any = None
    for name, (lora_A, lora_B) in adapters.items():
        rank = lora_A.shape[0]
        config = peft.LoraConfig(r=rank, lora_alpha=_alpha(scaling, rank), target_modules=["linear"])
        if model is None:
            model = peft.get_peft_model(_Holder(linear), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        layer = model.base_model.model.linear
        with torch.no_grad():
            layer.lora_A[name].weight.copy_(lora_A)
            layer.lora_B[name].weight.copy_(lora_B)
    return layer.eval()


def compiled_layer(linear: nn.Linear, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The plain layer, compiled here and now for x's shape by torch.compile with all that makes it fast on a CPU: its
    C++ GEMM templates autotuned against torch's own products, W frozen and packed. For inference mode.

    Raises UnavailableError where there is no C++ compiler, or the compilation fails.
    """
    import torch._inductor.config as inductor

    compiler = shlex.split(os.environ.get("CXX", "g++"))[0]
    if shutil.which(compiler) is None:
        raise UnavailableError(f"torch.compile needs a C++ compiler, {compiler!r} is not here (apt-get install g++)")
    torch._dynamo.reset()  # it compiles a function for eight shapes, and runs it uncompiled for the ninth
    # patched rather than given as options: those come after Dynamo, which must know of `freezing` before
    tuned = {"max_autotune": True, "freezing": True, "max_autotune_gemm_backends": "CPP,ATEN"}
    compiled: Callable[[Tensor], Tensor] = torch.compile(linear, fullgraph=True, dynamic=False)
    chatter = contextlib.redirect_stderr(io.StringIO())  # the autotuner's tables
    with torch.inference_mode(), inductor.patch(tuned), chatter:
        try:
            compiled(x)
        except RuntimeError as error:
            raise UnavailableError(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error
    return compiled


def _alpha(scaling: float, rank: int) -> int:
    alpha = scaling * rank
    if not math.isclose(alpha, round(alpha)):
        raise ValueError(f"scaling: expected scaling·rank to be whole, as PEFT's lora_alpha is, got {alpha}")
    return round(alpha)


class _Holder(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

"""The layers of other libraries to compare with, built with their public functions and default options."""

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
    """A peer is not available on this machine; the message says why."""


def has_peft() -> bool:
    return extras.is_installed("peft")


def peft_layer(linear: nn.Linear, adapters: Mapping[str, tuple[Tensor, Tensor]], scaling: float) -> Any:
    """HF PEFT's LoRA layer over `linear` (not a copy of it), with the first adapter active.

    Over a 16-bit base PEFT keeps adapters in fp32, its default. The layer is called directly, without the PeftModel
    around it, which would only add time.
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
    """The plain layer, compiled for x's shape by torch.compile with its fastest options for a CPU. For inference mode.

    The options: C++ GEMM templates, autotuned against torch's own products, and W frozen and packed.

    Raises UnavailableError if there is no C++ compiler, or if the compilation fails.
    """
    import torch._inductor.config as inductor

    torch._dynamo.reset()  # Dynamo compiles a function for eight shapes, and runs it uncompiled for a ninth
    # patched, because options passed to compile are applied after Dynamo, which already needs `freezing`
    tuned = {"max_autotune": True, "freezing": True, "max_autotune_gemm_backends": "CPP,ATEN"}
    with inductor.patch(tuned):
        return _compiled(linear, lambda layer: layer(x), fullgraph=True)


def compiled_model(model: nn.Module, run: Callable[[nn.Module], object]) -> Any:
    """The model, compiled by torch.compile as users call it, for the shapes that `run` passes. For inference mode.

    Raises UnavailableError if there is no C++ compiler, or if the compilation fails.
    """
    return _compiled(model, run)


def _compiled(module: nn.Module, run: Callable[[Any], object], *, fullgraph: bool = False) -> Any:
    compiler = shlex.split(os.environ.get("CXX", "g++"))[0]
    if shutil.which(compiler) is None:
        raise UnavailableError(
            f"torch.compile needs a C++ compiler, {compiler!r} is not installed (apt-get install g++)"
        )
    compiled = torch.compile(module, fullgraph=fullgraph, dynamic=False)
    chatter = contextlib.redirect_stderr(io.StringIO())  # hides the autotuner's tables
    with torch.inference_mode(), chatter:
        try:
            run(compiled)
        except RuntimeError as error:
            raise UnavailableError(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error
    return compiled


def _alpha(scaling: float, rank: int) -> int:
    alpha = scaling * rank
    if not math.isclose(alpha, round(alpha)):
        raise ValueError(f"scaling: expected scaling·rank to be an integer, as PEFT's lora_alpha is, got {alpha}")
    return round(alpha)


class _Holder(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

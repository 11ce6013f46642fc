"""Reads an HF PEFT LoRA layer: the tensors for our kernels, or the reason (a text) why PEFT's own code must run.

This happens in every call, since users may change layers between calls in any way, so these are plain, fast look-ups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_KERNELS_HAVE = frozenset((torch.float32, torch.bfloat16, torch.float16))
_TENSORS = frozenset((nn.Parameter, Tensor))  # exact types: subclasses may compute differently

Base = tuple[Tensor, Tensor | None]  # weight [N, K] (for a Conv1D its transposed view), bias [N]


class Factors(NamedTuple):
    """The tensors of one adapter, not copied: s · (dropout(x) Aᵀ Bᵀ + β). scaling is a tensor if PEFT made it one."""

    lora_A: Tensor
    lora_B: Tensor
    bias_B: Tensor | None
    scaling: float | Tensor
    dropout_p: float

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.lora_A, self.lora_B, self.bias_B


def hooked(module: nn.Module) -> bool:
    """Whether a call does more than the forward of the module's class."""
    own = module.__dict__
    return bool(
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def base(module: nn.Module) -> Base | str:
    """W and the bias of a base layer, to read and to merge into, or the reason why not."""
    kind = type(module)
    transposed = kind is Conv1D
    if kind is not nn.Linear and not transposed and not _linear(kind):
        return f"the base layer is a {kind.__name__}, not an nn.Linear or Conv1D"
    parameters = module._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias", module)
    if type(weight) not in _TENSORS:
        return "the base layer's weight is computed" if weight is None else f"the weight is a {type(weight).__name__}"
    if weight.dtype not in _KERNELS_HAVE:  # type: ignore[union-attr]
        return f"the base layer is {_short(weight)}"
    if not (weight.is_cpu or weight.is_cuda):  # type: ignore[union-attr]
        return f"peftk has no kernels for {_short(weight)}"
    if weight.dim() != 2:  # type: ignore[union-attr]
        return f"the base layer's weight has the shape {list(weight.shape)}"  # type: ignore[union-attr]
    if bias is not None:
        if type(bias) not in _TENSORS:
            return "the base layer's bias is computed or of a type of its own"
        if bias.dtype not in _KERNELS_HAVE or not _same_device(bias, weight):  # type: ignore[arg-type]
            return f"the base layer's bias is {_short(bias)}"
    return (weight.t() if transposed else weight), bias  # type: ignore[union-attr,return-value]


def _same_device(first: Tensor, second: Tensor) -> bool:
    """`first.device == second.device`, in half the time."""
    return first.is_cpu == second.is_cpu and first.get_device() == second.get_device() and not first.is_meta


def _short(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _linear(kind: type[nn.Module]) -> bool:
    """Whether a subclass computes what nn.Linear does. (MultiheadAttention does not call its out_proj at all.)"""
    mha = nn.modules.linear.NonDynamicallyQuantizableLinear
    return issubclass(kind, nn.Linear) and kind.forward is nn.Linear.forward and kind is not mha


def callable_base(module: nn.Module) -> Base | str:
    """`base` if our kernels can run a call of the base layer, or the reason why not."""
    found = base(module)
    if isinstance(found, str):
        return found
    if hooked(module):
        return "the base layer has hooks or a forward of its own"
    if found[0].requires_grad:
        return "the base layer's weight trains"
    return found


def why_not(x: Any, weight: Tensor, *, casts: bool) -> str | None:
    """Why our kernels cannot take x; None if they can. casts: PEFT's switch `cast_input_dtype_enabled`."""
    if type(x) not in _TENSORS:
        return f"x is a {type(x).__name__}"
    if x.dtype is not weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"x is {x.dtype} and the base layer {weight.dtype}"  # with PEFT's code, torch raises
    if not casts:
        return "casting of x is switched off"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    return None


def factors(layer: Any, name: str, weight: Tensor) -> Factors | str | None:
    """An adapter of the layer, None if the layer has none of this name, or the reason why PEFT's own code must run."""
    modules = layer._modules
    down = modules["lora_A"]._modules.get(name)
    if down is None:
        return None
    up, dropout = modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} is not plain LoRA"
    if type(down) is not nn.Linear or type(up) is not nn.Linear:
        return f"lora_A and lora_B are {type(down).__name__} and {type(up).__name__}"
    if hooked(down) or hooked(up) or hooked(dropout):
        return "lora_A, lora_B or lora_dropout have hooks or a forward of their own"
    dropout_p = 0.0
    if type(dropout) is nn.Dropout:
        dropout_p = float(dropout.p) if dropout.training else 0.0
        if dropout_p >= 1.0:
            return "dropout leaves nothing"
    elif type(dropout) is not nn.Identity:
        return f"lora_dropout is a {type(dropout).__name__}"
    lora_A, lora_B, bias_B = down._parameters.get("weight"), up._parameters.get("weight"), up._parameters.get("bias")
    if type(lora_A) not in _TENSORS or type(lora_B) not in _TENSORS:
        return "lora_A or lora_B is computed or of a type of its own"
    dtype = lora_A.dtype  # type: ignore[union-attr]
    if dtype not in _KERNELS_HAVE or lora_B.dtype is not dtype:  # type: ignore[union-attr]
        return f"lora_A is {_short(lora_A)}, lora_B {_short(lora_B)}"
    if not _same_device(lora_A, weight) or not _same_device(lora_B, weight):  # type: ignore[arg-type]
        return f"lora_A is {_short(lora_A)}, lora_B {_short(lora_B)}, the base layer {_short(weight)}"
    if bias_B is not None and (
        type(bias_B) not in _TENSORS or bias_B.dtype is not dtype or not _same_device(bias_B, weight)
    ):
        return f"lora_B's bias is {_short(bias_B)}"
    if "bias" not in up._parameters or down._parameters.get("bias") is not None:
        return "lora_A has a bias, or lora_B's is computed"
    return Factors(lora_A, lora_B, bias_B, layer.scaling[name], dropout_p)  # type: ignore[arg-type]

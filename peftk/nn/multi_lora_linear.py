"""MultiLoRALinear: a drop-in nn.Linear in which every token may use another adapter, of another rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftk import checks, functional, route
from peftk.bank import AdapterBank


class MultiLoRALinear(nn.Module):
    """y[m] = x[m]Wᵀ + bias + s_i · act(x[m]A_iᵀ + a_i) B_iᵀ + β_i, i = ids[m]; -1 is the base layer alone.

    Adapters come and go by name (`add_adapter`, `remove_adapter`); `adapter_id(name)` is the number that ids hold.
    Served adapters are copied into a paged bank, which follows `.to()` but is no part of the state_dict (they are
    loaded from their own files); adapters added with trainable=True are Parameters of this module, and one batch may
    train any number of them.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        max_adapters: int,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.base(weight.detach(), None if bias is None else bias.detach())
        self.out_features, self.in_features = weight.shape
        dtype = adapter_dtype or weight.dtype
        self.bank = AdapterBank(self.in_features, self.out_features, max_adapters, dtype, weight.device)
        self.weight = weight.requires_grad_(False)
        self.bias = None if bias is None else bias.requires_grad_(False)
        self.trained = nn.ModuleDict()
        self._checkpointed_ids: Tensor | None = None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, max_adapters: int = 64, adapter_dtype: torch.dtype | None = None
    ) -> MultiLoRALinear:
        """The layer that replaces `linear`; adapters are held in adapter_dtype, None meaning the weight's.

        Raises TypeError or ValueError for what is not an nn.Linear or a bad number; `linear` is unchanged then.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        layer = cls(linear.weight, linear.bias, max_adapters=max_adapters, adapter_dtype=adapter_dtype)
        return layer.train(linear.training)

    def add_adapter(
        self,
        name: str,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        scaling: float = 1.0,
        *,
        bias: Tensor | None = None,
        activation: str = "identity",
        bias_A: Tensor | None = None,
        trainable: bool = False,
        slot: int | None = None,
    ) -> int:
        """Adds `s·act(xAᵀ + a)Bᵀ + β` under a name and returns its number.

        Args:
            lora_A: A [R, K]; lora_B: B [N, R], any R ≥ 1; both None for an adapter that is only a bias.
            scaling: s, dimensionless. bias: β [N]. bias_A: a [R]. activation: see `peftk.functional.lora_linear`.
            trainable: keep the tensors as Parameters of this module (under `trained`) rather than in the bank.
            slot: the number to take; None takes the first free one.

        Raises:
            ValueError, TypeError: a name in use, a full bank, or tensors that do not fit; nothing has changed then.
        """
        bank = self.bank
        tensors = {"lora_A": lora_A, "lora_B": lora_B, "bias_A": bias_A, "bias_B": bias}
        kwargs: dict[str, Any] = {"activation": activation, "slot": slot, "in_place": trainable}
        parameters = None
        if trainable:
            bank.free_slot(name)
            checks.adapter(self.weight, lora_A, lora_B, scaling, activation, bias_A, bias)
            parameters = _AdapterParameters(tensors, bank.pool.dtype, bank.pool.device)
            tensors = {key: getattr(parameters, key) for key in tensors}
        number = bank.add(
            name,
            tensors["lora_A"],
            tensors["lora_B"],
            scaling,
            **kwargs,
            bias_A=tensors["bias_A"],
            bias_B=tensors["bias_B"],
        )
        if parameters is not None:
            self.trained[_module_name(number)] = parameters
        return number

    def remove_adapter(self, name: str) -> None:
        """Forgets an adapter and frees its slot and pages. Raises ValueError for an unknown name."""
        number = self.adapter_id(name)
        self.bank.remove(name)
        if _module_name(number) in self.trained:
            del self.trained[_module_name(number)]

    def adapter_id(self, name: str) -> int:
        """The number that ids hold for this adapter. Raises ValueError for an unknown name."""
        return self.bank.number(name)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """x [..., K] → y [..., N]. ids: int32 or int64, x.shape[:-1] (per token) or x.shape[:1] (per sequence).

        Without ids, those of the enclosing `MultiAdapter.route`; outside of one, the base layer alone.
        """
        if ids is None:
            ids = self._routed_ids(x)
        if ids is None:
            return functional.lora_linear_unchecked(x, self.weight, self.bias, None, None, 1.0)
        return functional.multi_lora_linear_unchecked(x, self.weight, self.bias, self.bank, ids)

    def _routed_ids(self, x: Tensor) -> Tensor | None:
        current = route.current()
        if current is not None:
            ids = current.rows(x)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._checkpointed_ids = ids
            return ids
        # activation checkpointing runs the layer again during the backward, where the `with` may have ended
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return self._checkpointed_ids
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiLoRALinear:
        super()._apply(fn, recurse)
        self.bank.apply(fn)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"adapters={len(self.bank.names)} of {len(self.bank.slots)}"
        )


class _AdapterParameters(nn.Module):
    """The trainable tensors of one adapter."""

    def __init__(self, tensors: dict[str, Tensor | None], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if tensor is None:
                parameter = None
            elif isinstance(tensor, nn.Parameter) and tensor.dtype == dtype and tensor.device == device:
                parameter = tensor
            else:
                parameter = nn.Parameter(tensor.detach().to(device, dtype, copy=True).contiguous())
            self.register_parameter(name, parameter)


def _module_name(number: int) -> str:
    # names of adapters may hold dots, which names of modules may not
    return f"slot{number}"

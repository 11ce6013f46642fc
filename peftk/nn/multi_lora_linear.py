"""MultiLoRALinear: a drop-in nn.Linear in which every token may use a different adapter, of a different rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftk.adapters import checks, route
from peftk.adapters.adapter import Adapter
from peftk.adapters.bank import AdapterBank
from peftk.adapters.table import AdapterTable, in_rows
from peftk.nn.frozen_linear import FrozenLinear, linear_shape
from peftk.nn.parameters import param
from peftk.nn.replace import as_linear, fan_in_fan_out, take_place
from peftk.ops import layer_calls
from peftk.system.lasting import lasting


class MultiLoRALinear(FrozenLinear):
    """y[m] = x[m]Wᵀ + bias + s_i · act(x[m]A_iᵀ + a_i) B_iᵀ + β_i with i = ids[m]; -1 is the base layer alone.

    Adapters are added and removed by name (`add_adapter`, `remove_adapter`); `adapter_id(name)` is the number to put in
    ids. Adapters for inference are copied into a paged bank, which follows `.to()` but is not part of the state_dict
    (they have files of their own). Adapters added with trainable=True are Parameters of this module, and one batch may
    train any number of them. Precision: `peftk.functional.multi_lora_linear`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        max_adapters: int,
        adapter_dtype: torch.dtype | None = None,
        max_rank: int | None = None,
        fan_in_fan_out: bool = False,
    ) -> None:
        N, K = linear_shape(weight, bias, fan_in_fan_out)
        dtype = weight.dtype if adapter_dtype is None else adapter_dtype
        checks.adapter_dtype(dtype, weight.dtype)
        bank = AdapterBank(K, N, max_adapters, dtype, weight.device, max_rank=max_rank)
        super().__init__(weight, bias, fan_in_fan_out=fan_in_fan_out)
        self.bank = bank
        self.trained = nn.ModuleDict()
        # set by a MultiAdapter, whose routes apply when no ids are passed, and what it knows of x (`adapters.route`)
        self.server_key: route.ServerKey | None = None
        self.batch_dim: int | None = None
        self.unclear_module: str | None = None
        self.row_order_checked = False

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        max_adapters: int = 64,
        adapter_dtype: torch.dtype | None = None,
        max_rank: int | None = None,
    ) -> MultiLoRALinear:
        """The layer that replaces `linear` (nn.Linear or Conv1D).

        adapter_dtype: dtype in which adapters are stored; None means the weight's. max_rank: the largest rank that may
        be added, for which a CUDA graph then has room; None for any (`docs/routes.md`).

        Raises TypeError or ValueError for any other module, a bad dtype or a bad number; `linear` is unchanged then.
        """
        base = as_linear(linear)
        layer = cls(
            base.weight,
            base.bias,
            max_adapters=max_adapters,
            adapter_dtype=adapter_dtype,
            max_rank=max_rank,
            fan_in_fan_out=fan_in_fan_out(linear),
        )
        return take_place(layer, linear)

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
        """Adds the adapter `s·act(xAᵀ + a)Bᵀ + β` under a name and returns its number.

        Args:
            name: any non-empty string that is not in use.
            lora_A: A [R, K]; lora_B: B [N, R]; any R ≥ 1. Both None for an adapter that is only a bias.
            scaling: s, no unit. bias: β [N]. bias_A: a [R]. activation: see `peftk.functional.lora_linear`.
            trainable: keep the tensors as Parameters of this module (under `trained`) instead of in the bank.
            slot: the number to use; None takes one that no adapter of this layer has had.

        Raises:
            ValueError, TypeError: a name in use, a full bank, or tensors that do not fit; nothing has changed then.
        """
        if not trainable:
            return self.bank.add(
                name, lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias, slot=slot
            )
        number = self.bank.free_number(name, slot)
        checks.adapter_shapes(
            self.out_features,
            self.in_features,
            lora_A,
            lora_B,
            scaling,
            activation=activation,
            bias_A=bias_A,
            bias_B=bias,
        )
        parameters = _TrainedAdapter(scaling, activation)
        for key, tensor in (("lora_A", lora_A), ("lora_B", lora_B), ("bias_A", bias_A), ("bias_B", bias)):
            parameters.register_parameter(key, _parameter(key, tensor, self.bank.dtype, self.bank.device))
        self.bank.lend(name, parameters.adapter, number)
        self.trained[self._module_name(number)] = parameters
        return number

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter and frees its slot and pages. Raises ValueError for an unknown name."""
        number = self.adapter_id(name)
        self.bank.remove(name)
        if self._module_name(number) in self.trained:
            del self.trained[self._module_name(number)]

    def adapter_id(self, name: str) -> int:
        """The adapter's number for ids; no later adapter gets the same. Raises ValueError for an unknown name."""
        return self.bank.number(name)

    def _module_name(self, number: int) -> str:
        # adapters' names may contain dots, modules' names may not
        return f"slot{number % len(self.bank.slots)}"

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """x [..., K] → y [..., N]. ids: int32 or int64 of shape x.shape[:-1] (per token) or x.shape[:1] (per sequence).

        Without ids, the enclosing `MultiAdapter.route` gives them; outside of a route, the base layer runs alone.
        Raises as `peftk.functional.multi_lora_linear`, and ValueError for rows that do not fit the route.
        """
        bank: AdapterBank | AdapterTable = self.bank
        weight, bias, routed = self.matrix, param(self, "bias"), None
        if ids is not None:
            ids = layer_calls.slots_of(self.bank, ids) if self.bank.translates else ids
        elif self.server_key is not None:
            y = layer_calls.routed_linear(self, self.server_key, x, weight, bias)
            if y is not None:
                return y
            checks.stored("x", x)
            routed = route.rows(self, self.server_key, x)
            if routed is not None:
                ids, bank = routed.slots, routed.bank
        if ids is None:
            return layer_calls.base_linear(x, weight, bias)
        if weight.shape != (self.out_features, self.in_features):  # someone may have replaced it, but not the pages
            raise ValueError(
                f"weight: expected [{self.out_features}, {self.in_features}] as when the layer was made, "
                f"got {list(weight.shape)}"
            )
        y = layer_calls.multi_lora_linear(x, weight, bias, bank, ids)
        if routed is not None and routed.order is not None:
            routed.order.record_layer(x, y)
        return y

    def serve(self, server_key: route.ServerKey, model: nn.Module, name: str) -> None:
        """Makes the routes of a server apply to this layer, which is about to become `name` in the server's model."""
        self.server_key = server_key
        names = name.split(".")[:-1]
        around = [model.get_submodule(".".join(names[:n])) for n in range(len(names), -1, -1)]
        self.batch_dim, self.unclear_module = route.batch_dim_of(around)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiLoRALinear:
        self.bank.apply(fn)  # first, as it may refuse
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, adapters={len(self.bank.names)} of {len(self.bank.slots)}"


class _TrainedAdapter(nn.Module):
    """The Parameters of one trainable adapter."""

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    bias_A: nn.Parameter | None
    bias_B: nn.Parameter | None

    adapter_parameters = ("lora_A", "lora_B", "bias_A", "bias_B")

    def __init__(self, scaling: float, activation: str) -> None:
        super().__init__()
        self.scaling, self.activation = float(scaling), activation

    def adapter(self) -> Adapter:
        lora_A, lora_B, bias_A, bias_B = [param(self, name) for name in self.adapter_parameters]
        pages_A, pages_B = (() if lora_A is None else (in_rows(lora_A),)), (() if lora_B is None else (lora_B,))
        bias_A, bias_B = bias_A if bias_A is None else in_rows(bias_A), bias_B if bias_B is None else in_rows(bias_B)
        return Adapter(pages_A, pages_B, self.scaling, self.activation, bias_A, bias_B)


@lasting()
def _parameter(name: str, tensor: Tensor | None, dtype: torch.dtype, device: torch.device) -> nn.Parameter | None:
    """`tensor` itself if it is a Parameter of this dtype and device, else a new Parameter with its values."""
    if tensor is None:
        return None
    fits = tensor.dtype == dtype and tensor.device == device and not tensor.is_inference()
    if isinstance(tensor, nn.Parameter) and fits:
        return tensor
    if device.type != "meta":
        checks.dense(name, tensor)
    return nn.Parameter(tensor.detach().to(device, dtype, copy=True).contiguous())

"""A bank that holds this rank's part of every adapter of a sharded `MultiLoRALinear`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from peftk.adapters import checks
from peftk.adapters.adapter import Adapter
from peftk.adapters.bank import AdapterBank
from peftk.distributed.layout import ROWWISE, Layout, complete, distribute, local, range_of, role_of
from peftk.distributed.view import view
from peftk.nn.multi_lora_linear import MultiLoRALinear


class ShardedBank(AdapterBank):
    """An `AdapterBank` of a layer that is split: it takes whole adapters and keeps this rank's part of each.

    Every rank must add the same adapters in the same order. The numbers are those of the bank that it replaces.
    """

    def __init__(self, layer: MultiLoRALinear, mesh: DeviceMesh, layout: Layout, source: int | None) -> None:
        whole = layer.bank
        N, K = whole.shape
        self.whole_shape, self.mesh, self.layout, self.source = (N, K), mesh, layout, source
        self.ranges = {0: range_of(N, mesh), 1: range_of(K, mesh)}
        split_N = layout.dims["weight"] == 0
        out, inputs = (self.ranges[0], None) if split_N else (None, self.ranges[1])
        super().__init__(
            K if inputs is None else inputs.last - inputs.first,
            N if out is None else out.last - out.first,
            len(whole.slots),
            whole.dtype,
            whole.device,
            max_rank=whole.max_rank,
        )
        self._take_over(whole)

    def _take_over(self, whole: AdapterBank) -> None:
        names = {number: name for name, number in whole.names.items()}
        for slot, found in enumerate(whole.slots):
            number = whole.numbers[slot]
            if found is None:
                continue
            name = names.get(number, "unloaded")
            if isinstance(found, Adapter):
                self.copy(name, found, number)
            else:
                self.lend(name, found, slot)
                self.names[name] = self.numbers[slot] = number
            if number not in names:
                self.forget(name)
        self._next = list(whole._next)
        self.reused, self.translates = whole.reused, self.translates or whole.translates

    def add(
        self,
        name: str,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        scaling: float,
        *,
        activation: str = "identity",
        bias_A: Tensor | None = None,
        bias_B: Tensor | None = None,
        slot: int | None = None,
        number: int | None = None,
    ) -> int:
        """As `AdapterBank.add`, for a whole adapter A [R, K], B [N, R]."""
        N, K = self.whole_shape
        checks.adapter_shapes(N, K, lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias_B)
        for key, tensor in (("lora_A", lora_A), ("lora_B", lora_B), ("bias_A", bias_A), ("bias_B", bias_B)):
            if tensor is not None and self.device.type != "meta":
                checks.dense(key, tensor)
        layout = self._layout_of(activation)
        return super().add(
            name,
            self._part("lora_A", lora_A, layout),
            self._part("lora_B", lora_B, layout),
            scaling,
            activation=activation,
            bias_A=self._part("bias_A", bias_A, layout),
            bias_B=self._part("bias_B", bias_B, layout),
            slot=slot,
            number=number,
        )

    def keep(self, name: str, adapter: Adapter, number: int) -> None:
        """As `AdapterBank.keep`, for a whole adapter: this rank's part of it is copied."""
        self.copy(name, adapter, number)

    def lend(self, name: str, adapter: Callable[[], Adapter], slot: int | None = None) -> int:
        """As `lend` of banks; `adapter` is a method of the module whose Parameters it reads, which are distributed."""
        owner = getattr(adapter, "__self__", None)
        if not isinstance(owner, nn.Module):
            raise TypeError(f"adapter: expected a method of a module with the Parameters, got {adapter!r}")
        self.free_number(name, slot)
        layout = self._layout_of(adapter().activation)
        before = dict(owner._parameters)
        try:
            for key, parameter in before.items():
                if parameter is not None:
                    owner._parameters[key] = distribute(
                        parameter, self.mesh, self.layout.dims[role_of(key)], self.source
                    )
            return super().lend(name, functools.partial(_local_adapter, owner, layout), slot)
        except BaseException:
            owner._parameters.update(before)
            raise

    def _layout_of(self, activation: str) -> Layout:
        """What follows a sum and an activation in a row-parallel layer is the same on every rank (`mixed.py`)."""
        return complete(self.layout) if self.layout is ROWWISE and activation != "identity" else self.layout

    def _part(self, role: str, tensor: Tensor | None, layout: Layout) -> Tensor | None:
        """This rank's part of one tensor of an adapter."""
        if tensor is None:
            return None
        if role in layout.first and self.mesh.get_local_rank() != 0:
            return torch.zeros_like(tensor)
        dim = layout.dims[role]
        if dim is None:
            return tensor
        return self.ranges[1 if role == "lora_A" else 0].of(tensor, dim)


def _local_adapter(owner: Any, layout: Layout) -> Adapter:
    found: Adapter = view(owner, lambda tensor, name: local(tensor, layout, role_of(name))).adapter()
    return found

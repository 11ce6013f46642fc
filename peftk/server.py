"""MultiAdapter: many LoRAs of one model, served in one batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from peftk import checks
from peftk import route as routes
from peftk.interop import peft_checkpoint
from peftk.interop.peft_checkpoint import CheckpointError, LoadedAdapter
from peftk.methods.plan import replace_module
from peftk.nn import MultiLoRALinear
from peftk.nn.replace import bypassed, fan_in_fan_out, replaceable


class MultiAdapter:
    """Serves up to `max_adapters` LoRA checkpoints on one base model; every sequence of a batch names its own.

        server = peftk.MultiAdapter(model, max_adapters=256)
        server.load("alice", "alice/")
        with server.route(["alice", None]):
            out = model(**batch)

    Linears become MultiLoRALinear in place, when the first checkpoint that has them is loaded; outside of `route`, and
    for None, the model computes what it did. adapter_dtype: in which adapters are held; None means each weight's own.
    """

    def __init__(self, model: nn.Module, *, max_adapters: int = 64, adapter_dtype: torch.dtype | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        if not isinstance(max_adapters, int) or isinstance(max_adapters, bool) or max_adapters < 1:
            raise ValueError(f"max_adapters: expected an integer of 1 or more, got {max_adapters!r}")
        if adapter_dtype is not None:
            checks.adapter_dtype(adapter_dtype)
        self.model = model
        self.max_adapters = max_adapters
        self.adapter_dtype = adapter_dtype
        self._slots: dict[str, int] = {}
        self._layers: dict[str, MultiLoRALinear] = {}

    @property
    def names(self) -> list[str]:
        """The adapters that can be routed to, in the order in which they were loaded."""
        return list(self._slots)

    def load(self, name: str, path: str | os.PathLike[str]) -> None:
        """Loads an HF PEFT LoRA checkpoint under a name.

        Raises ValueError for a name in use or when `max_adapters` are loaded, CheckpointError for a checkpoint that is
        damaged or does not fit the model. Every other adapter goes on serving; nothing has changed then.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"name: expected a non-empty string, got {name!r}")
        if name in self._slots:
            raise ValueError(f"name: expected a new one, got {name!r}, which is loaded; unload it first")
        slot = next((s for s in range(self.max_adapters) if s not in self._slots.values()), None)
        if slot is None:
            raise ValueError(f"max_adapters: expected a free place, got {self.max_adapters} adapters loaded already")
        adapters = peft_checkpoint.load(path)
        for module, adapter in adapters.items():
            self._check(module, adapter, path)
        layers = {module: self._layer(module) for module in adapters}
        # all is checked: from here on only memory can run out, and then every layer forgets the name again
        everywhere = {**self._layers, **layers}
        try:
            for module, layer in everywhere.items():
                found = adapters.get(module)
                # a layer that this checkpoint leaves alone gets an adapter that adds nothing
                factors = (None, None, 1.0) if found is None else (found.lora_A, found.lora_B, found.scaling)
                layer.add_adapter(name, *factors, slot=slot)
        except BaseException:
            for layer in everywhere.values():
                if name in layer.bank.names:
                    layer.remove_adapter(name)
            raise
        for module, layer in layers.items():
            if module not in self._layers:
                for other, other_slot in self._slots.items():
                    layer.add_adapter(other, None, None, slot=other_slot)
                replace_module(self.model, module, layer)
                self._layers[module] = layer
        self._slots[name] = slot

    def unload(self, name: str) -> None:
        """Forgets an adapter and frees its memory. Raises ValueError for an unknown name."""
        self._slot(name)
        for layer in self._layers.values():
            layer.remove_adapter(name)
        del self._slots[name]

    def ids(self, names: Sequence[str | None]) -> Tensor:
        """int32 [B]: the numbers that stand for these names; None is -1. Raises ValueError for an unknown name."""
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f"names: expected one name or None per sequence, got {names!r}")
        return torch.tensor([-1 if name is None else self._slot(name) for name in names], dtype=torch.int32)

    @contextlib.contextmanager
    def route(self, names: Sequence[str | None] | Tensor) -> Iterator[None]:
        """Within the `with`, sequence b of every batch goes through the adapter names[b]; None: the base model.

        names: one name or None a sequence; or ids, int32/int64, per sequence [B] or per token [B, T] (`ids` makes
        them from names). A model that is called with a multiple of B sequences (generate() expands beams) repeats
        each. Raises ValueError for unknown names, before the model runs.

        Ids are read when the `with` begins. A CUDA graph reads a tensor of ids on the model's device anew in every
        replay, and should capture the `with` too, so that it sorts the ids once for all layers; names are its constants
        and are given before the capture (`peftk.route.Route`).
        """
        ids = names if isinstance(names, Tensor) else self.ids(names)
        if ids.dtype not in (torch.int32, torch.int64) or ids.dim() not in (1, 2):
            raise TypeError(
                f"names: expected ids int32 or int64 of shape [B] or [B, T], got {ids.dtype} {list(ids.shape)}"
            )
        device = next((layer.weight.device for layer in self._layers.values()), ids.device)
        with routes.routed(ids.to(device)):
            yield

    def _slot(self, name: str) -> int:
        if not isinstance(name, str) or name not in self._slots:
            raise ValueError(f"name: expected a loaded adapter ({', '.join(self._slots) or 'none'}), got {name!r}")
        return self._slots[name]

    def _check(self, module: str, adapter: LoadedAdapter, path: str | os.PathLike[str]) -> None:
        """Raises CheckpointError where the model has no linear of this name and shape."""
        try:
            found = self.model.get_submodule(module)
        except AttributeError as error:
            raise CheckpointError(f"{path}: expected modules that the model has, got {module!r}") from error
        if isinstance(found, MultiLoRALinear) and self._layers.get(module) is not found:
            raise CheckpointError(f"{path}: {module}: expected a linear of this server's, got another server's layer")
        if not isinstance(found, MultiLoRALinear):
            try:
                replaceable(found)
            except TypeError as error:
                raise CheckpointError(f"{path}: {module}: {error}") from error
        if bypassed(found):
            raise CheckpointError(f"{path}: {module}: expected a linear that is called, got one that MHA reads itself")
        turned = found.fan_in_fan_out if isinstance(found, MultiLoRALinear) else fan_in_fan_out(found)
        weight = cast(Tensor, found.weight)
        N, K = weight.t().shape if turned else weight.shape
        if adapter.lora_A.shape[1] != K or adapter.lora_B.shape[0] != N:
            raise CheckpointError(
                f"{path}: {module}: expected lora_A [R, {K}] and lora_B [{N}, R], "
                f"got {list(adapter.lora_A.shape)} and {list(adapter.lora_B.shape)}"
            )
        dtype = self.adapter_dtype or cast(Tensor, found.weight).dtype
        if not all(bool(factor.to(dtype).isfinite().all()) for factor in (adapter.lora_A, adapter.lora_B)):
            raise CheckpointError(f"{path}: {module}: expected factors that {dtype} holds, got larger ones")

    def _layer(self, module: str) -> MultiLoRALinear:
        """The layer that serves `module`: the one in place, or a new one that nothing refers to yet."""
        if module in self._layers:
            return self._layers[module]
        layer = MultiLoRALinear.from_linear(
            self.model.get_submodule(module), max_adapters=self.max_adapters, adapter_dtype=self.adapter_dtype
        )
        layer.served = True
        return layer

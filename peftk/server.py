"""MultiAdapter: many LoRAs of one model, served in one batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftk import checks
from peftk import route as routes
from peftk.interop import files, fitting, peft_checkpoint
from peftk.interop.files import CheckpointError
from peftk.interop.peft_checkpoint import LoadedCheckpoint
from peftk.methods import trial
from peftk.methods.plan import replace_module, unwrapped, without_peft
from peftk.nn import MultiLoRALinear
from peftk.nn.replace import replaceable
from peftk.nn.watched import watch


class _Served(NamedTuple):
    """What one linear adds for an adapter: s·BAx + β."""

    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float
    bias: Tensor | None


_NOTHING = _Served(None, None, 1.0, None)


class MultiAdapter:
    """Serves up to `max_adapters` LoRA checkpoints on one base model; every sequence of a batch names its own.

        server = peftk.MultiAdapter(model, max_adapters=256)
        server.load("alice", "alice/")
        with server.route(["alice", None]):
            out = model(**batch)

    Linears become MultiLoRALinear in place, when the first checkpoint that has them is loaded; outside of `route`, and
    for None, the model computes what it did. adapter_dtype: in which adapters are held; None means each weight's own.
    example_inputs: as `peftk.inject`'s, to see which linears the model calls.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_adapters: int = 64,
        adapter_dtype: torch.dtype | None = None,
        example_inputs: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        without_peft(model)
        if not isinstance(max_adapters, int) or isinstance(max_adapters, bool) or max_adapters < 1:
            raise ValueError(f"max_adapters: expected an integer of 1 or more, got {max_adapters!r}")
        if adapter_dtype is not None:
            checks.adapter_dtype(adapter_dtype)
        self.model = model
        self._base = unwrapped(model)
        self.max_adapters = max_adapters
        self.adapter_dtype = adapter_dtype
        self._slots: dict[str, int] = {}
        self._layers: dict[str, MultiLoRALinear] = {}
        if example_inputs is not None:
            with trial.looking(self._base, example_inputs):
                trial.seen(self._base)

    @property
    def names(self) -> list[str]:
        """The adapters that can be routed to, in the order in which they were loaded."""
        return list(self._slots)

    def load(self, name: str, path: str | os.PathLike[str]) -> None:
        """Loads an HF PEFT LoRA checkpoint under a name.

        A trained bias is served as its difference from the model's, β = trained − base, taken in fp64 and rounded once
        to the dtype in which adapters are held; lora_bias as s·b. Modules that train whole (modules_to_save) and
        trained biases of anything but linears (LayerNorms) cannot be mixed by token and are refused.

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
        with trial.looking(self._base):
            adapters = self._served(peft_checkpoint.load(path))
            layers = {module: self._layer(module) for module in adapters}
        # all is checked: from here on only memory can run out, and then every layer forgets the name again
        everywhere = {**self._layers, **layers}
        try:
            for module, layer in everywhere.items():
                # a layer that this checkpoint leaves alone gets an adapter that adds nothing
                found = adapters.get(module, _NOTHING)
                layer.add_adapter(name, found.lora_A, found.lora_B, found.scaling, bias=found.bias, slot=slot)
        except BaseException:
            for layer in everywhere.values():
                if name in layer.bank.names:
                    layer.remove_adapter(name)
            raise
        for module, layer in layers.items():
            if module not in self._layers:
                for other, other_slot in self._slots.items():
                    layer.add_adapter(other, None, None, slot=other_slot)
                replace_module(self._base, module, layer)
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

    def _served(self, loaded: LoadedCheckpoint) -> dict[str, _Served]:
        """What each linear of the model gets. Raises CheckpointError where the checkpoint does not fit the model."""
        path, dtype = loaded.path, self.adapter_dtype
        modules = {files.plain_name(name): (name, module) for name, module in self._base.named_modules()}
        for name in (*loaded.adapters, *(name.rpartition(".")[0] for name in loaded.biases)):
            where, found = modules.get(name, ("", None))
            if isinstance(found, MultiLoRALinear) and self._layers.get(where) is not found:
                raise CheckpointError(f"{path}: {name}: expected a linear of this server's, got another server's layer")
        fitting.check(fitting.without_layers(self._base, self._layers), loaded)
        if loaded.saved:
            raise CheckpointError(
                f"{path}: expected adapters alone, which a batch can mix by token, got modules that train whole "
                f"(modules_to_save): {', '.join(sorted(loaded.saved)[:4])}; peftk.load_adapter takes them"
            )
        values = dict(fitting.named_values(self._base))
        fitting.same_base(loaded, values)
        served = {}
        for name, adapter in loaded.adapters.items():
            bias = None if adapter.lora_bias is None else adapter.scaling * adapter.lora_bias.double()
            served[name] = _Served(adapter.lora_A, adapter.lora_B, adapter.scaling, bias)
        for name, bias in loaded.biases.items():
            own = values[name].detach()
            change = bias.double() - own.cpu().double()
            if bool(change.any()):  # else it is the model's to the bit
                module = name.rpartition(".")[0]
                self._check_linear(path, module, modules[module][1])  # only a linear can add it
                before = served.get(module, _NOTHING)
                served[module] = before._replace(bias=change if before.bias is None else before.bias + change)
        for name, one in served.items():
            for part, tensor in (("lora_A", one.lora_A), ("lora_B", one.lora_B), ("bias", one.bias)):
                if tensor is not None:
                    files.converted(path, f"{name}.{part}", tensor, dtype or values[f"{name}.weight"].dtype)
        return {modules[name][0]: one for name, one in served.items()}

    def _check_linear(self, path: os.PathLike[str], name: str, module: nn.Module) -> None:
        """Raises CheckpointError where no layer of ours is, nor can take the place of this module."""
        if isinstance(module, MultiLoRALinear):
            return
        try:
            replaceable(module)
        except TypeError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from error
        reader = trial.reader(self._base, name, module)
        if reader is not None:
            raise CheckpointError(
                f"{path}: {name}: expected a linear that is called, got one that {reader} reads itself"
            )

    def _layer(self, module: str) -> MultiLoRALinear:
        """The layer that serves `module`: the one in place, or a new one that nothing refers to yet."""
        if module in self._layers:
            return self._layers[module]
        layer = MultiLoRALinear.from_linear(
            self._base.get_submodule(module), max_adapters=self.max_adapters, adapter_dtype=self.adapter_dtype
        )
        layer.served = True
        watch(layer, module, trial.partly_read(self._base, module))
        return layer

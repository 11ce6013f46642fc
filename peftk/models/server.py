"""MultiAdapter: many LoRAs of one model, served in one batch."""

from __future__ import annotations

import collections
import gc
import itertools
import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftk.adapters import checks
from peftk.adapters import route as routes
from peftk.adapters.bank import NO_NUMBER
from peftk.adapters.carry import RouteContext
from peftk.adapters.route import Route
from peftk.checkpoints import files, fitting
from peftk.checkpoints import peft as peft_checkpoint
from peftk.checkpoints.contents import named_values
from peftk.checkpoints.files import CheckpointError
from peftk.checkpoints.peft import LoadedCheckpoint
from peftk.methods import trial
from peftk.methods.plan import replace_module, unwrapped, without_peft
from peftk.nn import MultiLoRALinear
from peftk.nn.replace import as_linear
from peftk.nn.watched import watch
from peftk.system.lasting import lasting


class _Served(NamedTuple):
    """What one linear adds for an adapter: s·BAx + β."""

    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float
    bias: Tensor | None


_NOTHING = _Served(None, None, 1.0, None)


class _Slots:
    """The numbers of a server's adapters, as in `AdapterBank`, and the layers that hold them: in all the same."""

    def __init__(self, count: int) -> None:
        self.numbers = [-1] * count  # by slot; -1 for a free one
        self.next = list(range(count))
        self.layers: dict[str, MultiLoRALinear] = {}
        self.lock = threading.Lock()
        self._tensor: Tensor | None = None
        self._gone: collections.deque[int] = collections.deque()

    def free_number(self) -> int | None:
        """A new one, of the slot used least often; None where all are taken."""
        free = (number for number, taken in zip(self.next, self.numbers, strict=True) if taken == -1)
        return min(free, default=None)

    def take(self, number: int) -> None:
        slot = number % len(self.numbers)
        self.numbers[slot], self.next[slot] = number, number + len(self.numbers)
        self._changed()

    def give_back(self, number: int) -> None:
        """In whatever thread its last user ends, maybe in the middle of a load."""
        self._gone.append(number)
        self.clear()

    def clear(self) -> None:
        """Frees the slots that were given back, unless a load is at work, which calls this when it has ended."""
        while self._gone and self.lock.acquire(blocking=False):
            try:
                while self._gone:
                    number = self._gone.popleft()
                    for layer in self.layers.values():
                        layer.bank.free(number)
                    self.numbers[number % len(self.numbers)] = -1
                self._changed()
            finally:
                self.lock.release()

    @property
    def reused(self) -> bool:
        """Whether a number may differ from its slot."""
        return any(number >= len(self.numbers) for number in self.numbers)

    def slots_of(self, ids: Tensor) -> Tensor:
        """Slots of numbers; for those of adapters that are gone, a number outside of every bank."""
        slots = ids % len(self.numbers)
        there = self._on(ids.device)[slots.long()] == ids
        return torch.where((ids >= 0) & ~there, NO_NUMBER, torch.where(ids < 0, ids, slots))

    def _on(self, device: torch.device) -> Tensor:
        """The numbers as a tensor, which is written in place, since CUDA graphs read it."""
        if self._tensor is None or self._tensor.device != device:
            with lasting():
                self._tensor = torch.tensor(self.numbers, device=device)
        return self._tensor

    def _changed(self) -> None:
        if self._tensor is not None:
            self._tensor.copy_(torch.tensor(self.numbers))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "lock": None, "_tensor": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "lock": threading.Lock()})


class _Loaded:
    """An adapter, for whoever uses it: the server under its name, and routes. When nobody does, its slot is free."""

    def __init__(self, slots: _Slots, number: int) -> None:
        self.slots, self.number = slots, number

    def __del__(self) -> None:
        self.slots.give_back(self.number)


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
        self._loaded: dict[str, _Loaded] = {}
        self._slots = _Slots(max_adapters)
        self._layers = self._slots.layers
        self._key = routes.ServerKey()
        self._batch_hooks = routes.BatchHooks(self._key)
        self._hooked_modules: set[str] = set()
        if example_inputs is not None:
            with trial.looking(self._base, example_inputs):
                trial.seen(self._base)

    @property
    def names(self) -> list[str]:
        """The adapters that can be routed to, in the order in which they were loaded."""
        return list(self._loaded)

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
        with self._slots.lock:
            self._load(name, path)
        self._slots.clear()

    def _load(self, name: str, path: str | os.PathLike[str]) -> None:
        if name in self._loaded:
            raise ValueError(f"name: expected a new one, got {name!r}, which is loaded; unload it first")
        number = self._free_number()
        with trial.looking(self._base):
            adapters = self._served(peft_checkpoint.load(path))
            new = {module: self._layer(module) for module in adapters if module not in self._layers}
        # all is checked: from here on only memory can run out, and then every layer forgets the name again
        everywhere = {**self._layers, **new}
        try:
            for module, layer in everywhere.items():
                # a layer that this checkpoint leaves alone gets an adapter that adds nothing
                found = adapters.get(module, _NOTHING)
                layer.bank.add(name, found.lora_A, found.lora_B, found.scaling, bias_B=found.bias, number=number)
        except BaseException:
            for layer in everywhere.values():
                if name in layer.bank.names:
                    layer.bank.remove(name)
            raise
        for module, layer in new.items():
            replace_module(self._base, module, layer)
            self._layers[module] = layer
            self._watch(module)
        self._slots.take(number)
        self._loaded[name] = _Loaded(self._slots, number)

    def _free_number(self) -> int:
        number = self._slots.free_number()
        if number is None and len(self._loaded) < self.max_adapters:
            self._slots.lock.release()  # what was given back meanwhile, or goes with what nobody can reach
            gc.collect()
            self._slots.clear()
            self._slots.lock.acquire()
            number = self._slots.free_number()
        if number is None:
            unloaded = self.max_adapters - len(self._loaded)
            unloaded_too = (
                f", {unloaded} of them unloaded but held by routes, threads or graphs that run" if unloaded else ""
            )
            raise ValueError(
                f"max_adapters: expected a free place, got {self.max_adapters} adapters loaded already{unloaded_too}"
            )
        return number

    def _watch(self, module: str) -> None:
        """The model, and the parts of it around `module` that may be called by themselves, say what they are called
        with. Not blocks in lists, of which there are many, and which are called with what the model is called with."""
        self._key.checks_left = routes.ORDER_CHECKS
        around = self._base
        for name in ("", *itertools.accumulate(module.split(".")[:-1], "{}.{}".format)):
            around = self._base.get_submodule(name)
            if name and isinstance(around, (nn.ModuleList, nn.ModuleDict)):
                return
            if name not in self._hooked_modules:
                self._hooked_modules.add(name)
                around.register_forward_pre_hook(self._batch_hooks.before, with_kwargs=True)
                around.register_forward_hook(self._batch_hooks.after, always_call=True)

    def unload(self, name: str) -> None:
        """Forgets an adapter. Its memory is free once no route and no checkpoint uses it: they go on with it.

        Raises ValueError for an unknown name.
        """
        with self._slots.lock:
            self._number(name)
            for layer in self._layers.values():
                layer.bank.forget(name)
            loaded = self._loaded.pop(name)
        del loaded  # after the lock: it may be the last that uses it
        self._slots.clear()

    def ids(self, names: Sequence[str | None]) -> Tensor:
        """int32 [B]: the numbers that stand for these names, and for no others later; None is -1.

        Raises ValueError for an unknown name.
        """
        return torch.tensor(self._numbers(names), dtype=torch.int32)

    def route(
        self,
        names: Sequence[str | None] | Tensor,
        *,
        batch_dim: int | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
    ) -> RouteContext:
        """Within the `with`, sequence b of every batch goes through the adapter names[b]; None: the base model.

        Threads, tasks and pools that are started or used within it are within it too, generators that enter routes may
        interleave, and an adapter that is unloaded meanwhile goes on serving it (docs/routes.md).

        Args:
            names: one name or None a sequence; or ids, int32/int64, per sequence [B] or per token [B, T] (`ids` makes
                them from names).
            batch_dim: where the sequences lie in the linears' x: 0, [B, …, K], or 1, time-major [T, B, K]. None means
                0, except within torch's own Transformer layers, which say it themselves (batch_first).
            lengths: [B], of sequences that lie one after the other in one row: x [1, ΣT, K] or [ΣT, K].
            cu_seqlens: [B + 1], the same as 0 and the running sum of lengths.

        x has B whole sequences in their order. Two things may make more rows: generate(), for beams and for several
        sequences to return, and a model called with [B, T, …] that flattens its tokens to [B·T, K]. For rows that
        are anything else a layer raises ValueError, unless all of the batch has one adapter.

        Raises ValueError for unknown names, before the model runs.

        Ids are read when the `with` begins. A CUDA graph reads a tensor of ids on the model's device anew in every
        replay, and should capture the `with` too, so that it sorts the ids once for all layers; names are its constants
        and are given before the capture (`peftk.adapters.route.Route`).
        """
        if batch_dim not in (None, 0, 1):
            raise ValueError(f"batch_dim: expected 0, 1 or None, got {batch_dim!r}")
        return RouteContext(self._key, lambda: self._route(names, batch_dim, lengths, cu_seqlens), routes.clean_up)

    def _route(self, names: Any, batch_dim: int | None, lengths: Any, cu_seqlens: Any) -> Route:
        if isinstance(names, Tensor):
            ids = names
            if ids.dtype not in (torch.int32, torch.int64) or ids.dim() not in (1, 2):
                raise TypeError(
                    f"names: expected ids int32 or int64 of shape [B] or [B, T], got {ids.dtype} {list(ids.shape)}"
                )
            if not torch.compiler.is_compiling():
                checks.dense("names", ids)
            numbers = set(ids.unique().tolist()) if ids.device.type == "cpu" else None
        else:
            given = self._numbers(names)
            ids, numbers = torch.tensor(given, dtype=torch.int32), set(given)
        by_number = {loaded.number: loaded for loaded in self._loaded.values()}
        for number in (numbers or set()) - {-1} - by_number.keys():
            raise ValueError(f"names: expected -1 and numbers of loaded adapters ({sorted(by_number)}), got {number}")
        packed = _lengths(lengths, cu_seqlens, ids, batch_dim)
        device = next((layer.weight.device for layer in self._layers.values()), ids.device)
        return Route(
            ids.to(device),
            slots=self._slots.slots_of if self._slots.reused else None,
            keep_alive=[loaded for number, loaded in by_number.items() if numbers is None or number in numbers],
            batch_dim=batch_dim,
            lengths=None if packed is None else packed.to(device),
            uniform=ids.numel() < 2 if numbers is None else len(numbers) < 2,
        )

    def _numbers(self, names: Sequence[str | None]) -> list[int]:
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f"names: expected one name or None per sequence, got {names!r}")
        return [-1 if name is None else self._number(name) for name in names]

    def _number(self, name: str) -> int:
        if not isinstance(name, str) or name not in self._loaded:
            raise ValueError(f"name: expected a loaded adapter ({', '.join(self._loaded) or 'none'}), got {name!r}")
        return self._loaded[name].number

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
        values = dict(named_values(self._base))
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
            as_linear(module)
        except TypeError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from error
        reader = trial.reader(self._base, name, module)
        if reader is not None:
            raise CheckpointError(
                f"{path}: {name}: expected a linear that is called, got one that {reader} reads itself"
            )

    def _layer(self, module: str) -> MultiLoRALinear:
        """A new layer to serve `module`, which nothing refers to yet. All adapters add nothing there."""
        layer = MultiLoRALinear.from_linear(
            self._base.get_submodule(module), max_adapters=self.max_adapters, adapter_dtype=self.adapter_dtype
        )
        layer.serve(self._key, self._base, module)
        watch(layer, module, trial.partly_read(self._base, module))
        names = {loaded.number: name for name, loaded in self._loaded.items()}
        for number in self._slots.numbers:
            if number != -1:
                layer.bank.add(names.get(number, "unloaded"), None, None, 1.0, number=number)
            if number not in names and number != -1:
                layer.bank.forget("unloaded")
        return layer

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy holds the adapters that have a name; routes through the original hold others."""
        self.__dict__.update(state)
        for number in set(self._slots.numbers) - {-1} - {loaded.number for loaded in self._loaded.values()}:
            self._slots.give_back(number)


def _lengths(lengths: Any, cu_seqlens: Any, ids: Tensor, batch_dim: int | None) -> Tensor | None:
    """int64 [B], checked; None where sequences are not one after the other."""
    if lengths is None and cu_seqlens is None:
        return None
    if lengths is not None and cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected None beside lengths, which says the same")
    name, given = ("lengths", lengths) if cu_seqlens is None else ("cu_seqlens", cu_seqlens)
    if ids.dim() != 1 or batch_dim is not None:
        other = "batch_dim" if ids.dim() == 1 else "ids per token"
        raise ValueError(f"{name}: expected None beside {other}, which says where sequences lie")
    given = given.tolist() if isinstance(given, Tensor) else list(given)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in given):
        raise TypeError(f"{name}: expected integers, got {given!r}")
    count = ids.shape[0] + (name == "cu_seqlens")
    if len(given) != count:
        raise ValueError(f"{name}: expected {count} numbers for {ids.shape[0]} sequences, got {len(given)}")
    if name == "cu_seqlens":
        if given[0] != 0:
            raise ValueError(f"cu_seqlens: expected to begin with 0, got {given[0]}")
        given = [after - before for before, after in itertools.pairwise(given)]
    if any(n < 0 for n in given):
        raise ValueError(f"{name}: expected no sequence of negative length, got {min(given)}")
    return torch.tensor(given, dtype=torch.int64)

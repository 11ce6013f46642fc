"""MultiAdapter: many LoRA adapters of one model, mixed in one batch."""

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

from peftk.adapters import checks, table
from peftk.adapters import route as routes
from peftk.adapters.adapter import Adapter
from peftk.adapters.bank import NO_NUMBER
from peftk.adapters.carry import RouteContext
from peftk.adapters.route import Route
from peftk.checkpoints import files, fitting
from peftk.checkpoints import peft as peft_checkpoint
from peftk.checkpoints.contents import named_values
from peftk.checkpoints.files import CheckpointError
from peftk.checkpoints.peft import LoadedCheckpoint
from peftk.methods import trial
from peftk.methods.plan import check_without_peft, replace_module, unwrapped
from peftk.nn import MultiLoRALinear
from peftk.nn.replace import as_linear
from peftk.nn.watched import watch
from peftk.system import streams
from peftk.system.lasting import lasting
from peftk.system.streams import StreamOrder

_NOTHING = Adapter((), (), 1.0)


class PreparedAdapter(NamedTuple):
    """A checkpoint that was read and checked for a model, as its banks take it (`MultiAdapter.prepare`)."""

    path: str | os.PathLike[str]
    parts: dict[str, Adapter]  # by the linear's name: s·BAx + β
    nbytes: int


class _Slots:
    """The numbers of a server's adapters, as in `AdapterBank`. In all layers of the server they are the same."""

    def __init__(self, count: int) -> None:
        self.numbers = [-1] * count  # by slot; -1 for a free slot
        self.next = list(range(count))  # the next number of each slot
        self.layers: dict[str, MultiLoRALinear] = {}
        self.lock = threading.Lock()
        self.captured = False  # whether a CUDA graph was captured in a route
        self._tensor: Tensor | None = None  # the numbers on the layers' device
        self._order: StreamOrder | None = None  # of writes to it, and of what reads it
        self._given_back: collections.deque[int] = collections.deque()

    def free_number(self) -> int | None:
        """A new number, in the free slot used least often; None if all slots are taken."""
        free = (number for number, taken in zip(self.next, self.numbers, strict=True) if taken == -1)
        return min(free, default=None)

    def take(self, number: int) -> None:
        slot = number % len(self.numbers)
        self.numbers[slot], self.next[slot] = number, number + len(self.numbers)
        live = next((layer.bank.device for layer in self.layers.values() if layer.bank.live is not None), None)
        if live is not None:
            self._numbers_on(live)  # before a capture, in which it could not be made
        self._write_number(slot)
        if self._order is not None:
            self._order.finish()

    def give_back(self, number: int) -> None:
        """Frees a slot, now or after the load that is running. May be called in any thread."""
        self._given_back.append(number)
        self.clear()

    def clear(self) -> None:
        """Frees the slots that were given back. If a load is running, does nothing: the load calls this at its end.

        While a CUDA graph is captured, it does nothing either: the next load or unload frees them.
        """
        while self._given_back and not self._busy() and self.lock.acquire(blocking=False):
            try:
                while self._given_back:
                    number = self._given_back.popleft()
                    self.numbers[number % len(self.numbers)] = -1
                    self._write_number(number % len(self.numbers))
                    for layer in self.layers.values():
                        layer.bank.free(number)
            finally:
                self.lock.release()

    def _busy(self) -> bool:
        return self._order is not None and self._order.busy()

    @property
    def reused(self) -> bool:
        """Whether a number may differ from its slot."""
        return any(number >= len(self.numbers) for number in self.numbers)

    def slots_of(self, ids: Tensor) -> Tensor:
        """The slots of numbers. Numbers that no adapter has become one outside of every bank."""
        slots = ids % len(self.numbers)
        known = self._numbers_on(ids.device)[slots.long()] == ids
        return torch.where((ids >= 0) & ~known, NO_NUMBER, torch.where(ids < 0, ids, slots))

    def _numbers_on(self, device: torch.device) -> Tensor:
        """The numbers as a tensor. It is written in place, since CUDA graphs read it."""
        if self._tensor is None or self._order is None or self._tensor.device != device:
            self._order = StreamOrder(device)
            with lasting(), self._order.write():
                self._tensor = torch.tensor(self.numbers, device=device)
        self._order.read()
        return self._tensor

    @lasting()
    def _write_number(self, slot: int) -> None:
        if self._tensor is not None and self._order is not None:
            with self._order.write():
                self._tensor[slot].fill_(self.numbers[slot])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "lock": None, "captured": False, "_tensor": None, "_order": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "lock": threading.Lock()})


class HeldAdapter:
    """Keeps a loaded adapter in its slot. The server has one while the adapter has a name, and so have routes, and who
    called `MultiAdapter.hold`. When nothing refers to it any more, the slot is freed. number: what goes into ids."""

    def __init__(self, slots: _Slots, number: int) -> None:
        self.slots, self.number = slots, number

    def __del__(self) -> None:
        self.slots.give_back(self.number)


class MultiAdapter:
    """Serves up to `max_adapters` LoRA checkpoints on one base model; each sequence of a batch may use a different one.

        server = peftk.MultiAdapter(model, max_adapters=256)
        server.load("alice", "alice/")
        with server.route(["alice", None]):
            out = model(**batch)

    A linear is replaced by a MultiLoRALinear in place when the first checkpoint that adapts it is loaded. Outside of
    `route`, and for None, the model computes what it did before. Precision: `peftk.functional.multi_lora_linear`.

    Args:
        model: an nn.Module; it is changed in place.
        max_adapters: how many adapters can be loaded at a time.
        adapter_dtype: dtype in which adapters are stored; None means the dtype of each weight.
        max_rank: the largest rank that may be loaded, for which a CUDA graph then has room; None for any: a graph has
            room for the largest that was loaded before it was captured (docs/routes.md).
        example_inputs: as in `peftk.inject`, to find out which linears the model calls.

    Raises TypeError or ValueError for a bad argument.

    Source: Chen et al. 2023 (Punica) and Sheng et al. 2023 (S-LoRA) pose the problem.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_adapters: int = 64,
        adapter_dtype: torch.dtype | None = None,
        max_rank: int | None = None,
        example_inputs: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        check_without_peft(model)
        checks.positive("max_adapters", max_adapters)
        if max_rank is not None:
            checks.positive("max_rank", max_rank)
        if adapter_dtype is not None:
            checks.adapter_dtype(adapter_dtype)
        self.model = model
        self._base = unwrapped(model)
        self.max_adapters, self.max_rank = max_adapters, max_rank
        self.adapter_dtype = adapter_dtype
        self._loaded: dict[str, HeldAdapter] = {}
        self._slots = _Slots(max_adapters)
        self._layers = self._slots.layers
        self._key = routes.ServerKey()
        self._batch_hooks = routes.BatchHooks(self._key)
        self._hooked_modules: set[str] = set()
        if example_inputs is not None:
            with trial.lazy_trial(self._base, example_inputs):
                trial.result(self._base)

    @property
    def names(self) -> list[str]:
        """The loaded adapters, in the order of loading."""
        return list(self._loaded)

    def load(self, name: str, path: str | os.PathLike[str]) -> None:
        """Loads an HF PEFT LoRA checkpoint under a name.

        A trained bias becomes its difference from the model's, β = trained − base, computed in fp64 and rounded once to
        the dtype in which adapters are stored; a lora_bias b becomes s·b. Modules that were trained in full
        (modules_to_save) and trained biases of modules other than linears (LayerNorms) cannot be mixed by token and are
        refused.

        Raises TypeError or ValueError for a bad name, a name in use, or if `max_adapters` are loaded already, and
        CheckpointError for a checkpoint that is damaged, or does not fit the model or a CUDA graph that was captured of
        it; RuntimeError while one is captured. Nothing has changed then. Batches with other adapters may run during the
        load.
        """
        _check_name(name)
        with self._slots.lock:
            self._check_new(name)
            self._free_number()  # raises, before the files are read
            with trial.lazy_trial(self._base):
                self._place(name, self._prepared(path))
        self._slots.clear()

    def prepare(self, path: str | os.PathLike[str]) -> PreparedAdapter:
        """Reads a checkpoint and checks that it fits the model, as `load` does, but gives it no slot.

        `place` puts it in, many times faster than `load`. The server does not change, and may be used meanwhile.

        Raises CheckpointError for a checkpoint that is damaged or does not fit the model.
        """
        with trial.lazy_trial(self._base):
            return self._prepared(path)

    def place(self, name: str, prepared: PreparedAdapter) -> None:
        """Loads an adapter that `prepare` of this server returned, under a name. Raises as `load`."""
        _check_name(name)
        with self._slots.lock:
            self._check_new(name)
            with trial.lazy_trial(self._base):
                self._place(name, prepared)
        self._slots.clear()

    def adapt(self) -> None:
        """Replaces every linear that the model calls now, not when the first checkpoint that adapts it is loaded.

        So a base row is computed in the same way, and with the same bits, whatever was loaded before.
        """
        with self._slots.lock, trial.lazy_trial(self._base):
            called = trial.result(self._base).called
            linears = {
                name: module
                for name, module in self._base.named_modules()
                if name in called and name not in self._layers and _is_replaceable(self._base, name, module)
            }
            new = {name: self._layer(name) for name in linears}
            for name, layer in new.items():
                self._put_in(name, layer)

    def hold(self, name: str) -> HeldAdapter:
        """An object that keeps the adapter in its slot as long as it is referred to, also after `unload`.

        Raises ValueError for an unknown name.
        """
        self._number(name)
        return self._loaded[name]

    @property
    def free_slots(self) -> int:
        """How many adapters can be loaded now."""
        self._slots.clear()
        return self._slots.numbers.count(-1)

    def _check_new(self, name: str) -> None:
        if name in self._loaded:
            raise ValueError(f"name: expected a new one, got {name!r}, which is loaded; unload it first")

    def _prepared(self, path: str | os.PathLike[str]) -> PreparedAdapter:
        parts = self._adapters_of(peft_checkpoint.load(path))
        return PreparedAdapter(path, parts, sum(t.nbytes for part in parts.values() for t in part.tensors()))

    def _place(self, name: str, prepared: PreparedAdapter) -> None:
        number, adapters = self._free_number(), prepared.parts
        self._check_graphs(prepared.path, adapters)
        new = {module: self._layer(module) for module in adapters if module not in self._layers}
        # everything is checked; from here on only memory can run out, and then every layer drops the name again
        layers = {**self._layers, **new}
        try:
            for module, layer in layers.items():
                # in a layer that this checkpoint does not adapt, the adapter adds nothing
                layer.bank.keep(name, adapters.get(module, _NOTHING), number)
        except BaseException:
            for layer in layers.values():
                if name in layer.bank.names:
                    layer.bank.remove(name)
            raise
        for module, layer in new.items():
            self._put_in(module, layer)
        self._slots.take(number)
        self._loaded[name] = HeldAdapter(self._slots, number)

    def _put_in(self, module: str, layer: MultiLoRALinear) -> None:
        replace_module(self._base, module, layer)
        self._layers[module] = layer
        self._add_hooks(module)

    def _check_graphs(self, path: str | os.PathLike[str], adapters: dict[str, Adapter]) -> None:
        """Raises CheckpointError if an adapter has ranks or linears that are too many, or that no graph would see."""
        captured = self._slots.captured or any(layer.bank.order.captured for layer in self._layers.values())
        for module, part in adapters.items():
            rank = part.rank
            if module not in self._layers and captured:
                raise CheckpointError(
                    f"{path}: {module}: expected a linear with adapters when a CUDA graph of the model was captured, "
                    "got one that the graph computes without"
                )
            if module not in self._layers and self.max_rank is not None and rank > self.max_rank:
                raise CheckpointError(
                    f"{path}: {module}: expected at most max_rank = {self.max_rank} ranks, got {rank}"
                )
            try:
                if module in self._layers:
                    self._layers[module].bank.check_addition(rank)
            except ValueError as error:
                raise CheckpointError(f"{path}: {module}: {error}") from error

    def _free_number(self) -> int:
        number = self._slots.free_number()
        if number is None and len(self._loaded) < self.max_adapters:
            self._slots.lock.release()  # free the slots given back meanwhile, and those held by unreachable objects
            gc.collect()
            self._slots.clear()
            self._slots.lock.acquire()
            number = self._slots.free_number()
        if number is None:
            unloaded = self.max_adapters - len(self._loaded)
            unloaded_too = (
                f", {unloaded} of them unloaded but still used by routes, threads or graphs" if unloaded else ""
            )
            raise ValueError(
                f"max_adapters: expected a free slot, got {self.max_adapters} adapters loaded already{unloaded_too}"
            )
        return number

    def _add_hooks(self, module: str) -> None:
        """Adds hooks to the model, and to the modules around `module` that may be called directly, to see their inputs.

        Blocks in lists get none: there are many, and their batch is that of the model.
        """
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
        """Removes an adapter. Routes, threads and checkpoints that use it keep it; its memory is freed after the last.

        Raises ValueError for an unknown name.
        """
        with self._slots.lock:
            self._number(name)
            for layer in self._layers.values():
                layer.bank.forget(name)
            loaded = self._loaded.pop(name)
        del loaded  # after the lock: it may be the last reference
        self._slots.clear()

    def ids(self, names: Sequence[str | None]) -> Tensor:
        """The numbers of these names, int32 [B], with -1 for None. No later adapter gets the same numbers.

        Raises ValueError for an unknown name, TypeError if `names` is not a sequence.
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
        """A context manager: inside, sequence b of every batch uses the adapter names[b]; None means the base model.

        The route also applies in threads, tasks and pools that are started or used inside. Generators that enter routes
        may interleave. An adapter that is unloaded meanwhile stays in use here (docs/routes.md).

        Args:
            names: one name or None per sequence; or ids, int32 or int64, per sequence [B] or per token [B, T] (see
                `ids`).
            batch_dim: the dimension of the linears' x with the sequences: 0 for [B, …, K], or 1 for time-major
                [T, B, K]. None means 0, except within torch's own Transformer layers, where batch_first tells.
            lengths: [B], the lengths of sequences that are one after the other in one row: x [1, ΣT, K] or [ΣT, K].
            cu_seqlens: [B + 1], 0 and the running sum of the lengths, instead of lengths.

        x must have B whole sequences in order. There may be more rows in two cases: generate() makes several per
        sequence, for beams or for sequences to return; and a model called with [B, T, …] may flatten its tokens to
        [B·T, K]. For any other rows a layer raises ValueError, unless the whole batch has one adapter.

        Raises ValueError or TypeError for a bad argument: a bad batch_dim at once, unknown names and the rest when the
        `with` begins, before the model runs.

        Ids are read when the `with` begins. A CUDA graph reads a tensor of ids on the model's device again in every
        replay. Capture the `with` too, so that the graph sorts the ids once for all layers. Names are constants of the
        graph, which keeps their adapters for good; enter a route with names before the capture
        (`peftk.adapters.route.Route`).
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
            in_order = self._numbers(names)
            ids, numbers = torch.tensor(in_order, dtype=torch.int32), set(in_order)
        by_number = {loaded.number: loaded for loaded in self._loaded.values()}
        for number in (numbers or set()) - {-1} - by_number.keys():
            raise ValueError(f"names: expected -1 and numbers of loaded adapters ({sorted(by_number)}), got {number}")
        packed = _lengths(lengths, cu_seqlens, ids, batch_dim)
        layer = next(iter(self._layers.values()), None)
        device = ids.device if layer is None else layer.weight.device
        if streams.capturing(next((p.device for p in self._base.parameters()), device)):
            self._slots.captured = True
        # a replay may read the numbers of adapters that are loaded later, in slots that are used again
        follows = isinstance(names, Tensor) and names.device == device
        translates = self._slots.reused or (follows and layer is not None and layer.bank.live is not None)
        return Route(
            ids.to(device),
            slots=self._slots.slots_of if translates else None,
            constant=not follows,
            keep_alive=[loaded for number, loaded in by_number.items() if numbers is None or number in numbers],
            batch_dim=batch_dim,
            lengths=None if packed is None else packed.to(device),
            uniform=ids.numel() < 2 if numbers is None else len(numbers) < 2,
        )

    def route_tokens(self, slots: Tensor, held: Sequence[HeldAdapter], *, picked: Tensor | None = None) -> RouteContext:
        """A route for an engine that packs the tokens of many requests into one row, in every step anew.

        Args:
            slots: int32 [1, T] on the model's device, a slot (`number % max_adapters`) per token; -1 for the base
                model. It is not checked.
            held: the adapters that it names; the route keeps them.
            picked: int32 [P], the slots of the tokens for which the model computes logits, if these are not all.
        """

        def make() -> Route:
            return Route(slots, keep_alive=held, picked=picked)

        return RouteContext(self._key, make, routes.clean_up)

    def _numbers(self, names: Sequence[str | None]) -> list[int]:
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f"names: expected one name or None per sequence, got {names!r}")
        return [-1 if name is None else self._number(name) for name in names]

    def _number(self, name: str) -> int:
        if not isinstance(name, str) or name not in self._loaded:
            raise ValueError(f"name: expected a loaded adapter ({', '.join(self._loaded) or 'none'}), got {name!r}")
        return self._loaded[name].number

    def _adapters_of(self, loaded: LoadedCheckpoint) -> dict[str, Adapter]:
        """What a checkpoint adds to each linear, by its name. Raises CheckpointError if it does not fit the model."""
        path, dtype = loaded.path, self.adapter_dtype
        modules = {files.plain_name(name): (name, module) for name, module in self._base.named_modules()}
        for name in (*loaded.adapters, *(name.rpartition(".")[0] for name in loaded.biases)):
            where, found = modules.get(name, ("", None))
            if isinstance(found, MultiLoRALinear) and self._layers.get(where) is not found:
                raise CheckpointError(
                    f"{path}: {name}: expected a linear of this server, got a layer of a different server"
                )
        fitting.check(fitting.without_layers(self._base, self._layers), loaded)
        if loaded.saved:
            raise CheckpointError(
                f"{path}: expected only adapters, which a batch can mix by token, got modules trained in full "
                f"(modules_to_save): {', '.join(sorted(loaded.saved)[:4])}; peftk.load_adapter takes them"
            )
        values = dict(named_values(self._base))
        fitting.same_base(loaded, values)
        biases: dict[str, Tensor] = {}  # β in fp64
        for name, adapter in loaded.adapters.items():
            if adapter.lora_bias is not None:
                biases[name] = adapter.scaling * adapter.lora_bias.double()
        for key, bias in loaded.biases.items():
            base = values[key].detach()
            change = bias.double() - base.cpu().double()
            if bool(change.any()):  # else it is the model's bias, bit for bit
                name = key.rpartition(".")[0]
                self._check_linear(path, name, modules[name][1])  # only a linear can add a bias
                biases[name] = change if name not in biases else biases[name] + change
        parts: dict[str, Adapter] = {}
        for name in dict.fromkeys((*loaded.adapters, *biases)):
            factors, weight = loaded.adapters.get(name), values[f"{name}.weight"]
            tensors = {
                "lora_A": None if factors is None else factors.lora_A,
                "lora_B": None if factors is None else factors.lora_B,
                "bias": biases.get(name),
            }
            stored = {
                key: None if tensor is None else files.converted(path, f"{name}.{key}", tensor, dtype or weight.dtype)
                for key, tensor in tensors.items()
            }
            parts[modules[name][0]] = _stored(stored, 1.0 if factors is None else factors.scaling)
        return parts

    def _check_linear(self, path: os.PathLike[str], name: str, module: nn.Module) -> None:
        """Raises CheckpointError unless the module is a MultiLoRALinear or can be replaced by one."""
        if isinstance(module, MultiLoRALinear):
            return
        try:
            as_linear(module)
        except TypeError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from error
        reader = trial.reader(self._base, name, module)
        if reader is not None:
            raise CheckpointError(
                f"{path}: {name}: expected a linear that is called, got one whose weight {reader} reads itself"
            )

    def _layer(self, module: str) -> MultiLoRALinear:
        """A new layer to replace `module`, with every loaded adapter in it, adding nothing. The model is unchanged."""
        layer = MultiLoRALinear.from_linear(
            self._base.get_submodule(module),
            max_adapters=self.max_adapters,
            adapter_dtype=self.adapter_dtype,
            max_rank=self.max_rank,
        )
        layer.serve(self._key, self._base, module)
        watch(layer, module, trial.any_reader(self._base, module))
        names = {loaded.number: name for name, loaded in self._loaded.items()}
        for number in self._slots.numbers:
            if number != -1:
                layer.bank.add(names.get(number, "unloaded"), None, None, 1.0, number=number)
            if number not in names and number != -1:
                layer.bank.forget("unloaded")
        return layer

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has only the adapters with a name; unloaded ones that routes of the original still use are dropped."""
        self.__dict__.update(state)
        for number in set(self._slots.numbers) - {-1} - {loaded.number for loaded in self._loaded.values()}:
            self._slots.give_back(number)


def _stored(tensors: dict[str, Tensor | None], scaling: float) -> Adapter:
    """The adapter of lora_A [R, K], lora_B [N, R] and bias [N], in memory of its own, as pages of a bank lie in it."""
    A, B, bias = (None if t is None else t.detach() for t in tensors.values())
    bias = None if bias is None else bias.clone()
    if A is None or B is None:
        return Adapter((), (), scaling, bias_B=bias)
    A, B = A.clone(memory_format=torch.contiguous_format), B.t().clone(memory_format=torch.contiguous_format).t()
    found = Adapter((A,), (B,), scaling, bias_B=bias)
    table.lasting_entry(found, dtype=A.dtype, device=A.device)
    return found


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected a non-empty string, got {name!r}")


def _is_replaceable(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a module is a linear that a MultiLoRALinear can replace."""
    try:
        as_linear(module)
    except TypeError:
        return False
    return trial.reader(model, name, module) is None


def _lengths(lengths: Any, cu_seqlens: Any, ids: Tensor, batch_dim: int | None) -> Tensor | None:
    """The lengths as int64 [B], checked; None if neither argument is given."""
    if lengths is None and cu_seqlens is None:
        return None
    if lengths is not None and cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected None, as lengths is given too, got both")
    name, numbers = ("lengths", lengths) if cu_seqlens is None else ("cu_seqlens", cu_seqlens)
    if ids.dim() != 1 or batch_dim is not None:
        other = "batch_dim" if ids.dim() == 1 else "ids per token"
        raise ValueError(f"{name}: expected None, as {other} is given too, got both")
    numbers = numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise TypeError(f"{name}: expected integers, got {numbers!r}")
    count = ids.shape[0] + (name == "cu_seqlens")
    if len(numbers) != count:
        raise ValueError(f"{name}: expected {count} numbers for {ids.shape[0]} sequences, got {len(numbers)}")
    if name == "cu_seqlens":
        if numbers[0] != 0:
            raise ValueError(f"cu_seqlens: expected to begin with 0, got {numbers[0]}")
        numbers = [after - before for before, after in itertools.pairwise(numbers)]
    if any(n < 0 for n in numbers):
        raise ValueError(f"{name}: expected no sequence of negative length, got {min(numbers)}")
    return torch.tensor(numbers, dtype=torch.int64)

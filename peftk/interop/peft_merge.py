"""merge() and unmerge() of accelerated PEFT layers, exact by means of receipts on the layers.

`merged_adapters` is PEFT's list of names in the order of merging. A receipt says which names at its end are unmerged
together and exactly. Any other adapter at the end (a variant, or one that was merged before the layer was accelerated)
is unmerged by PEFT's own code.

For a whole model, all layers are merged or unmerged, or none (`merging_all`, `unmerging_all`). On failure, what peftk
merged is unmerged again bit for bit, and PEFT's own layers get back copies of their weights, which are kept until the
end.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import Tensor, nn

from peftk import functional
from peftk.functional import MergeReceipt
from peftk.interop import peft_support
from peftk.interop.peft_support import Base
from peftk.interop.peft_whole import all_or_none
from peftk.launch.merge_args import NotFiniteError, write
from peftk.nn import shared
from peftk.nn.shared import Place
from peftk.ops import merge as merge_weights
from peftk.reference.receipt import BiasReceipt, merge_bias
from peftk.system import interrupts, storage


@dataclasses.dataclass(frozen=True)
class Merged:
    """One call of merge(): the adapters' names, and the receipts from which W and the bias are restored."""

    names: tuple[str, ...]
    receipt: MergeReceipt
    bias: BiasReceipt | None  # None if no adapter has a bias


class _Operation(NamedTuple):
    """A running operation on all layers of a model: how to undo what was done so far, and the layers' names by id()."""

    undo: contextlib.ExitStack
    names: dict[int, str]


_operation: contextvars.ContextVar[_Operation | None] = contextvars.ContextVar("peftk_together", default=None)


def reason(layer: Any, names: Sequence[str]) -> str | None:
    """Why PEFT's own code must merge these adapters; None if peftk can."""
    found = peft_support.base(layer.base_layer)
    if isinstance(found, str):
        return found
    tensors = list(found)
    for name in names:
        adapter = peft_support.factors(layer, name, found[0])
        if isinstance(adapter, str):
            return adapter
        tensors += () if adapter is None else adapter.tensors()
    return next((why for t in tensors if t is not None and storage.by_torch(t) and (why := storage.reason(t))), None)


# ---- one layer ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def step(layer: nn.Module) -> Iterator[contextlib.ExitStack]:
    """A context manager around the merge or unmerge of one layer. A failure undoes it, and all of `merging_all`."""
    with interrupts.deferred() as deferred:  # no interrupt between a merged W and its receipt
        operation = _operation.get()
        if operation is None:
            with contextlib.ExitStack() as undo:
                yield undo
                undo.pop_all()
            return
        deferred.deliver()
        try:
            yield operation.undo
        except (TypeError, ValueError, RuntimeError) as error:
            if type(error) not in (TypeError, ValueError, RuntimeError) or id(layer) not in operation.names:
                raise
            raise type(error)(f"{operation.names[id(layer)]}: {error}") from error


def ensure_unshared(layer: Any, names: Sequence[str], untie: bool, undo: contextlib.ExitStack) -> None:
    """Before a layer is merged: checks that no other module is known to hold its weight, or gives it a copy (untie)."""
    if _operation.get() is not None:
        return  # `merging_all` has checked the whole model
    places = _places("", layer, names)
    shared.check_not_shared(layer, [place.name for place in places], untie=untie)
    for place in places if untie else ():
        _untie(place, undo)


def merge(layer: Any, names: list[str], undo: contextlib.ExitStack) -> None:
    """W ← W + Σ s·BA in one pass, for all names that the layer has.

    Raises ValueError if the result would not be finite, RuntimeError for a lora_bias if the base layer has no bias.
    """
    weight, bias = cast(Base, peft_support.base(layer.base_layer))
    found = {name: peft_support.factors(layer, name, weight) for name in names}
    adapters: dict[str, Any] = {name: adapter for name, adapter in found.items() if adapter is not None}
    if not adapters:
        return
    columns = [list(column) for column in zip(*adapters.values(), strict=True)]
    with _with_pefts_message(adapters, ValueError):
        merged_bias = _merged_bias(bias, adapters)
    if merged_bias is not None:
        _set_bias(layer, merged_bias.after, merged_bias.before, undo)
    with _with_pefts_message(adapters, NotFiniteError):
        receipt = functional.merge_(weight.detach(), columns[0], columns[1], [float(s) for s in columns[3]])
    undo.callback(_unmerge_weight, layer, receipt)
    merged = Merged(tuple(adapters), receipt, merged_bias)
    _record_merged(layer, [*layer.merged_adapters, *adapters], [*live_receipts(layer), merged], undo)


@contextlib.contextmanager
def _with_pefts_message(adapters: Iterable[str], kind: type[ValueError]) -> Iterator[None]:
    """Puts PEFT's message in front of errors of this kind, which are raised for results that are not finite."""
    try:
        yield
    except kind as error:
        broken = f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be broken"
        raise ValueError(f"{broken}: {error}") from error


def _merged_bias(bias: Tensor | None, adapters: dict[str, Any]) -> BiasReceipt | None:
    terms = [(adapter.bias_B, adapter.scaling) for adapter in adapters.values() if adapter.bias_B is not None]
    if not terms:
        return None
    if bias is None:
        raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
    return merge_bias(bias, terms)


def unmerge(layer: Any, peft_unmerge: Callable[[], None], undo: contextlib.ExitStack) -> None:
    """Unmerges all adapters, the last first. peft_unmerge: PEFT's own method, for adapters without a receipt."""
    while layer.merged_adapters:
        receipts = live_receipts(layer)
        last = receipts.pop() if receipts else None
        if last is not None and tuple(layer.merged_adapters[-len(last.names) :]) == last.names:
            try:
                _unmerge_exactly(layer, last, undo)
            except ValueError as error:
                warnings.warn(
                    f"peftk: {', '.join(last.names)} cannot be unmerged exactly ({error}); "
                    "HF PEFT's subtraction is used, which rounds",
                    stacklevel=3,
                )
                _record_merged(layer, layer.merged_adapters, receipts, undo)
            else:
                _record_merged(layer, layer.merged_adapters[: -len(last.names)], receipts, undo)
                continue
        keep_copies(layer, undo)
        _record_merged(layer, layer.merged_adapters, live_receipts(layer), undo)
        below = layer.merged_adapters[:-1]
        del layer.merged_adapters[:-1]
        try:
            peft_unmerge()
        finally:
            layer.merged_adapters[:0] = below
    retie(layer, undo)


def _unmerge_exactly(layer: Any, merged: Merged, undo: contextlib.ExitStack) -> None:
    """Restores W and the bias bit for bit. Raises ValueError if their bits have changed since the merge."""
    found = peft_support.base(layer.base_layer)
    if isinstance(found, str):
        raise ValueError(found)
    weight, bias = found
    receipt = merged.receipt.to(weight.device)
    if merged.bias is not None:
        of_bias = merged.bias.to(weight.device)
        of_bias.check(bias)
        with contextlib.ExitStack() as undo_bias:
            _set_bias(layer, of_bias.before, of_bias.after, undo_bias)
            functional.unmerge_(weight.detach(), receipt)
            undo.push(undo_bias.pop_all())
    else:
        functional.unmerge_(weight.detach(), receipt)
    undo.callback(_merge_weight, layer, receipt)


def live_receipts(layer: Any) -> list[Merged]:
    """The receipts whose adapters are still merged."""
    receipts = layer.__dict__.get("_peftk_merged", [])
    return [merged for merged in receipts if set(merged.names) <= set(layer.merged_adapters)]


def _record_merged(layer: Any, names: Sequence[str], receipts: Sequence[Merged], undo: contextlib.ExitStack) -> None:
    undo.callback(_set_merged, layer, list(layer.merged_adapters), layer.__dict__.get("_peftk_merged", []))
    _set_merged(layer, list(names), list(receipts))


def _set_merged(layer: Any, names: list[str], receipts: list[Merged]) -> None:
    layer.merged_adapters[:] = names
    layer._peftk_merged = receipts


def _set_bias(layer: Any, value: Tensor, before: Tensor, undo: contextlib.ExitStack) -> None:
    undo.callback(_put_bias, layer, before)
    write(layer.base_layer.bias.detach(), value)


# functions that undo a step


def _base_loaded(layer: Any) -> contextlib.AbstractContextManager[None]:
    """A context manager: inside, an offloaded base layer has its values, as PEFT does it around a merge."""
    offloaded = any(parameter.is_meta for parameter in layer.get_base_layer().parameters())
    loaded: contextlib.AbstractContextManager[None] = onload_layer(layer) if offloaded else contextlib.nullcontext()
    return loaded


def _put_bias(layer: Any, value: Tensor) -> None:
    with _base_loaded(layer):
        write(layer.base_layer.bias.detach(), value)


def _unmerge_weight(layer: Any, receipt: MergeReceipt) -> None:
    with _base_loaded(layer):
        weight = cast(Base, peft_support.base(layer.base_layer))[0].detach()
        functional.unmerge_(weight, receipt.to(weight.device))


def _merge_weight(layer: Any, receipt: MergeReceipt) -> None:
    """Merges again, with the same bits as the merge of the receipt."""
    with _base_loaded(layer):
        weight = cast(Base, peft_support.base(layer.base_layer))[0].detach()
        merge_weights.merge_(weight, receipt.to(weight.device).factors)


def keep_copies(layer: Any, undo: contextlib.ExitStack) -> None:
    """Copies a base layer's weights, so that changes by PEFT's own code can be undone."""
    with _base_loaded(layer):
        base = layer.get_base_layer()
        values = [(n, t.data, t.detach().clone()) for n, t in (*base.named_parameters(), *base.named_buffers())]
    undo.callback(_put_copies, layer, values)


def _put_copies(layer: Any, values: list[tuple[str, Tensor, Tensor]]) -> None:
    with _base_loaded(layer), torch.no_grad():
        base = layer.get_base_layer()
        places = {**dict(base.named_parameters()), **dict(base.named_buffers())}
        for name, data, value in values:
            places[name].data = data.copy_(value)


# ---- what layers share ----------------------------------------------------------------------------------------------


def note_shared(model: nn.Module) -> None:
    """Notes on accelerated layers what they share with other modules, for merges of a single layer."""
    layers = [(name, layer) for name, layer in tuner_layers(model) if _undoes_own_merges(layer)]
    shared.note(model, [place for name, layer in layers for place in _places(name, layer, tuple(layer.lora_A))])


def _places(name: str, layer: Any, names: Sequence[str]) -> list[Place]:
    """The Parameters of a base layer that merging these adapters would change."""
    if not set(names) & set(layer._all_available_adapter_names()) - set(layer.merged_adapters):
        return []
    biased = any(getattr(layer, "lora_bias", {}).get(adapter) for adapter in names)
    base, only = layer.get_base_layer(), getattr(layer, "parameter_name", None)  # ParamWrapper changes only that one
    return [
        Place(name, layer, owner, part)
        for path, owner in base.named_modules()
        for part, parameter in owner._parameters.items()
        if parameter is not None and "lora_" not in path and (biased or "bias" not in part) and only in (None, part)
    ]


def _untie(place: Place, undo: contextlib.ExitStack) -> None:
    layer: Any = place.module
    ties = layer.__dict__.get("_peftk_ties", ())
    tie = shared.untie(place.owner, place.name)
    undo.callback(shared.put_back, tie)
    undo.callback(setattr, layer, "_peftk_ties", ties)
    layer._peftk_ties = (*ties, tie)


def retie(layer: Any, undo: contextlib.ExitStack) -> None:
    """Shares the Parameters that a merge untied again, if their bits match."""
    ties = layer.__dict__.get("_peftk_ties", ())
    if layer.merged_adapters or not ties:
        return
    undo.callback(setattr, layer, "_peftk_ties", ties)
    for tie in ties:
        undo.callback(shared.put_back, dataclasses.replace(tie, parameter=tie.owner._parameters[tie.name]))
        shared.retie(tie)
    layer._peftk_ties = ()


# ---- all layers -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def merging_all(model: Any, adapter_names: Sequence[str] | None = None, *, untie: bool = False) -> Iterator[None]:
    """A context manager around a LoraModel's merge of these adapters (None: the active ones): all layers or none.

    Raises ValueError if another module holds a weight that would change, unless `untie`.
    """
    layers = tuner_layers(model.model)
    with interrupts.deferred(), contextlib.ExitStack() as copies, all_or_none(model) as undo:
        places = []
        for name, layer in layers:
            names = list(layer.active_adapters if adapter_names is None else adapter_names)
            changed = _places(name, layer, names)
            places += changed
            if changed and not (_undoes_own_merges(layer) and reason(layer, names) is None):
                keep_copies(layer, copies)
        for place, other in shared.used_elsewhere(model.model, places):
            raise ValueError(f"{place.layer}: {shared.shared_module_error(place.name, other)}")
        for place, other in shared.conflicts(model.model, places):
            if not untie:
                raise ValueError(f"{place.layer}: {shared.shared_memory_error(place.name, other)}")
            _untie(place, undo)
        with _set_operation(undo, layers):
            yield
        copies.pop_all()


@contextlib.contextmanager
def unmerging_all(model: Any) -> Iterator[None]:
    """A context manager around a LoraModel's unmerge: all layers or none."""
    layers = tuner_layers(model.model)
    with interrupts.deferred(), contextlib.ExitStack() as copies, all_or_none(model) as undo:
        for _, layer in layers:
            if layer.merged_adapters and not _undoes_own_merges(layer):
                keep_copies(layer, copies)
        with _set_operation(undo, layers):
            yield
            for _, layer in layers:
                retie(layer, undo)
        copies.pop_all()


def tuner_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _undoes_own_merges(layer: nn.Module) -> bool:
    """Whether the layer undoes its own merges and unmerges on failure, as our layers do."""
    return getattr(type(layer), "undoes_merges", False)


@contextlib.contextmanager
def _set_operation(undo: contextlib.ExitStack, layers: Sequence[tuple[str, Any]]) -> Iterator[None]:
    token = _operation.set(_Operation(undo, {id(layer): name for name, layer in layers}))
    try:
        yield
    finally:
        _operation.reset(token)

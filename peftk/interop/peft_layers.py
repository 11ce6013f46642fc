"""The classes that `peftk.accelerate` gives to a PEFT model's layers. Importing this module needs peft.

They are subclasses of PEFT's classes with the same names. Their only state of their own are attributes that begin with
`_peftk_`, so a layer changes its class and keeps everything else.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS, LoraLayer
from peft.tuners.lora.model import LoraModel as PeftLoraModel
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peftk.adapters import checks, table
from peftk.adapters.adapter import Adapter, adapter_of
from peftk.adapters.dropout import dropout_of
from peftk.adapters.table import AdapterTable, WithoutTable
from peftk.interop import peft_batch, peft_merge, peft_support
from peftk.interop.peft_batch import Batch
from peftk.interop.peft_support import Base, Factors
from peftk.interop.peft_whole import all_or_none, atomic
from peftk.nn import watched
from peftk.ops import layer_calls
from peftk.ops.dispatch import direct_lora_linear
from peftk.system import storage

_UNUSED = frozenset(VARIANT_KWARG_KEYS)  # arguments that plain LoRA ignores


class _CachedTable(NamedTuple):
    """A table, and the state of the adapters that it was built from."""

    state: list[Any]
    table: AdapterTable


class Linear(lora.Linear):
    """PEFT's lora.Linear with forward, merge and unmerge by peftk's kernels, if these can run.

    The base layer and the active adapters are one call, and so is a mixed batch. In all other cases PEFT's own code
    runs; `active` and `peft_merge.reason` say why.
    """

    undoes_merges = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch = peft_batch.current_batch(kwargs.pop("adapter_names", None))
        if not args and not (kwargs and kwargs.keys() - _UNUSED):
            y = self._forward_by_kernels(x, batch)
            if y is not None:
                return y
        if batch is not None:
            kwargs["adapter_names"] = batch.names
        return super().forward(x, *args, **kwargs)

    def _forward_by_kernels(self, x: Tensor, batch: Batch | None) -> Tensor | None:
        """y if our kernels can run the call, else None. In PEFT's order: disabled, mixed, merged, active."""
        if self._disable_adapters:
            return None  # PEFT calls the base layer itself, so outputs have the base model's bits
        base = peft_support.callable_base(cast(nn.Module, self._modules["base_layer"]))
        if isinstance(base, str) or peft_support.why_not(x, base[0], casts=self.cast_input_dtype_enabled) is not None:
            return None
        weight, bias = base
        if batch is not None and (len(x) != len(batch.names) or self.merged_adapters):
            return None  # PEFT raises
        if batch is not None:
            return self._mixed(x, base, batch)
        if self.merged_adapters:
            return layer_calls.base_linear(x, weight, bias)
        names = self._active_adapter
        adapters = self._adapters((names,) if isinstance(names, str) else names, weight)
        if isinstance(adapters, str):
            return None
        found = [adapter for adapter in adapters if adapter is not None]
        if not found:
            return layer_calls.base_linear(x, weight, bias)
        if len(found) > 1:
            if any(adapter.dropout_p for adapter in found):
                return None  # each has a mask of its own
            combined = _combine(found)
        else:
            combined = found[0]
            if combined[2] is not None or type(combined[3]) is not float:
                combined = _combine(found)
        lora_A, lora_B, bias_B, s, p = combined
        scaling = cast(float, s)
        if p == 0.0:
            y = direct_lora_linear(x, weight, bias, lora_A, lora_B, scaling, bias_B=bias_B)
            if y is not None:
                return y
        adapter, dropout = adapter_of(lora_A, lora_B, scaling, bias_B=bias_B), dropout_of(p, None, weight.device)
        return layer_calls.lora_linear(x, weight, bias, adapter, dropout=dropout)

    def active(self) -> tuple[Tensor, list[Factors]] | str:
        """W and the adapters (none while merged) of a call, or the reason why PEFT's own code would run it."""
        if "forward" in self.__dict__:
            return "the layer's forward was replaced"
        if self.disable_adapters:
            return "adapters are disabled, which leaves the base layer itself"
        base = peft_support.callable_base(self.base_layer)
        if isinstance(base, str):
            return base
        if self.merged:
            return base[0], []
        found = self._adapters(self.active_adapters, base[0])
        if isinstance(found, str):
            return found
        adapters = [adapter for adapter in found if adapter is not None]
        if len(adapters) > 1 and any(adapter.dropout_p for adapter in adapters):
            return "several adapters are active with dropout, each with a mask of its own"
        return base[0], adapters

    def _adapters(self, names: Sequence[str], weight: Tensor) -> list[Factors | None] | str:
        """The adapters of these names, None for one that the layer lacks; or the reason why PEFT's code must run."""
        found: list[Factors | None] = []
        for name in names:
            adapter = peft_support.factors(self, name, weight)
            if isinstance(adapter, str):
                return adapter
            found.append(adapter)
        return found

    def _mixed(self, x: Tensor, base: Base, batch: Batch) -> Tensor | None:
        weight, bias = base
        adapters = self._adapters(batch.unique, weight)
        if isinstance(adapters, str):
            return None
        dropouts = {adapter.dropout_p for adapter in adapters if adapter is not None}
        if len(dropouts) > 1:
            return None
        if not dropouts:
            return layer_calls.base_linear(x, weight, bias)
        ids = batch.ids().to(x.device) if torch.compiler.is_compiling() else batch.route.rows(x)
        bank, dropout = (
            self._table(batch.unique, adapters, weight.shape),
            dropout_of(dropouts.pop(), None, weight.device),
        )
        return layer_calls.multi_lora_linear(x, weight, bias, bank, ids, dropout=dropout)

    def _table(
        self, names: tuple[str, ...], adapters: list[Factors | None], shape: Sequence[int]
    ) -> AdapterTable | WithoutTable:
        """The table of the adapters, numbered by their index in `names`; rebuilt when one has moved.

        shape: [N, K] of the weight. Raises ValueError for an adapter that does not fit it.
        """
        present = [adapter for adapter in adapters if adapter is not None]
        device, tensors = present[0].lora_A.device, [tensor for a in present for tensor in a.tensors()]
        dtypes = {adapter.lora_A.dtype for adapter in present}
        folds = len(dtypes) > 1 or not all(_needs_no_copy(adapter) for adapter in present)
        if folds:
            adapters = [None if adapter is None else _combine([adapter]) for adapter in adapters]
        if torch.compiler.is_compiling() or not storage.dense(*tensors):
            return WithoutTable(tuple(map(_adapter, adapters)), device)
        state = [names, shape, *(None if adapter is None else _adapter_state(adapter) for adapter in adapters)]
        cached: _CachedTable | None = None if folds else self.__dict__.get("_peftk_table")
        if cached is None or cached.state != state:
            found = tuple(map(_adapter, adapters))
            checks.bank(found, (), *shape)
            built = table.build(found, dtype=torch.float32 if folds else dtypes.pop(), device=device)
            cached = self.__dict__["_peftk_table"] = _CachedTable(state, built)
        return cached.table

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, as in PEFT."""
        weight: Tensor = watched.weight_or_alias(self, super().weight)
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, untie: bool = False) -> None:
        """Merges as PEFT does, but several adapters in one pass over W; `unmerge` restores every bit.

        untie: until `unmerge`, merge into a copy of W, so that other modules that hold W keep theirs.

        Raises ValueError if W would not be finite, with and without safe_merge, or if another module of the accelerated
        model holds W too. Nothing has changed then.
        """
        names_to_merge = self.active_adapters if adapter_names is None else adapter_names
        with peft_merge.step(self) as undo:
            peft_merge.ensure_unshared(self, names_to_merge, untie, undo)
            if peft_merge.reason(self, names_to_merge) is not None:
                super().merge(safe_merge, adapter_names)
                return
            names = check_adapters_to_merge(self, adapter_names)
            if names:
                peft_merge.merge(self, names, undo)

    def unmerge(self) -> None:
        """Unmerges as PEFT does; what `merge` of this class merged is unmerged bit for bit."""
        with peft_merge.step(self) as undo:
            if self.merged_adapters:
                peft_merge.unmerge(self, super().unmerge, undo)
            else:
                super().unmerge()  # warns that nothing is merged

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_peftk_table"}  # it holds addresses


def _needs_no_copy(adapter: Factors) -> bool:
    """Whether a table can take the adapter's tensors as they are."""
    plain = adapter.bias_B is None and type(adapter.scaling) is float
    return plain and table.in_rows(adapter.lora_A) is adapter.lora_A


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.float()  # exact; the tensor itself if it is fp32


def _combine(adapters: Sequence[Factors]) -> Factors:
    """Combines adapters that are active together into one with scaling 1: factors side by side, s folded in, in fp32.

    For a single adapter in fp32, s is only folded into the bias: A and B are not copied, so a backward saves no copies.
    """
    bias = None
    for adapter in adapters:
        for name, tensor in zip(("lora_A", "lora_B", "bias_B"), adapter.tensors(), strict=True):
            if tensor is not None:
                checks.floating(name, tensor)
        if adapter.bias_B is not None:
            term = _fp32(adapter.bias_B) * adapter.scaling
            bias = term if bias is None else bias + term
    first = adapters[0]
    if len(adapters) == 1 and type(first.scaling) is float and first.lora_A.dtype is torch.float32:
        return first._replace(lora_A=table.in_rows(first.lora_A), bias_B=bias)
    lora_A = torch.cat([_fp32(adapter.lora_A) for adapter in adapters])
    lora_B = torch.cat([_fp32(adapter.lora_B) * adapter.scaling for adapter in adapters], dim=1)
    return Factors(lora_A, lora_B, bias, 1.0, adapters[0].dropout_p)


def _adapter(factors: Factors | None) -> Adapter:
    """The adapter for a table; one that adds nothing for None, which means that the layer lacks it."""
    if factors is None:
        return Adapter((), (), 1.0)
    return Adapter((factors.lora_A,), (factors.lora_B,), factors.scaling, bias_B=factors.bias_B)  # type: ignore[arg-type]


def _adapter_state(factors: Factors) -> tuple[Any, ...]:
    """Everything about an adapter that a table depends on, including which tensors it has: the table keeps them."""
    A, B = factors.lora_A, factors.lora_B
    return (factors.scaling, id(A), *table.place(A), id(B), *table.place(B))


class LoraModel(PeftLoraModel):
    """PEFT's LoraModel, but layers that are added later are accelerated too, and mixed batches can train.

    Operations change all layers, or if something is raised, none.
    """

    unload = atomic(PeftLoraModel.unload)
    set_adapter = atomic(PeftLoraModel.set_adapter)
    delete_adapter = atomic(PeftLoraModel.delete_adapter)
    add_weighted_adapter = atomic(PeftLoraModel.add_weighted_adapter)

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        with all_or_none(self):
            super().inject_adapter(model, *args, **kwargs)
            peft_merge.note_shared(self.model)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, untie: bool = False
    ) -> None:
        """Merges as PEFT does, but refuses to merge into weights that other modules hold too (tied embeddings).

        untie: merges into copies of these instead, until `unmerge_adapter`.

        Raises ValueError for a shared weight, or if a W would not be finite; no layer has changed then.
        """
        with peft_merge.merging_all(self, adapter_names, untie=untie):
            super().merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        with peft_merge.unmerging_all(self):
            super().unmerge_adapter()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        untie: bool = False,
    ) -> nn.Module:
        """Does what PEFT does. untie and errors are as in `merge_adapter`."""
        with peft_merge.merging_all(self, adapter_names, untie=untie):
            merged: nn.Module = super().merge_and_unload(progressbar, safe_merge, adapter_names)
            return merged

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        module: nn.Module = PeftLoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        swap(module)
        return module

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        names = kwargs.get("adapter_names")
        if names is None:
            return super()._enable_peft_forward_hooks(*args, **kwargs)
        # PEFT refuses names if this module's `training` is True, so use a copy in eval mode with the same modules
        evaluating = PeftLoraModel.__new__(PeftLoraModel)
        evaluating.__dict__.update(self.__dict__, training=False)
        return self._mixed_batch(evaluating._enable_peft_forward_hooks(*args, **kwargs), names)

    @contextlib.contextmanager
    def _mixed_batch(self, hooks: contextlib.AbstractContextManager[None], names: Sequence[str]) -> Iterator[None]:
        if torch.is_grad_enabled():
            for module in self.modules():
                _reduce_unused(module)
                if type(module) is not Linear and isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)):
                    _add_names_hook(module)
        hooks.__enter__()
        try:
            with peft_batch.share_batch(names):
                yield
        finally:
            hooks.__exit__(None, None, None)  # without the exception, as PEFT would not remove its hooks then


def _reduce_unused(module: nn.Module) -> None:
    """Tells FSDP2 that ranks may train different adapters: else ranks would reduce different lists of gradients."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is not None and isinstance(module, kind) and hasattr(module, "set_reduce_scatter_unused_params"):
        module.set_reduce_scatter_unused_params(True, recurse=False)  # from torch 2.13 on


def _add_names_hook(module: nn.Module) -> None:
    """Gives a layer that stays PEFT's a hook that passes it the names when a checkpoint runs it again."""
    if _pass_names_again not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_pass_names_again, with_kwargs=True, prepend=True)


def _pass_names_again(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    batch = peft_batch.current_batch(kwargs.get("adapter_names"))
    return None if batch is None else (args, {**kwargs, "adapter_names": batch.names})


def swap(model: nn.Module) -> int:
    """Replaces PEFT's classes in `model` by ours. Returns how many modules have our classes then."""
    count = 0
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = Linear
        elif type(module) is PeftLoraModel:
            module.__class__ = LoraModel
        count += type(module) in (Linear, LoraModel)
    return count


def wrapped_model(model: nn.Module) -> nn.Module:
    """The model inside of PEFT's LoraModel, whose names checkpoints use; the model itself if there is no LoraModel."""
    return next((module.model for module in model.modules() if isinstance(module, PeftLoraModel)), model)


def swap_back(model: nn.Module) -> int:
    """Undoes `swap`. Returns how many modules had our classes.

    Raises ValueError if a layer is merged by peftk; nothing has changed then.
    """
    for name, module in model.named_modules():
        if type(module) is Linear and peft_merge.live_receipts(module):
            raise ValueError(
                f"peft_model: expected unmerged layers, got {name} with {', '.join(module.merged_adapters)} merged by "
                "peftk, which PEFT could not unmerge exactly; call unmerge_adapter() first"
            )
    count = 0
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _pass_names_again]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        count += type(module) in (Linear, LoraModel)
        if type(module) is Linear:
            module.__class__ = lora.Linear  # type: ignore[assignment]
            for name in [name for name in module.__dict__ if name.startswith("_peftk_")]:
                del module.__dict__[name]
        elif type(module) is LoraModel:
            module.__class__ = PeftLoraModel  # type: ignore[assignment]
    return count

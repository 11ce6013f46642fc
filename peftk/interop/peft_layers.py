"""The classes that a PEFT model's layers get from `peftk.accelerate`. Imported where there is such a model: needs peft.

They are subclasses of PEFT's own under PEFT's names, which add no state but what says `_peftk_`: a layer changes its
class and stays what it is.
"""

from __future__ import annotations

import contextlib
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
from peftk.adapters.table import AdapterTable
from peftk.interop import peft_batch, peft_merge, peft_support
from peftk.interop.peft_batch import Batch
from peftk.interop.peft_support import Base, Factors
from peftk.interop.peft_whole import all_or_none, whole
from peftk.nn import watched
from peftk.ops.dispatch import direct_lora_linear
from peftk.ops.layer_calls import base_linear_unchecked, lora_linear_unchecked, multi_lora_linear_unchecked
from peftk.system import storage

_UNUSED = frozenset(VARIANT_KWARG_KEYS)  # what plain LoRA is given and does not look at


class _Made(NamedTuple):
    """A table, and where the adapters lay that it was made of."""

    where: list[Any]
    table: AdapterTable


class _Untabled(NamedTuple):
    """Adapters for torch.compile and for torch itself, which take tensors rather than a table of addresses."""

    adapters: tuple[Adapter | None, ...]
    device: torch.device
    columns: tuple[int, ...] = ()

    def table(self) -> None:
        """What `AdapterBank.table` gives where no kernel can read an adapter."""


class Linear(lora.Linear):
    """PEFT's lora.Linear with forward, merge and unmerge by peftk's kernels where they can run.

    Base layer and active adapters are one call, and so is a mixed batch. What `reason` names keeps PEFT's own code.
    """

    undoes_merges = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch = peft_batch.at_hand(kwargs.pop("adapter_names", None))
        if not args and not (kwargs and kwargs.keys() - _UNUSED):
            y = self._served(x, batch)
            if y is not None:
                return y
        if batch is not None:
            kwargs["adapter_names"] = batch.names
        return super().forward(x, *args, **kwargs)

    def _served(self, x: Tensor, batch: Batch | None) -> Tensor | None:
        """y where our kernels run the call, None where they do not. PEFT's order: disabled, mixed, merged, active."""
        if self._disable_adapters:
            return None  # the base layer itself, so that outputs are the base model's to the bit
        base = peft_support.runs(cast(nn.Module, self._modules["base_layer"]))
        if isinstance(base, str) or peft_support.takes(x, base[0], casts=self.cast_input_dtype_enabled) is not None:
            return None
        weight, bias = base
        if batch is not None and (len(x) != len(batch.names) or self.merged_adapters):
            return None  # PEFT says what is wrong
        if batch is not None:
            return self._mixed(x, base, batch)
        if self.merged_adapters:
            return base_linear_unchecked(x, weight, bias)
        names = self._active_adapter
        adapters = self._adapters((names,) if isinstance(names, str) else names, weight)
        if isinstance(adapters, str):
            return None
        found = [adapter for adapter in adapters if adapter is not None]
        if not found:
            return base_linear_unchecked(x, weight, bias)
        if len(found) > 1:
            if any(adapter.dropout_p for adapter in found):
                return None  # a mask for each
            one = _together(found)
        else:
            one = found[0]
            if one[2] is not None or type(one[3]) is not float:
                one = _together(found)
        lora_A, lora_B, bias_B, s, p = one
        scaling = cast(float, s)
        if p == 0.0:
            y = direct_lora_linear(x, weight, bias, lora_A, lora_B, scaling, bias_B=bias_B)
            if y is not None:
                return y
        adapter, dropout = adapter_of(lora_A, lora_B, scaling, bias_B=bias_B), dropout_of(p, None, weight.device)
        return lora_linear_unchecked(x, weight, bias, adapter, dropout=dropout)

    def active(self) -> tuple[Tensor, list[Factors]] | str:
        """What a call would compute with now, W and adapters (none while merged), or why that is PEFT's."""
        if "forward" in self.__dict__:
            return "the layer's forward was replaced"
        if self.disable_adapters:
            return "adapters are disabled, which leaves the base layer itself"
        base = peft_support.runs(self.base_layer)
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
        """Those of the names, None for one that the layer lacks; or the reason why they are PEFT's to compute."""
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
            return base_linear_unchecked(x, weight, bias)
        ids = batch.ids().to(x.device) if torch.compiler.is_compiling() else batch.route.rows(x)
        made, dropout = (
            self._table(batch.unique, adapters, weight.shape),
            dropout_of(dropouts.pop(), None, weight.device),
        )
        return multi_lora_linear_unchecked(x, weight, bias, made, ids, dropout=dropout)

    def _table(self, names: tuple[str, ...], adapters: list[Factors | None], shape: Sequence[int]) -> Any:
        """What the kernels read of the adapters, by their place in `names`; made anew when one has moved.

        shape: [N, K] of the weight. Raises ValueError for an adapter that doesn't fit it.
        """
        present = [adapter for adapter in adapters if adapter is not None]
        device, tensors = present[0].lora_A.device, [tensor for a in present for tensor in a.tensors()]
        dtypes = {adapter.lora_A.dtype for adapter in present}
        folds = len(dtypes) > 1 or not all(_as_it_lies(adapter) for adapter in present)
        if folds:
            adapters = [None if adapter is None else _together([adapter]) for adapter in adapters]
        if torch.compiler.is_compiling() or not storage.dense(*tensors):
            return _Untabled(tuple(map(_adapter, adapters)), device)
        where = [names, shape, *(None if adapter is None else _where(adapter) for adapter in adapters)]
        made: _Made | None = None if folds else self.__dict__.get("_peftk_table")
        if made is None or made.where != where:
            found = tuple(map(_adapter, adapters))
            checks.bank(found, (), *shape)
            built = table.build(found, dtype=torch.float32 if folds else dtypes.pop(), device=device)
            made = self.__dict__["_peftk_table"] = _Made(where, built)
        return made.table

    @property
    def weight(self) -> Tensor:
        """As PEFT's: the base layer's, for which other modules ask."""
        weight: Tensor = watched.weight_or_alias(self, super().weight)
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, untie: bool = False) -> None:
        """As PEFT's, several adapters in one pass over W; `unmerge` gives back every bit.

        untie: into a copy of W, which leaves alone whatever else holds W, until `unmerge`.

        Raises ValueError where W would not be finite, with and without safe_merge, or where another module of the model
        that was accelerated holds W, too; nothing has changed then.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        with peft_merge.step(self) as undo:
            peft_merge.alone(self, wanted, untie, undo)
            if peft_merge.reason(self, wanted) is not None:
                super().merge(safe_merge, adapter_names)
                return
            names = check_adapters_to_merge(self, adapter_names)
            if names:
                peft_merge.merge(self, names, undo)

    def unmerge(self) -> None:
        """As PEFT's; what `merge` above has merged comes out exactly."""
        with peft_merge.step(self) as undo:
            if self.merged_adapters:
                peft_merge.unmerge(self, super().unmerge, undo)
            else:
                super().unmerge()  # which says so

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_peftk_table"}  # it holds addresses


def _as_it_lies(adapter: Factors) -> bool:
    """Whether a table can take an adapter without a copy."""
    plain = adapter.bias_B is None and type(adapter.scaling) is float
    return plain and table.in_rows(adapter.lora_A) is adapter.lora_A


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float()  # exact; the tensor itself where it is fp32


def _together(adapters: Sequence[Factors]) -> Factors:
    """Several adapters that are active together as one, scaling 1: the factors side by side, s folded in, in fp32.

    Of a single one in fp32 it is enough to fold s into the bias: A and B stay where they lie, and so a backward saves
    no copies.
    """
    bias = None
    for adapter in adapters:
        for name, tensor in zip(("lora_A", "lora_B", "bias_B"), adapter.tensors(), strict=True):
            if tensor is not None:
                checks.floating(name, tensor)
        if adapter.bias_B is not None:
            term = _wide(adapter.bias_B) * adapter.scaling
            bias = term if bias is None else bias + term
    first = adapters[0]
    if len(adapters) == 1 and type(first.scaling) is float and first.lora_A.dtype is torch.float32:
        return first._replace(lora_A=table.in_rows(first.lora_A), bias_B=bias)
    lora_A = torch.cat([_wide(adapter.lora_A) for adapter in adapters])
    lora_B = torch.cat([_wide(adapter.lora_B) * adapter.scaling for adapter in adapters], dim=1)
    return Factors(lora_A, lora_B, bias, 1.0, adapters[0].dropout_p)


def _adapter(factors: Factors | None) -> Adapter:
    """For a table; one that adds nothing where the layer lacks an adapter."""
    if factors is None:
        return Adapter((), (), 1.0)
    return Adapter((factors.lora_A,), (factors.lora_B,), factors.scaling, bias_B=factors.bias_B)  # type: ignore[arg-type]


def _where(factors: Factors) -> tuple[Any, ...]:
    """All that a table says of an adapter. The table keeps the tensors too, which may be others at the same address."""
    A, B = factors.lora_A, factors.lora_B
    return (factors.scaling, id(A), *table.place(A), id(B), *table.place(B))


class LoraModel(PeftLoraModel):
    """PEFT's LoraModel whose new layers are accelerated too, and whose mixed batches train.

    What it does with its layers it does with all of them, or where something is raised with none.
    """

    unload = whole(PeftLoraModel.unload)
    set_adapter = whole(PeftLoraModel.set_adapter)
    delete_adapter = whole(PeftLoraModel.delete_adapter)
    add_weighted_adapter = whole(PeftLoraModel.add_weighted_adapter)

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        with all_or_none(self):
            super().inject_adapter(model, *args, **kwargs)
            peft_merge.note_shared(self.model)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, untie: bool = False
    ) -> None:
        """As PEFT's, but that it refuses to merge into what another module holds, too (tied embeddings).

        untie: merge into a copy of it then, until `unmerge_adapter`.

        Raises ValueError for a shared weight, or where a W would not be finite; no layer has changed then.
        """
        with peft_merge.together(self, adapter_names, untie=untie):
            super().merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        with peft_merge.apart(self):
            super().unmerge_adapter()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        untie: bool = False,
    ) -> nn.Module:
        """As PEFT's; untie and what is raised as in `merge_adapter`."""
        with peft_merge.together(self, adapter_names, untie=untie):
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
        # PEFT refuses names where this module says that it trains; so another says it, with the same modules inside
        evaluating = PeftLoraModel.__new__(PeftLoraModel)
        evaluating.__dict__.update(self.__dict__, training=False)
        return self._mixed_batch(evaluating._enable_peft_forward_hooks(*args, **kwargs), names)

    @contextlib.contextmanager
    def _mixed_batch(self, hooks: contextlib.AbstractContextManager[None], names: Sequence[str]) -> Iterator[None]:
        if torch.is_grad_enabled():
            for module in self.modules():
                if type(module) is not Linear and isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)):
                    _remind(module)
        hooks.__enter__()
        try:
            with peft_batch.entered(names):
                yield
        finally:
            hooks.__exit__(None, None, None)  # PEFT leaves its hooks behind where it sees an exception


def _remind(module: nn.Module) -> None:
    """A layer that stays PEFT's gets a hook that gives it the names again when a checkpoint runs it again."""
    if _names_again not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_names_again, with_kwargs=True, prepend=True)


def _names_again(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    batch = peft_batch.at_hand(kwargs.get("adapter_names"))
    return None if batch is None else (args, {**kwargs, "adapter_names": batch.names})


def swap(model: nn.Module) -> int:
    """Gives PEFT's classes in `model` ours; returns how many modules are ours then."""
    count = 0
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = Linear
        elif type(module) is PeftLoraModel:
            module.__class__ = LoraModel
        count += type(module) in (Linear, LoraModel)
    return count


def inside(model: nn.Module) -> nn.Module:
    """What PEFT's LoraModel has been put around, whose names are those of checkpoints; else the model itself."""
    return next((module.model for module in model.modules() if isinstance(module, PeftLoraModel)), model)


def swap_back(model: nn.Module) -> int:
    """The opposite; returns how many were ours. Raises ValueError where a layer is merged, before anything changes."""
    for name, module in model.named_modules():
        if type(module) is Linear and peft_merge.live(module):
            raise ValueError(
                f"peft_model: expected unmerged layers, got {name} with {', '.join(module.merged_adapters)} merged by "
                "peftk, which PEFT could not unmerge exactly; call unmerge_adapter() first"
            )
    count = 0
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _names_again]:
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

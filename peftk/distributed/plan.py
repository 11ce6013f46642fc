"""`parallelize`: tensor parallelism of a whole model by the plan that transformers models bring along."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from peftk.distributed import layers, styles
from peftk.distributed.styles import ColwiseParallel, RowwiseParallel, Style
from peftk.interop.peft_model import has_lora
from peftk.methods.plan import unwrapped
from peftk.nn.llama_adapter import LlamaAdapter

Model = TypeVar("Model", bound=nn.Module)


class _Kept(NamedTuple):
    """A style that leaves a module as it is."""


# transformers' names (its distributed/tensor_parallel.py) of what can be done here
_STYLES: dict[str, Any] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "replicate": _Kept,
}


def parallelize(model: Model, mesh: DeviceMesh, plan: Mapping[str, str | Style] | None = None) -> Model:
    """Shards a model with adapters over the ranks of a mesh, in place, by the model's own tensor-parallel plan.

    Every rank calls it with the same model. A linear of the plan is split with its adapters; what the plan does not
    name stays whole on every rank, and trains there with the same gradients. The values are those of the first rank.

    Args:
        model: injected (`peftk.inject`), served (`MultiAdapter.model`), or a PeftModel with LoRA, accelerated or not.
        mesh: of one dimension.
        plan: names of modules ("*" stands for a number) → a style, or its name in transformers ("colwise",
            "colwise_gather_output", "rowwise", "rowwise_split_input", "embedding_rowwise", "replicate"). None takes the
            model's `tp_plan`, as transformers gives it.

    Returns:
        The same object.

    Raises:
        TypeError, ValueError, NotImplementedError: no plan, a style or a layer that cannot be sharded, a width that the
            ranks cannot share, attention heads that they cannot share. The model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, got {mesh.ndim}; pass mesh['tp']")
    base = _base_of(model)
    chosen = _chosen(base, _plan_of(base) if plan is None else plan)
    for name, style in chosen.items():
        _check(base, name, style, mesh)
    for name, style in chosen.items():
        parallelize_module(base.get_submodule(name), mesh, style)
    return model


def _base_of(model: nn.Module) -> nn.Module:
    """The module whose names the plan uses: that inside of PEFT's and other wrappers."""
    if has_lora(model):
        from peftk.interop.peft_layers import wrapped_model

        return wrapped_model(model)
    return unwrapped(model)


def _plan_of(model: Any) -> Mapping[str, str]:
    plan = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if not plan:
        raise ValueError(f"plan: expected one, as {type(model).__name__} has no tp_plan of its own, got None")
    return dict(plan)


def _chosen(model: nn.Module, plan: Mapping[str, str | Style]) -> dict[str, Style]:
    """The style of every module that the plan names. Raises ValueError or TypeError for a bad plan."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    chosen: dict[str, Style] = {}
    matched = False
    for pattern, asked in plan.items():
        named = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        names = [name for name in modules if named.fullmatch(name)]
        style = _style(pattern, asked) if names or any(map(named.fullmatch, parameters)) else None
        if style is None:  # plans of model classes name parts that a model need not have
            continue
        if not names:
            raise ValueError(f"plan: expected names of modules, got {pattern!r}, a Parameter")
        matched = True
        if not isinstance(style, _Kept):
            chosen |= dict.fromkeys(names, style)
    if not matched:
        raise ValueError(f"plan: expected names of modules of {type(model).__name__}, got {', '.join(plan) or 'none'}")
    return chosen


def _style(pattern: str, asked: str | Style) -> Style | _Kept:
    if isinstance(asked, ColwiseParallel | RowwiseParallel):
        return asked
    if not isinstance(asked, str):
        raise TypeError(
            f"plan: {pattern}: expected a name, or ColwiseParallel or RowwiseParallel of peftk.distributed, got "
            f"{type(asked).__module__}.{type(asked).__name__}"
        )
    if asked not in _STYLES:
        raise ValueError(f"plan: {pattern}: expected one of {', '.join(_STYLES)}, got {asked!r}")
    style: Style | _Kept = _STYLES[asked]()
    return style


def _check(model: nn.Module, name: str, style: Style, mesh: DeviceMesh) -> None:
    """Raises if a module cannot be sharded, or if the module around it could not compute with a part of its output."""
    module, around = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    if not layers.is_ours(module) and type(module) not in (nn.Linear, nn.Embedding):
        raise TypeError(f"{name}: expected a linear or an embedding, got {type(module).__name__}")
    styles.check(style, module, name, mesh)
    if any(isinstance(child, LlamaAdapter) for child in around.children()):
        raise NotImplementedError(
            f"{name}: expected attention without a LlamaAdapter, whose gates are per head, got one"
        )
    trained = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    own = set(module.modules())
    for other, owner in model.named_modules():
        if owner not in own and any(id(parameter) in trained for parameter in owner._parameters.values()):
            raise NotImplementedError(f"{name}: expected Parameters that no other module trains, got {other}'s too")
    if isinstance(module, nn.Linear):
        layers.check_plain(module, name, mesh, isinstance(style, ColwiseParallel))
    width = getattr(around, "head_dim", None)
    split = isinstance(style, ColwiseParallel) and style.output_layouts == (Shard(-1),)
    out: Any = getattr(module, "out_features", None)
    if split and isinstance(width, int) and out is not None and out % (width * mesh.size()):
        raise ValueError(
            f"{name}: expected heads that {mesh.size()} ranks can share, got {out // width} heads of width {width}"
        )

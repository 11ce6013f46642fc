"""Reads and writes AdapterHub's checkpoints of bottleneck adapters (those of the adapters library).

A checkpoint is a folder with `adapter_config.json`, {"config": the fields of a BnConfig, "name", "model_type",
"hidden_size", "model_class", "model_name", "version"}, and `adapter.safetensors` (`save_adapter(…,
use_safetensors=True)`), with keys

    <module>.adapters.<name>.adapter_down.0.weight [R, d]   ….bias [R]      A, a
    <module>.adapters.<name>.adapter_up.weight [d, R]       ….bias [d]      B, b

where <module> is `encoder.layer.3.output`, `h.3.output_adapters`, … (`peftk.methods.adapterhub`), with or without the
base model's prefix. AdapterHub's adapter computes s·(B act(A v + a) + b), so β = s·b. Source: adapters 1.3, loading.py,
methods/bottleneck.py and modeling.py.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftk.checkpoints import files
from peftk.checkpoints.contents import AnyPath, Contents, Origin, about_of
from peftk.checkpoints.files import CONFIG_FILE, CheckpointError
from peftk.methods.adapterhub import AFTER_NORM, BEFORE_NORM, PARALLEL, SERIES, AdapterHubConfig, as_adapterhub
from peftk.methods.plan import injections

WEIGHTS_FILE = "adapter.safetensors"
VERSION = "adapters.1.3.0"  # of the format; in checkpoints without a version, "gelu" means a different function
_PARTS = {
    "adapter_down.0.weight": "lora_A",
    "adapter_down.0.bias": "bias_A",
    "adapter_up.weight": "lora_B",
    "adapter_up.bias": "bias_B",
}
_ACTIVATIONS = {
    **{"relu": "relu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"},
    **{"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "swish": "silu", "linear": "identity"},
}
_THEIRS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "swish", "identity": "linear"}
_LEGACY = {"gelu": "gelu_new", "gelu_orig": "gelu"}

# The fields of a BnConfig that express each placement.
_SAYS: dict[str, dict[str, Any]] = {
    SERIES: {"original_ln_before": False, "original_ln_after": True, "residual_before_ln": True},
    BEFORE_NORM: {"original_ln_before": True, "original_ln_after": True, "residual_before_ln": True},
    AFTER_NORM: {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False},
    PARALLEL: {"original_ln_before": False, "original_ln_after": True, "residual_before_ln": True},
}
# Fields that have no effect if the others have the supported values.
_IDLE = {
    *("init_weights", "init_weights_seed", "adapter_residual_before_ln", "inv_adapter_reduction_factor"),
    *("phm_dim", "phm_c_init", "phm_init_range", "phm_rank", "phm_bias", "learn_phm", "hypercomplex_nonlinearity"),
    *("factorized_phm_W", "factorized_phm_rule", "shared_W_phm", "shared_phm_rule"),
}
_MEANT = {
    *("mh_adapter", "output_adapter", "cross_adapter", "reduction_factor", "non_linearity", "scaling", "leave_out"),
    *("is_parallel", "original_ln_before", "original_ln_after", "residual_before_ln"),
}


@dataclasses.dataclass(frozen=True)
class LoadedBottlenecks:
    """A checkpoint of bottleneck adapters, checked for consistency.

    adapters: for each of AdapterHub's modules, the tensors by our names. about: the base model's name, as in a PEFT
    config, if the checkpoint has one.
    """

    path: Path
    config: AdapterHubConfig
    adapters: Mapping[str, Mapping[str, Tensor]]
    about: Mapping[str, str]


def load(path: str | os.PathLike[str]) -> LoadedBottlenecks:
    """Reads a checkpoint of bottleneck adapters.

    Raises CheckpointError for a missing, truncated or corrupt file, for any other method, for a bottleneck adapter with
    anything more (a learned scaling, a LayerNorm or a gate of its own, PHM layers, invertible adapters, dropout, other
    placements), and for tensors that do not belong together.
    """
    folder = files.folder(path)
    outer = files.read_config(folder)
    name = outer.get("name")
    if not isinstance(name, str) or not name or "." in name:
        raise CheckpointError(f"{folder / CONFIG_FILE}: expected name to be an adapter's name, got {name!r}")
    config = _config(folder / CONFIG_FILE, outer)
    tensors = files.read_weights(folder, WEIGHTS_FILE, pickled="pytorch_adapter.bin")
    adapters: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, between, part = key.rpartition(f".adapters.{name}.")
        if not between or part not in _PARTS:
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE}: expected keys <module>.adapters.{name}.adapter_{{down.0,up}}.…, got {key!r}"
            )
        files.finite_floats(folder / WEIGHTS_FILE, key, tensor)
        adapters.setdefault(module, {})[_PARTS[part]] = tensor
    for module, parts in adapters.items():
        _check(folder / WEIGHTS_FILE, module, parts)
        # in fp64, so that it is rounded only once, when it is copied into the adapter
        parts["bias_B"] = parts["bias_B"].double() * config.scaling
    about = files.about({"base_model_name_or_path": outer.get("model_name") or None}, folder / CONFIG_FILE)
    return LoadedBottlenecks(folder, config, adapters, about)


def save(
    path: str | os.PathLike[str],
    config: AdapterHubConfig,
    adapters: Mapping[str, Mapping[str, Tensor]],
    about: Mapping[str, Any],
    name: str = "default",
) -> None:
    """Writes a checkpoint that the adapters library reads (`load_adapter(path, use_safetensors=True)`).

    adapters: as in `LoadedBottlenecks`. about: model_type, hidden_size, model_class, model_name. b = β / s is computed
    in fp64 and rounded once to the adapter's dtype. Raises ValueError if scaling is 0, as then no b gives β. A failure
    leaves an earlier checkpoint as it was.
    """
    if config.scaling == 0:
        raise ValueError("scaling: expected a number other than 0, as AdapterHub's b = β / s, got 0")
    weights = {}
    for module, parts in adapters.items():
        for theirs, ours in _PARTS.items():
            tensor = parts[ours].detach()
            if ours == "bias_B":
                tensor = (tensor.double() / config.scaling).to(tensor.dtype)
            weights[f"{module}.adapters.{name}.{theirs}"] = tensor
    factor = config.reduction_factor
    fields = {
        "mh_adapter": config.mh_adapter,
        "output_adapter": config.output_adapter,
        "cross_adapter": config.cross_adapter,
        "reduction_factor": dict(factor) if isinstance(factor, Mapping) else factor,
        "non_linearity": _THEIRS[config.activation],
        "scaling": float(config.scaling),
        "leave_out": list(config.leave_out),
        "is_parallel": config.placement == PARALLEL,
        "ln_before": False,
        "ln_after": False,
        "adapter_residual_before_ln": False,
        "use_gating": False,
        "phm_layer": False,
        "inv_adapter": None,
        "dropout": 0.0,
        "init_weights": "bert",
        **_SAYS[config.placement],
    }
    outer = {"config": fields, "name": name, "version": VERSION, **about}
    files.write(path, outer, WEIGHTS_FILE, weights)


def _config(file: Path, outer: Mapping[str, Any]) -> AdapterHubConfig:
    fields = outer.get("config")
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: expected config to be the fields of a BnConfig, got {fields!r}")
    if fields.get("architecture") is not None:
        raise CheckpointError(f"{file}: expected bottleneck adapters, got architecture {fields['architecture']!r}")
    missing = sorted({"mh_adapter", "output_adapter", "reduction_factor", "non_linearity"} - fields.keys())
    if missing:
        raise CheckpointError(f"{file}: expected the fields of a BnConfig, got none of {', '.join(missing)}")
    unsupported = {k: v for k, v in fields.items() if v and k not in _IDLE and k not in _MEANT}
    if unsupported:
        found = ", ".join(f"{field}={value!r}" for field, value in sorted(unsupported.items()))
        raise CheckpointError(f"{file}: expected an adapter s·act(vAᵀ + a)Bᵀ + β and nothing more, got {found}")
    scaling = fields.get("scaling", 1.0)
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise CheckpointError(f"{file}: expected scaling to be a number, got {scaling!r}")
    activation = fields["non_linearity"]
    if not isinstance(activation, str):
        raise CheckpointError(f"{file}: expected non_linearity to be a name, got {activation!r}")
    if "version" not in outer:
        activation = _LEGACY.get(activation, activation)
    ours = _ACTIVATIONS.get(activation.lower())
    if ours is None:
        raise CheckpointError(f"{file}: expected non_linearity one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    try:
        return AdapterHubConfig(
            mh_adapter=bool(fields["mh_adapter"]),
            output_adapter=bool(fields["output_adapter"]),
            cross_adapter=bool(fields.get("cross_adapter")),
            reduction_factor=fields["reduction_factor"],
            placement=_placement(file, fields),
            activation=ours,
            scaling=float(scaling),
            leave_out=fields.get("leave_out") or (),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{file}: {error}") from error


def _placement(file: Path, fields: Mapping[str, Any]) -> str:
    says = {name: fields.get(name, default) for name, default in _SAYS[SERIES].items()}  # BnConfig's defaults
    if fields.get("is_parallel"):
        if says["original_ln_after"] is True:
            return PARALLEL
    elif says["original_ln_before"] is False and says["original_ln_after"] is True:
        if says["residual_before_ln"] in (True, False):  # has no effect without a LayerNorm before the adapter
            return SERIES
    else:
        for placement in (BEFORE_NORM, AFTER_NORM):
            if says == _SAYS[placement]:
                return placement
    found = ", ".join(f"{name}={value!r}" for name, value in {"is_parallel": fields.get("is_parallel"), **says}.items())
    raise CheckpointError(f"{file}: expected a placement that keeps the model's own skip exactly once, got {found}")


def _check(where: Path, module: str, parts: Mapping[str, Tensor]) -> None:
    missing = [theirs for theirs, ours in _PARTS.items() if ours not in parts]
    if missing:
        raise CheckpointError(f"{where}: {module}: expected {missing[0]}, got only {len(parts)} tensors of the adapter")
    A, B, a, b = (parts[name] for name in ("lora_A", "lora_B", "bias_A", "bias_B"))
    fits = A.dim() == 2 and B.shape == A.shape[::-1] and a.shape == A.shape[:1] and b.shape == A.shape[1:]
    if not fits or not A.numel():
        raise CheckpointError(
            f"{where}: {module}: expected down [R, d], its bias [R], up [d, R] and its bias [d], "
            f"got {list(A.shape)}, {list(a.shape)}, {list(B.shape)} and {list(b.shape)}"
        )


def contents_of(model: nn.Module, loaded: LoadedBottlenecks) -> Contents:
    """What the checkpoint brings to a model with adapters. Raises CheckpointError if it does not fit them."""
    try:
        ours, modules = _adapterhub(model)
    except ValueError as error:
        raise CheckpointError(f"{loaded.path}: expected a model with only bottleneck adapters: {error}") from error
    for field in ("placement", "activation", "scaling"):
        theirs, of_model = getattr(loaded.config, field), getattr(ours, field)
        if theirs != of_model:
            raise CheckpointError(f"{loaded.path}: expected the model's {field}, {of_model!r}, got {theirs!r}")
    # a checkpoint of a model with a head fits its base model, and the reverse
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = {key.removeprefix(prefix): module for key, module in modules.items()}
    adapters = {key.removeprefix(prefix): parts for key, parts in loaded.adapters.items()}
    files.same_names(loaded.path, "adapters in exactly the model's places", adapters, modules)
    tensors = {f"{modules[key]}.{part}": tensor for key, parts in adapters.items() for part, tensor in parts.items()}
    return Contents(tensors, {}, Origin(loaded.about))


def save_model(model: nn.Module, path: AnyPath) -> None:
    """Saves a model's bottleneck adapters. Raises ValueError if the format cannot hold what was injected."""
    try:
        config, modules = _adapterhub(model)
    except ValueError as error:
        raise ValueError(f"format: expected what a checkpoint of AdapterHub can hold: {error}") from error
    adapters = {key: dict(model.get_submodule(module).named_parameters()) for key, module in modules.items()}
    about = {
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "model_class": type(model).__name__,
        "model_name": about_of(model)["base_model_name_or_path"] or "",
        "hidden_size": next(iter(adapters.values()))["lora_A"].shape[1],
    }
    save(path, config, adapters, about)


def _adapterhub(model: nn.Module) -> tuple[AdapterHubConfig, dict[str, str]]:
    """The model's only method as AdapterHub describes it. Raises ValueError if it cannot, or there are several."""
    records = injections(model)
    if len(records) != 1:
        raise ValueError(
            f"model: expected one method, got {', '.join(type(r.config).__name__ for r in records) or 'none'}"
        )
    return as_adapterhub(model, records[0].config)

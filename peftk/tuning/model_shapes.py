"""The sizes of a model's linears, from its transformers config. No weight is read, and none is made."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from peftk.nn.replace import as_linear, fan_in_fan_out, is_linear, plain
from peftk.system import extras


class ModelShapes(NamedTuple):
    """name: of the model's class. sizes: (N, K) of its linears, each once, the most weights first. dtype: of W."""

    name: str
    sizes: tuple[tuple[int, int], ...]
    dtype: torch.dtype


def of_config(path: Path) -> ModelShapes:
    """path: a config.json of transformers, or a folder with one.

    The linears are those of the model without a head. dtype: the config's if that is a 16-bit one, else bf16, in which
    an fp32 model runs under autocast.

    Raises ValueError if that is not such a config, or one of a model without linears; MissingExtraError without
    transformers.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"model: expected a config.json of transformers or a folder with one, got {path}")
    extras.require("demo", "tune --model", ["transformers"])
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(file)
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"model: expected a config of a model that transformers has, got {file}: {error}") from error
    found = {_size(module) for module in model.modules() if is_linear(module) and plain(module)}
    sizes = sorted(found, key=lambda size: (-size[0] * size[1], size))
    if not sizes:
        raise ValueError(f"model: expected a model with linear layers, got {type(model).__name__} of {file}")
    stored = getattr(config, "dtype", None)
    dtype = stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
    return ModelShapes(type(model).__name__, tuple(sizes), dtype)


def _size(linear: nn.Module) -> tuple[int, int]:
    first, second = as_linear(linear).weight.shape
    return (second, first) if fan_in_fan_out(linear) else (first, second)

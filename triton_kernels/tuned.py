"""Which plan serves a class of shapes on this GPU: the one that `peftk tune` found here, else the shipped table's.

What was found lies in gpu.json (`peftk.system.cache`), by GPU, and holds for the versions of triton and peftk that it
was made with. It is read once, so a choice never changes within a process except by tuning.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from peftk.system import cache
from peftk.system.version import __version__

from . import config
from .arithmetic import INTERPRETED

_FILE = "gpu.json"

P = TypeVar("P", config.Plan, config.Wgrad)


class WgradShape(NamedTuple):
    """The class of shapes that share a tile of `lora_wgrad`."""

    pages: int
    many: bool
    wide: bool
    x: torch.dtype

    def key(self) -> str:
        words = ["wgrad", "many" if self.many else "one", str(self.x).removeprefix("torch.")]
        return " ".join([*words, *([] if self.wide else ["narrow"]), f"ranks={16 * self.pages}"])


@functools.cache
def target(device: torch.device) -> int | str:
    """What `config` calls the device."""
    if INTERPRETED.value:
        return "interpreter"
    if torch.version.hip:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.cache
def gpu(device: torch.device) -> str:
    """What plans are kept under."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def lora_linear(form: config.Form, device: torch.device, where: int | str) -> config.Plan:
    """The plan of a call."""
    found = _lora_linear(form.shape(), _name(device), where)[0]
    return config.fitted(found, form) if found else config.lora_linear(form, where)


def wgrad(shape: WgradShape, device: torch.device, where: int | str) -> config.Wgrad:
    """The tile of a call."""
    return _wgrad(shape, _name(device), where)[0] or config.wgrad(*shape, where)


def source(shape: config.Shape | WgradShape, device: torch.device) -> str:
    """Where the plan of a class of shapes comes from."""
    if isinstance(shape, WgradShape):
        return _wgrad(shape, _name(device), target(device))[1]
    return _lora_linear(shape, _name(device), target(device))[1]


def _name(device: torch.device) -> str:
    return "" if device.type == "meta" else gpu(device)


@functools.cache
def _lora_linear(shape: config.Shape, name: str, where: int | str) -> tuple[config.Plan | None, str]:
    return _found(shape.key(), name, where, config.candidates(shape, where))


@functools.cache
def _wgrad(shape: WgradShape, name: str, where: int | str) -> tuple[config.Wgrad | None, str]:
    return _found(shape.key(), name, where, config.wgrad_candidates(*shape, where))


def _found(key: str, name: str, where: int | str, candidates: tuple[P, ...]) -> tuple[P | None, str]:
    """The candidate that was found to be the fastest, or None: the shipped table decides. And what says so."""
    table = f"shipped table, {where if isinstance(where, str) else f'sm_{where}'}"
    plans, problem = _loaded(name) if name else ({}, "no GPU")
    if key not in plans:
        return None, f"{table}; {problem or f'`peftk tune` has not measured {key!r}'}"
    for plan in candidates:
        if plan._asdict() == plans[key]:
            return plan, f"tuned on this {name}"
    warnings.warn(f"{cache_file()}: expected a candidate's plan for {key!r}, got {plans[key]!r}; ignored", stacklevel=2)
    return None, f"{table}; {key!r} of {cache_file()} is none of the candidates"


def cache_file() -> Path:
    """Raises OSError where no folder is named and the user has no home."""
    return cache.path(_FILE)


@functools.cache
def _loaded(name: str) -> tuple[dict[str, Any], str]:
    """The plans found on this GPU, by class of shapes; or none, and why."""
    found, problem = cache.load(_FILE, name, _made_with(), lambda entry: dict(entry["plans"]), verb="tuned", unit=name)
    return found or {}, problem


def _made_with() -> dict[str, str]:
    return {"triton": triton.__version__, "peftk": __version__}


def save(name: str, plans: dict[str, config.Plan | config.Wgrad]) -> None:
    """Keeps what was found on a GPU, for this process too. Raises OSError where the cache cannot be written."""
    cache.save(_FILE, name, _made_with(), {"plans": {key: plan._asdict() for key, plan in plans.items()}})
    forget_loaded()


def delete(name: str) -> bool:
    """Deletes what was found on a GPU, and a file that cannot be read; whether there was something."""
    existed = cache.delete(_FILE, name)
    forget_loaded()
    return existed


def forget_loaded() -> None:
    """Reads the cache again at the next question."""
    for cached in (_loaded, _lora_linear, _wgrad):
        cached.cache_clear()

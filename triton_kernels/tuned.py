"""The plan of a call on this GPU: what `peftk tune` found here for its N and K, else for its class of shapes, else the
shipped table's.

Tuned plans are kept by GPU in gpu.json (`peftk.system.cache`), and are valid for the versions of triton and peftk they
were measured with. The file is read once, so within a process only tuning changes a choice.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from peftk.system import cache
from peftk.system.version import __version__

from . import config
from .arithmetic import INTERPRETED

_FILE = "gpu.json"

derived: dict[Hashable, Any] = {}  # what launchers have made from plans; dropped with them
_MOST_RECORDS = 1 << 14  # lengths of prompts make many forms

P = TypeVar("P", config.Plan, config.Wgrad)
F = TypeVar("F", bound=Hashable)
R = TypeVar("R")


class WgradShape(NamedTuple):
    """A class of calls that share a tile of `lora_wgrad`."""

    pages: int
    many: bool
    wide: bool
    x: torch.dtype

    def key(self) -> str:
        words = ["wgrad", "many" if self.many else "one", str(self.x).removeprefix("torch.")]
        return " ".join([*words, *([] if self.wide else ["narrow"]), f"ranks={16 * self.pages}"])


def record(form: F, make: Callable[[F], R]) -> R:
    """make(form), what a launcher makes for a form of call: once, until the plans change (`forget_loaded`)."""
    found: R | None = derived.get(form)
    if found is None:
        if len(derived) >= _MOST_RECORDS:
            derived.clear()
        found = derived[form] = make(form)
    return found


@functools.cache
def target(device: torch.device) -> int | str:
    """The device's target, as `config` names it."""
    if INTERPRETED.value:
        return "interpreter"
    if torch.version.hip:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.cache
def gpu(device: torch.device) -> str:
    """The GPU's name in the cache file."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def lora_linear(call: config.CallShape, device: torch.device, compile_target: int | str) -> config.Plan:
    """The plan of a call: the tuned one, else the shipped one."""
    found = _lora_linear(call.shape_class(), (call.N, call.K), _gpu_name(device), compile_target)[0]
    return config.with_splits(found, call, compile_target) if found else config.lora_linear(call, compile_target)


def wgrad(shape: WgradShape, device: torch.device, compile_target: int | str) -> config.Wgrad:
    """The tile of a call: the tuned one, else the shipped one."""
    return _wgrad(shape, _gpu_name(device), compile_target)[0] or config.wgrad(*shape, compile_target)


def source(call: config.CallShape | WgradShape, device: torch.device) -> str:
    """Says in words where the plan of a call comes from."""
    if isinstance(call, WgradShape):
        return _wgrad(call, _gpu_name(device), target(device))[1]
    return _lora_linear(call.shape_class(), (call.N, call.K), _gpu_name(device), target(device))[1]


def _gpu_name(device: torch.device) -> str:
    return "" if device.type == "meta" else gpu(device)


@functools.cache
def _lora_linear(
    shape: config.ShapeClass, size: tuple[int, int], name: str, compile_target: int | str
) -> tuple[config.Plan | None, str]:
    plans = config.candidates(shape, compile_target)
    found, why = _look_up(shape.key(size), name, compile_target, plans)
    return (found, f"{why} for this N and K") if found else _look_up(shape.key(), name, compile_target, plans)


@functools.cache
def _wgrad(shape: WgradShape, name: str, compile_target: int | str) -> tuple[config.Wgrad | None, str]:
    return _look_up(shape.key(), name, compile_target, config.wgrad_candidates(*shape, compile_target))


def _look_up(key: str, name: str, compile_target: int | str, candidates: tuple[P, ...]) -> tuple[P | None, str]:
    """The candidate that was measured as the fastest, or None (use the shipped table); and a text that says which."""
    table = f"shipped table, {compile_target if isinstance(compile_target, str) else f'sm_{compile_target}'}"
    plans, problem = _load_plans(name) if name else ({}, "no GPU")
    if key not in plans:
        return None, f"{table}; {problem or f'`peftk tune` has not measured {key!r}'}"
    for plan in candidates:
        if plan._asdict() == plans[key]:
            return plan, f"tuned on this {name}"
    warnings.warn(f"{cache_file()}: expected a candidate's plan for {key!r}, got {plans[key]!r}; ignored", stacklevel=2)
    return None, f"{table}; {key!r} of {cache_file()} is none of the candidates"


def cache_file() -> Path:
    """The path of gpu.json. Raises OSError if no cache folder is set and the user has no home."""
    return cache.path(_FILE)


@functools.cache
def _load_plans(name: str) -> tuple[dict[str, Any], str]:
    """The tuned plans of a GPU by the key of their class of shapes, and why there are none, if so."""
    found, problem = cache.load(_FILE, name, _versions(), lambda entry: dict(entry["plans"]), verb="tuned", unit=name)
    return found or {}, problem


def _versions() -> dict[str, str]:
    return {"triton": triton.__version__, "peftk": __version__}


def save(name: str, plans: dict[str, config.Plan | config.Wgrad]) -> None:
    """Saves the plans tuned on a GPU beside those of the same versions; this process uses them too.

    Raises OSError if the cache cannot be written.
    """
    forget_loaded()
    with warnings.catch_warnings():  # a broken file is written anew
        warnings.simplefilter("ignore")
        kept, _ = _load_plans(name)
    cache.save(_FILE, name, _versions(), {"plans": {**kept, **{key: plan._asdict() for key, plan in plans.items()}}})
    forget_loaded()


def delete(name: str) -> bool:
    """Deletes the plans of a GPU, and the whole file if it cannot be read. Returns whether there was anything."""
    existed = cache.delete(_FILE, name)
    forget_loaded()
    return existed


def forget_loaded() -> None:
    """Makes the next call read the cache file again."""
    for cached in (_load_plans, _lora_linear, _wgrad):
        cached.cache_clear()
    derived.clear()

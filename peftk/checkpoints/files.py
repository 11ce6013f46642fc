"""Reads and writes the two files of a checkpoint, for all formats: a JSON config and a safetensors file of weights.

All formats call the config `adapter_config.json`; its fields tell the format: "peft_type" for HF PEFT, "peftk" for
peftk, "config" and "model_type" for AdapterHub. Pickled weights are not read, since loading a pickle can run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from peftk.adapters import checks
from peftk.system import interrupts

CONFIG_FILE = "adapter_config.json"
FORMATS = ("peft", "adapterhub", "peftk")
# for counters and masks among the buffers of a module that trains in full
_INTEGERS = (torch.bool, *(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)))
# fields of a PEFT config about the base model, which are kept from load to save and written in every format
ABOUT = ("base_model_name_or_path", "revision", "task_type")
# parts that torch.compile, FSDP and activation checkpointing insert into the names of modules
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class CheckpointError(ValueError):
    """Raised for a checkpoint that cannot be used. The message says why; nothing has been loaded."""


def folder(path: str | os.PathLike[str]) -> Path:
    """The path of a checkpoint's folder. Raises TypeError for an argument that is not a path."""
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise TypeError(f"path: expected the path of a folder, got {path!r}")
    return Path(path)


def plain_name(name: str) -> str:
    """The dotted name of a module or Parameter without the parts that wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def read_config(path: Path) -> dict[str, Any]:
    """The config, unchecked. Raises CheckpointError unless it is a JSON object."""
    file = path / CONFIG_FILE
    try:
        if not file.is_file():
            got = "none there" if path.is_dir() else "a file" if path.exists() else "no such folder"
            raise CheckpointError(f"{path}: expected a folder with {CONFIG_FILE}, got {got}")
        config = json.loads(file.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{file}: expected JSON, got an error: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(config).__name__}")
    return config


def checkpoint_format(config: Mapping[str, Any]) -> str:
    """The format of a config: "peft", "adapterhub" or "peftk". Raises CheckpointError for any other."""
    if "peft_type" in config:
        return "peft"
    if "peftk" in config:
        return "peftk"
    if "config" in config and "model_type" in config:
        return "adapterhub"
    raise CheckpointError(
        f"{CONFIG_FILE}: expected a config of HF PEFT (peft_type), AdapterHub (config, model_type) or peftk (peftk), "
        f"got the fields {', '.join(sorted(config)[:8]) or 'none'}"
    )


def about(config: Mapping[str, Any], file: Path) -> dict[str, str]:
    """A config's fields about the base model (`ABOUT`). Raises CheckpointError unless they are strings."""
    fields = {field: config[field] for field in ABOUT if config.get(field) is not None}
    for field, value in fields.items():
        if not isinstance(value, str):
            raise CheckpointError(f"{file}: expected {field} to be a string, got {value!r}")
    return fields


def read_weights(path: Path, name: str, *, pickled: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. pickled: the library's name for a pickled file of weights.

    Raises CheckpointError for a missing, truncated or corrupt file, bad names, and unsupported dtypes.
    """
    file = path / name
    if not file.is_file():
        found = pickled if (path / pickled).exists() else "none"
        hint = " (pickled files are not read: loading one can run code)" if found == pickled else ""
        raise CheckpointError(f"{path}: expected {name}, got {found} there{hint}")
    try:
        # read, not mapped: a file that is truncated while it is mapped ends the process
        tensors = dict(sorted(safetensors.torch.load(file.read_bytes()).items()))
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file}: expected a complete safetensors file, got an error: {error}") from error
    if not tensors:
        raise CheckpointError(f"{file}: expected weights, got no tensor")
    for key, tensor in tensors.items():
        if not key or not key.isprintable() or not all(key.split(".")):
            raise CheckpointError(f"{file}: expected dotted names, got the key {key!r}")
        if tensor.dtype not in (*checks.FLOATS, *_INTEGERS):
            raise CheckpointError(f"{file}: {key}: expected fp32, bf16, fp16, fp64 or integers, got {tensor.dtype}")
    return tensors


def digest(path: Path, weights_file: str) -> str:
    """sha256 over the contents of a checkpoint's two files, as a hexadecimal number. Raises OSError."""
    total = hashlib.sha256()
    for name in (CONFIG_FILE, weights_file):
        total.update(hashlib.sha256((path / name).read_bytes()).digest())
    return total.hexdigest()


def finite_floats(where: object, name: str, tensor: Tensor) -> None:
    """Raises CheckpointError for values that cannot have been trained: integers, NaN, inf."""
    if tensor.dtype not in checks.FLOATS:
        raise CheckpointError(f"{where}: {name}: expected fp32, bf16, fp16 or fp64, got {tensor.dtype}")
    finite(where, name, tensor)


def finite(where: object, name: str, tensor: Tensor) -> None:
    """Raises CheckpointError for NaN and inf."""
    wrong = tensor[~tensor.isfinite()]
    if wrong.numel():
        raise CheckpointError(
            f"{where}: {name}: expected finite values, got {wrong[0].item()} "
            f"({wrong.numel()} of {tensor.numel()} values are not finite)"
        )


def converted(where: object, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype. Raises CheckpointError if finite values overflow in that dtype."""
    found = tensor.to(dtype)
    if not torch.equal(found.isfinite(), tensor.isfinite()):
        raise CheckpointError(
            f"{where}: {name}: expected values that {dtype} can hold, of at most {torch.finfo(dtype).max:.3g}, "
            f"got {tensor.abs().max().item():.3g}"
        )
    return found


def same_names(where: object, what: str, found: Collection[str], wanted: Collection[str]) -> None:
    """Raises CheckpointError unless the names in a checkpoint are exactly the wanted ones."""
    sides = (("missing", set(wanted) - set(found)), ("unknown", set(found) - set(wanted)))
    wrong = [f"{side}: {', '.join(sorted(names)[:8])}{', …' * (len(names) > 8)}" for side, names in sides if names]
    if wrong:
        raise CheckpointError(f"{where}: expected {what}; {'; '.join(wrong)}")


def write(
    path: str | os.PathLike[str], config: Mapping[str, Any], weights_file: str, weights: Mapping[str, Tensor]
) -> None:
    """Writes both files into a temporary folder and then moves them to `path`, both or none.

    A failure leaves an earlier checkpoint as it was, and creates no folder. Raises ValueError if the path is a file or
    a weight has no values, TypeError if a weight is not a dense tensor.
    """
    target = folder(path)
    if target.exists() and not target.is_dir():
        raise ValueError(f"path: expected a folder, got the file {target}")
    for name, tensor in weights.items():
        if tensor.device.type == "meta":
            raise ValueError(f"model: expected values in {name}, got a tensor on meta, which has none")
        checks.dense(name, tensor)
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()
    }
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    created = [parent for parent in (target, *target.parents) if not parent.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-", ignore_cleanup_errors=True) as scratch:
            written = Path(scratch)
            safetensors.torch.save_file(tensors, written / weights_file, metadata={"format": "pt"})
            (written / CONFIG_FILE).write_text(text, encoding="utf-8")
            with interrupts.deferred():
                _move(written, target, (weights_file, CONFIG_FILE))
    except BaseException:
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _move(written: Path, target: Path, names: Sequence[str]) -> None:
    """Moves files from `written` to `target`, all or none."""
    backups = {name: written / f"before-{name}" for name in names if os.path.lexists(target / name)}
    for name, backup in backups.items():
        try:
            os.link(target / name, backup, follow_symlinks=False)
        except (OSError, NotImplementedError):  # the file system has no hard links
            shutil.copy2(target / name, backup, follow_symlinks=False)
    try:
        for name in names:
            os.replace(written / name, target / name)
    except BaseException:
        for name in names:
            if name in backups:
                os.replace(backups[name], target / name)
            else:
                (target / name).unlink(missing_ok=True)
        raise

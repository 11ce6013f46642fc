"""Reads a model from files of this machine: safetensors or GGUF, no pickle, no code, no download."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn


class LoadedModel(NamedTuple):
    """A model with its tokenizer. pooling: None for a causal language model, which generates."""

    model: nn.Module
    tokenizer: Any
    pooling: Pooling | None


class Pooling(NamedTuple):
    """How an encoder's vectors come about (`Embedder`)."""

    kind: str = "mean"
    normalize: bool = True
    max_tokens: int | None = None


def load(path: Path, dtype: torch.dtype | None) -> LoadedModel:
    """A causal language model or an encoder of transformers, from its folder, or the former from a .gguf file.

    dtype: of the weights, None for that of the files (for GGUF, which is dequantized, bf16).

    Raises ValueError if there is no such model, ImportError if a package is missing, and what transformers raises.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    import transformers

    folder = path
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if path.suffix == ".gguf" and path.is_file():
        folder, options = path.parent, {**options, "gguf_file": path.name}
        dtype = dtype or torch.bfloat16
    elif not (path / "config.json").is_file():
        raise ValueError(f"model: expected a folder with config.json, or a .gguf file, got {path}")
    transformers.utils.logging.disable_progress_bar()
    pooling = None if "gguf_file" in options else _pooling(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    if "gguf_file" in options:
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True  # of the weights, which could be a pickle otherwise
    options["dtype"] = dtype or "auto"
    if pooling is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    else:
        model = _encoder(folder, options)
    return LoadedModel(model.eval().requires_grad_(False), tokenizer, pooling)


def _encoder(folder: Path, options: dict[str, Any]) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.model_type in ("bert", "roberta", "xlm-roberta", "camembert", "electra"):
        options = {**options, "add_pooling_layer": False}  # embeddings are pooled from the last hidden states
    return transformers.AutoModel.from_pretrained(folder, **options)


def _pooling(folder: Path) -> Pooling | None:
    """The pooling of an encoder, as sentence-transformers' files say it; None if the model generates text."""
    modules = _json(folder / "modules.json")
    if modules is None:
        config = _json(folder / "config.json") or {}
        generates = any("CausalLM" in name or "LMHead" in name for name in config.get("architectures") or [])
        return None if generates else Pooling()
    kinds = {module["type"].rpartition(".")[2]: folder / module["path"] for module in modules}
    unknown = kinds.keys() - {"Transformer", "Pooling", "Normalize"}
    if unknown or "Pooling" not in kinds:
        raise ValueError(f"{folder}: expected Transformer, Pooling and Normalize in modules.json, got {sorted(kinds)}")
    pooling = _json(kinds["Pooling"] / "config.json") or {}
    prefix = "pooling_mode_"
    modes = {name.removeprefix(prefix) for name, on in pooling.items() if name.startswith(prefix) and on}
    by_mode = {"mean_tokens": "mean", "cls_token": "cls"}
    if len(modes) != 1 or not modes <= by_mode.keys():
        raise ValueError(f"{folder}: expected a pooling of {', '.join(by_mode)}, got {sorted(modes)}")
    longest = (_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
    return Pooling(by_mode[modes.pop()], "Normalize" in kinds, longest)


def _json(path: Path) -> Any:
    """The contents of a file; None if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

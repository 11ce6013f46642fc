"""Random LoRA checkpoints as HF PEFT writes them, each of which changes what the model says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

STRENGTH = 0.2  # the size of BA, in that of W


def write(folder: Path, model: nn.Module, ranks: Sequence[int]) -> list[str]:
    """One checkpoint for each rank, on every linear but the output layer, in bf16. Returns their names in `folder`."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")}
    deviations = {name: linear.weight.float().std().item() for name, linear in linears.items()}
    names = []
    for number, rank in enumerate(ranks):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, linear in linears.items():
            A = torch.randn(rank, linear.in_features, generator=generator)
            B = torch.randn(linear.out_features, rank, generator=generator)
            B *= STRENGTH * deviations[name] / rank**0.5
            tensors[f"base_model.model.{name}.lora_A.weight"] = A.bfloat16()
            tensors[f"base_model.model.{name}.lora_B.weight"] = B.bfloat16()
        names.append(f"adapter{number:03}")
        path = folder / names[-1]
        path.mkdir(parents=True)
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted({name.rpartition(".")[2] for name in linears}),
        }
        (path / "adapter_config.json").write_text(json.dumps(config))
    return names

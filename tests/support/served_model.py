"""A model of four linear layers, and a MultiAdapter of it with two LoRA checkpoints."""

from __future__ import annotations

import pathlib

import torch
from torch import nn

import peftk
from peftk import LoraConfig, MultiAdapter
from peftk.methods.inject import lora_layers


def small_model() -> nn.Module:
    torch.manual_seed(0)
    block = nn.ModuleDict({"query": nn.Linear(16, 16), "value": nn.Linear(16, 16), "dense": nn.Linear(16, 24)})
    model = nn.ModuleDict({"block": block, "head": nn.Linear(24, 5)})
    model.forward = lambda x: model["head"](  # type: ignore[method-assign]
        torch.relu(model["block"]["dense"](torch.tanh(model["block"]["query"](x)) * model["block"]["value"](x)))
    )
    return model.eval()


def with_random_B(model: nn.Module, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
    return model


def two_adapters(tmp_path: pathlib.Path) -> tuple[nn.Module, MultiAdapter]:
    base = small_model()
    server = MultiAdapter(base)
    for number, name in enumerate(("alice", "bob")):
        model = small_model()
        peftk.inject(model, LoraConfig(r=2 + number, target_modules=["query", "dense"]))
        with_random_B(model, number)
        peftk.save_adapter(model, tmp_path / name)
        server.load(name, tmp_path / name)
    return base, server

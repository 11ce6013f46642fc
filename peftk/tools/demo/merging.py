"""Step 6: merge and unmerge; every bit of the weights is restored."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from torch import Tensor, nn

import peftk
from peftk.methods.inject import lora_layers
from peftk.tools.demo.latency import DTYPES
from peftk.tools.demo.stage import Stage, table
from peftk.tools.minilm import BOUNDS, Batch, MiniLM, embed, load_hf_peft


def measure(stage: Stage, minilm: MiniLM, trained: nn.Module, batch: Batch) -> None:
    stage.step(6, "Merge and unmerge, exactly")
    stage.say("The trained LoRA is merged into the weights and unmerged again, which restores every bit.")
    figures: dict[str, Any] = {}
    result_table = table("", *DTYPES)
    with tempfile.TemporaryDirectory() as folder:
        peftk.save_adapter(trained, folder)
        for dtype in DTYPES:
            with stage.busy(f"merging in {dtype}"):
                figures[dtype] = _cycle(minilm, folder, DTYPES[dtype], batch)
                if stage.has_peft:
                    figures[dtype]["peft_weights_changed"] = _peft_cycle(minilm, folder, DTYPES[dtype])
    rows = {
        "merge, all 36 linear layers": "{merge_ms:.0f} ms",
        "unmerge": "{unmerge_ms:.0f} ms",
        "weights of these layers": "{weight_mib:.1f} MiB",
        "receipts while merged": "{receipt_mib:.1f} MiB",
        "weights that differ after one cycle, peftk": "[bold]{weights_changed:.2%}[/]",
    }
    rows |= {"weights that differ after one cycle, HF PEFT": "{peft_weights_changed:.2%}"} if stage.has_peft else {}
    for text, template in rows.items():
        result_table.add_row(text, *(template.format(**figures[dtype]) for dtype in DTYPES))
    stage.console.print(result_table)
    for dtype in DTYPES:
        stage.check(f"{dtype}: merged against unmerged", figures[dtype]["merged_difference"], BOUNDS[dtype])
        stage.check(f"{dtype}: bits that differ after unmerge", figures[dtype]["bits_changed"], 0)
    stage.figures["merge"] = figures


def _cycle(minilm: MiniLM, adapter: str, dtype: torch.dtype, batch: Batch) -> dict[str, float]:
    model = minilm.copy(dtype)
    peftk.inject(model, peftk.LoraConfig(r=8, lora_alpha=16))
    peftk.load_adapter(model, adapter)
    layers = [layer for _, layer in lora_layers(model)]
    before = [layer.weight.detach().clone() for layer in layers]
    with torch.inference_mode():
        unmerged = embed(model, batch)
    started = time.perf_counter()
    for layer in layers:
        layer.merge()
    merged_at = time.perf_counter()
    with torch.inference_mode():
        merged = embed(model, batch)
    receipts = sum(layer.receipt.nbytes for layer in layers if layer.receipt is not None)
    unmerging = time.perf_counter()
    for layer in layers:
        layer.unmerge()
    finished = time.perf_counter()
    pairs = [(layer.weight.detach(), old) for layer, old in zip(layers, before, strict=True)]
    return {
        "merge_ms": 1000 * (merged_at - started),
        "unmerge_ms": 1000 * (finished - unmerging),
        "weight_mib": sum(w.nbytes for w in before) / 2**20,
        "receipt_mib": receipts / 2**20,
        "merged_difference": (merged - unmerged).abs().max().item(),
        "bits_changed": sum(_bits_changed(new, old) for new, old in pairs),
        "weights_changed": _share_changed(pairs),
    }


def _peft_cycle(minilm: MiniLM, adapter: str, dtype: torch.dtype) -> float:
    model = load_hf_peft(minilm.copy(dtype), {"default": adapter})
    weights = {n: p for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    model.base_model.merge_adapter()  # type: ignore[operator, union-attr]
    model.base_model.unmerge_adapter()  # type: ignore[operator, union-attr]
    return _share_changed([(weight.detach(), before[name]) for name, weight in weights.items()])


def _share_changed(pairs: list[tuple[Tensor, Tensor]]) -> float:
    changed = sum(int((_bits(new) != _bits(old)).sum()) for new, old in pairs)
    return changed / sum(old.numel() for _, old in pairs)


def _bits_changed(new: Tensor, old: Tensor) -> int:
    flipped = (_bits(new) ^ _bits(old)).flatten()
    return sum(int(((flipped >> bit) & 1).sum()) for bit in range(8 * old.element_size()))


def _bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view({2: torch.int16, 4: torch.int32}[weight.element_size()])

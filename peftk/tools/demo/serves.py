"""Steps 1 and 2: which kernels run here, and that adapting every linear layer changes no output at first."""

from __future__ import annotations

import torch

import peftk
from peftk.tools.demo.stage import Stage, table
from peftk.tools.minilm import FP32_BOUND, Batch, MiniLM, embed


def show_backends(stage: Stage, tokens: int) -> None:
    stage.step(1, "What runs on this machine")
    stage.say("peftk.explain(...) says which backend runs a call and why. For the layers of this model:")
    choices = {
        "lora_linear fp32": peftk.explain("lora_linear", M=tokens, K=384, N=1536, dtype=torch.float32),
        "lora_linear bf16": peftk.explain(
            "lora_linear", M=tokens, K=384, N=1536, dtype=torch.bfloat16, adapter_dtype=torch.float32
        ),
        "multi_lora_linear bf16": peftk.explain(
            "multi_lora_linear", M=tokens, K=384, N=1536, dtype=torch.bfloat16, adapters=8
        ),
        "merge bf16": peftk.explain("merge", M=1536, K=384, N=1536, dtype=torch.bfloat16),
    }
    backend_table = table("call", "backend", "kernel")
    backend_table.columns[2].justify = "left"
    for call, choice in choices.items():
        backend_table.add_row(call, f"[bold]{choice.backend}[/]", choice.kernel)
    stage.console.print(backend_table)
    rejected = sorted({(name, why) for choice in choices.values() for name, why in choice.rejected})
    for name, why in rejected:
        stage.say(f"[yellow]not {name}[/]: {why}")
    stage.figures["explain"] = {
        call: {"backend": choice.backend, "kernel": choice.kernel, "rejected": [list(pair) for pair in choice.rejected]}
        for call, choice in choices.items()
    }


def check_unchanged(stage: Stage, minilm: MiniLM, batch: Batch) -> None:
    stage.step(2, "A LoRA on every linear layer; outputs unchanged at the start")
    model = minilm.copy()
    names = peftk.inject(model, peftk.LoraConfig(r=16, lora_alpha=32))
    count = peftk.count_parameters(model)
    stage.say(f"{len(names)} linear layers replaced, r = 16: {count}")
    with torch.inference_mode():
        difference = (embed(model, batch) - embed(minilm.plain, batch)).abs().max().item()
    stage.say("B = 0, so outputs differ from the plain model only by the order of summation.")
    stage.say("[dim]Checks compare unit embeddings; the figure is the largest |difference| of an element.[/]")
    stage.check("unchanged at the start", difference, FP32_BOUND)
    stage.figures["inject"] = {
        "linears": len(names),
        "trainable": count.trainable,
        "total": count.total,
        "max_difference": difference,
    }

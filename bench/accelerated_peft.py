"""Times MiniLM under plain HF PEFT and under `peftk.accelerate`, side by side.

A LoRA of rank 16 on every linear layer. Both sides start from the same PEFT model, and their results are compared
before they are timed. Every repetition runs each side once; × is the ratio of the medians (`peftk.system.timing`).
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peftk
from peftk.system.timing import interleave
from peftk.tools.minilm import MiniLM, embed

NAMES = [f"user{number}" for number in range(8)]
TEXTS = [
    "A man is playing the guitar on a small stage in front of his friends.",
    "The weather is lovely today, and so we shall walk to the lake.",
    "Fine-tuning adapts a large model to a task with few trained weights.",
    "She reads the newspaper every morning before she goes to work.",
]


def models(minilm: MiniLM, dtype: torch.dtype) -> tuple[Any, Any]:
    """A plain and an accelerated PEFT model with the same weights and eight adapters."""
    torch.manual_seed(0)
    config = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": False}
    model: Any = peft.get_peft_model(minilm.copy(dtype), peft.LoraConfig(**config), adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.3)
    model.eval()
    return model, peftk.accelerate(copy.deepcopy(model))


def forward(model: nn.Module, batch: Any, **kwargs: Any) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return embed(model, batch, **kwargs)

    return run


def step(model: nn.Module, batch: Any) -> Callable[[], Tensor]:
    def run() -> Tensor:
        model.zero_grad()
        loss = embed(model, batch).square().mean()
        loss.backward()
        return loss.detach()

    return run


def loop(model: Any, batch: Any) -> Callable[[], None]:
    """Trains a mixed batch with plain PEFT: one adapter after another."""

    def run() -> None:
        model.zero_grad()
        for number, name in enumerate(NAMES):
            model.set_adapter(name)
            embed(model, {key: value[number : number + 1] for key, value in batch.items()}).square().mean().backward()

    return run


def mixed_step(model: Any, batch: Any) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad()
        embed(model, batch, adapter_names=NAMES).square().mean().backward()

    return run


def main(seconds: float) -> None:
    minilm = MiniLM()
    one, eight = minilm.tokenize(TEXTS[:1]), minilm.tokenize(TEXTS * 2)
    print(f"| MiniLM, {torch.get_num_threads()} threads | plain PEFT, ms | accelerated, ms | × |\n|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        plain, fast = models(minilm, dtype)
        rows: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "forward, 1 sentence": (forward(plain, one), forward(fast, one)),
            "forward, 8 sentences": (forward(plain, eight), forward(fast, eight)),
            "forward, 8 sentences of 8 adapters": (
                forward(plain, eight, adapter_names=NAMES),
                forward(fast, eight, adapter_names=NAMES),
            ),
            "training step, 8 sentences": (step(plain, eight), step(fast, eight)),
        }
        for row, (theirs, ours) in rows.items():
            torch.testing.assert_close(ours(), theirs(), atol=0.05 if dtype == torch.bfloat16 else 1e-4, rtol=0.05)
            report(f"{dtype}: {row}".removeprefix("torch."), theirs, ours, seconds)
        fast.set_requires_grad(NAMES)
        row = f"{dtype}: training step, 8 sentences of 8 adapters (PEFT: one by one)"
        report(row.removeprefix("torch."), loop(plain, eight), mixed_step(fast, eight), seconds)


def report(row: str, theirs: Callable[[], Any], ours: Callable[[], Any], seconds: float) -> None:
    times = interleave({"PEFT": theirs, "peftk": ours}, seconds=seconds)
    a, b = times["PEFT"].median_us, times["peftk"].median_us
    print(f"| {row} | {a / 1000:.1f} | {b / 1000:.1f} | {a / b:.2f} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5.0)

"""Step 3: latency per rank, compared with the plain model and with HF PEFT with the same adapter."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn

import peftk
from peftk.system.timing import Run, interleave
from peftk.tools.demo.stage import Stage, speedup, table
from peftk.tools.minilm import BOUNDS, Batch, MiniLM, embed, load_hf_peft, with_lora

RANKS = (1, 2, 4, 8, 16, 32, 64)
QUICK_RANKS = (1, 16)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(stage: Stage, minilm: MiniLM, batch: Batch) -> None:
    stage.step(3, "Latency per rank")
    sentences, tokens = batch["input_ids"].shape[0], batch["input_ids"].numel()
    stage.say(
        f"{sentences} sentences, {tokens} tokens with padding; every linear layer adapted, nothing merged. "
        "The plain model has no adapter.\nThe sides take turns within one run; medians."
    )
    rows = []
    for dtype in DTYPES:
        for r in QUICK_RANKS if stage.quick else RANKS:
            with stage.busy(f"{dtype}, rank {r}"):
                rows.append(_row(stage, minilm, batch, dtype, r))
    _show(stage, rows)
    effect = min(row["adapter_effect"] for row in rows)
    for dtype, bound in BOUNDS.items():
        dtype_rows = [row for row in rows if row["dtype"] == dtype]
        if stage.has_peft:
            against_peft = max(row["peftk_against_peft"] for row in dtype_rows)
            stage.check(f"{dtype}: peftk against HF PEFT, same adapter", against_peft, bound)
        against_exact = max(row["peftk_against_exact"] for row in dtype_rows)
        stage.check(f"{dtype}: peftk against fp64 arithmetic", against_exact, bound)
    stage.check("the bound, over what the adapters change", max(BOUNDS.values()) / effect, 0.2)
    stage.figures["latency"] = {"sentences": sentences, "tokens": tokens, "rows": rows}


def _row(stage: Stage, minilm: MiniLM, batch: Batch, dtype: str, r: int) -> dict[str, Any]:
    """Times one rank: figures in ms, and the differences between unit embeddings."""
    models: dict[str, nn.Module] = {
        "plain": minilm.copy(DTYPES[dtype]),
        "peftk": with_lora(minilm.copy(DTYPES[dtype]), r, seed=r),
    }
    if stage.has_peft:
        with tempfile.TemporaryDirectory() as folder:
            peftk.save_adapter(models["peftk"], folder)
            models["peft"] = load_hf_peft(minilm.copy(DTYPES[dtype]), {"default": folder})
    exact = with_lora(minilm.copy(DTYPES[dtype]).double(), r, seed=r)  # the same rounded weights, in fp64
    with torch.inference_mode():
        outputs = {name: embed(model, batch) for name, model in models.items()}
        outputs["exact"] = embed(exact, batch)
        sides: dict[str, Run] = {name: _embedding(model, batch) for name, model in models.items()}
        times = interleave(sides, seconds=0.3 if stage.quick else 1.5)

    def difference(one: str, other: str) -> float:
        return (outputs[one] - outputs[other]).abs().max().item()

    return {
        "dtype": dtype,
        "rank": r,
        **{f"{name}_ms": side.median_us / 1000 for name, side in times.items()},
        "repeats": times["peftk"].repeats,
        "adapter_effect": difference("exact", "plain"),
        "peftk_against_exact": difference("peftk", "exact"),
        **({"peftk_against_peft": difference("peftk", "peft")} if stage.has_peft else {}),
    }


def _embedding(model: nn.Module, batch: Batch) -> Run:
    return lambda: embed(model, batch)


def _show(stage: Stage, rows: list[dict[str, Any]]) -> None:
    peft = ["HF PEFT"] if stage.has_peft else []
    latency_table = table(
        "dtype",
        "rank",
        "plain, ms",
        *(f"{name}, ms" for name in peft),
        "peftk, ms",
        "× plain",
        *("× " + n for n in peft),
    )
    for number, row in enumerate(rows):
        first = number == 0 or rows[number - 1]["dtype"] != row["dtype"]
        if first and number:
            latency_table.add_section()
        latency_table.add_row(
            row["dtype"] if first else "",
            str(row["rank"]),
            f"{row['plain_ms']:.1f}",
            *([f"{row['peft_ms']:.1f}"] if stage.has_peft else []),
            f"[bold]{row['peftk_ms']:.1f}[/]",
            speedup(row["plain_ms"], row["peftk_ms"]),
            *([speedup(row["peft_ms"], row["peftk_ms"])] if stage.has_peft else []),
        )
    stage.console.print(latency_table)
    stage.say("[dim]× plain, × HF PEFT: how many times faster peftk is, including its adapter.[/]")

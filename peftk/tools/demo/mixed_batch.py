"""Step 4: LoRAs of different ranks, and the base model, in one batch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftk
from peftk.system.timing import Run, interleave
from peftk.tools.demo.latency import DTYPES
from peftk.tools.demo.stage import Stage, speedup, table
from peftk.tools.minilm import FP32_BOUND, Batch, MiniLM, embed, load_hf_peft, with_lora

RANKS = (1, 2, 3, 4, 8, 16, 32, 64)
QUICK_RANKS = (1, 3, 16, 64)
ROWS_EACH = 4
BASE = "base"


def measure(stage: Stage, minilm: MiniLM, texts: list[str]) -> None:
    stage.step(4, "Many LoRAs in one batch")
    ranks = QUICK_RANKS if stage.quick else RANKS
    names = [*(f"rank{r}" for r in ranks), BASE]
    order = torch.randperm(len(names) * ROWS_EACH, generator=torch.Generator().manual_seed(0)).tolist()
    owners = [names[number % len(names)] for number in order]
    batch = minilm.tokenize([texts[number % len(texts)] for number in range(len(owners))])
    stage.say(
        f"{len(ranks)} LoRAs of ranks {', '.join(map(str, ranks))} and the base model: {ROWS_EACH} sentences each, "
        f"shuffled into one batch of {len(owners)} ({batch['input_ids'].numel()} tokens)."
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in names if name != BASE}
        with stage.busy("writing checkpoints in HF PEFT's format"):
            for r, path in zip(ranks, paths.values(), strict=True):
                model = with_lora(minilm.copy(), r, seed=100 + r)
                peftk.save_adapter(model, path)
        with stage.busy("comparing every row with its adapter alone"):
            difference = _max_difference_to_separate(minilm, paths, batch, owners)
        stage.check("each row against its adapter alone", difference, FP32_BOUND)
        rows = []
        for dtype in DTYPES:
            with stage.busy(f"throughput in {dtype}"):
                rows.append(_throughput(stage, minilm, paths, batch, owners, dtype))
    _show(stage, rows)
    stage.figures["mixed_batch"] = {
        "ranks": list(ranks),
        "sentences": len(owners),
        "tokens": batch["input_ids"].numel(),
        "max_difference": difference,
        "throughput": rows,
    }


def _max_difference_to_separate(minilm: MiniLM, paths: dict[str, Path], batch: Batch, owners: list[str]) -> float:
    """max |difference| between the rows of the mixed batch and the same rows in a model with only their adapter."""
    with torch.inference_mode():
        mixed = _mixed_run(_load_server(minilm, paths, torch.float32), batch, owners)()
        worst = 0.0
        for name in {*owners}:
            model = _single_adapter_model(minilm, paths, name, torch.float32)
            rows = _row_indices(owners, name)
            separate_output = embed(model, {key: value[rows] for key, value in batch.items()})
            worst = max(worst, (mixed[rows] - separate_output).abs().max().item())
    return worst


def _throughput(
    stage: Stage, minilm: MiniLM, paths: dict[str, Path], batch: Batch, owners: list[str], dtype: str
) -> dict[str, Any]:
    """Sentences / s: the mixed batch, the rows of each adapter separately, HF PEFT's mixed batch, the plain model."""
    server = _load_server(minilm, paths, DTYPES[dtype])
    plain = minilm.copy(DTYPES[dtype])
    separate_models = [
        (
            _single_adapter_model(minilm, paths, name, DTYPES[dtype]),
            {key: value[_row_indices(owners, name)] for key, value in batch.items()},
        )
        for name in dict.fromkeys(owners)
    ]
    with torch.inference_mode():
        sides: dict[str, Run] = {
            "plain": lambda: embed(plain, batch),
            "separate": lambda: [embed(model, rows) for model, rows in separate_models],
            "mixed": _mixed_run(server, batch, owners),
        }
        if stage.has_peft:
            peft_model = load_hf_peft(minilm.copy(DTYPES[dtype]), paths)
            # HF PEFT's name for rows without an adapter
            peft_owners = ["__base__" if name == BASE else name for name in owners]
            sides["peft"] = lambda: embed(peft_model, batch, adapter_names=peft_owners)
        times = interleave(sides, seconds=0.5 if stage.quick else 4.0)
    return {"dtype": dtype, **{name: len(owners) / side.median_us * 1e6 for name, side in times.items()}}


def _load_server(minilm: MiniLM, paths: dict[str, Path], dtype: torch.dtype) -> peftk.MultiAdapter:
    server = peftk.MultiAdapter(minilm.copy(dtype), max_adapters=len(paths))
    for name, path in paths.items():
        server.load(name, path)
    return server


def _mixed_run(server: peftk.MultiAdapter, batch: Batch, owners: list[str]):  # type: ignore[no-untyped-def]
    names = [None if owner == BASE else owner for owner in owners]

    def run() -> Tensor:
        with server.route(names):
            return embed(server.model, batch)

    return run


def _single_adapter_model(minilm: MiniLM, paths: dict[str, Path], name: str, dtype: torch.dtype) -> nn.Module:
    """A model with only this adapter, in LoRALinear layers; the plain model for the base."""
    model = minilm.copy(dtype)
    if name != BASE:
        peftk.inject(model, peftk.LoraConfig(r=int(name.removeprefix("rank"))))
        peftk.load_adapter(model, paths[name])
    return model


def _row_indices(owners: list[str], name: str) -> list[int]:
    return [row for row, owner in enumerate(owners) if owner == name]


def _show(stage: Stage, rows: list[dict[str, Any]]) -> None:
    throughput_table = table("sentences / s", *(row["dtype"] for row in rows))
    side_labels = {"plain": "plain model, no adapter", "separate": "peftk, one adapter after another"}
    side_labels |= {"peft": "HF PEFT, one mixed batch"} if stage.has_peft else {}
    for side, text in side_labels.items():
        throughput_table.add_row(text, *(f"{row[side]:,.0f}" for row in rows))
    throughput_table.add_row("[bold]peftk, one mixed batch[/]", *(f"[bold]{row['mixed']:,.0f}[/]" for row in rows))
    for side, text in side_labels.items():
        throughput_table.add_row(f"  × {text}", *(speedup(row["mixed"], row[side]) for row in rows), style="dim")
    stage.console.print(throughput_table)

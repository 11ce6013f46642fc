"""`peftk demo`: what peftk is for, shown on a real pretrained model in under three minutes."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from peftk.system import extras


def run(out: Path, console: Console, *, quick: bool = False) -> bool:
    """Runs all steps, writes demo.png and demo.json into `out`; True where every check passed.

    Raises extras.MissingExtraError where a package that it needs is not installed.
    """
    from peftk.tools.minilm import MODULES, MiniLM

    extras.require("demo", "peftk demo", MODULES)

    from peftk.tools.benchmark.environment import busy, environment
    from peftk.tools.demo import latency, merging, mixed_batch, report, serves, training
    from peftk.tools.demo.stage import Stage
    from peftk.tools.sentences import SENTENCES

    started = time.perf_counter()
    stage = Stage(console, quick=quick, has_peft=extras.installed("peft"))
    where = environment()
    with stage.busy("loading all-MiniLM-L6-v2"):
        minilm = MiniLM()
    texts = [sentence.text for sentence in SENTENCES]
    parameters = sum(p.numel() for p in minilm.plain.parameters())
    stage.say(
        f"[bold]peftk {where['peftk']}[/] on all-MiniLM-L6-v2, {parameters / 1e6:.1f} M parameters\n"
        f"[dim]{where['cpu']}, {where['threads']} threads · torch {where['torch']}"
        + (
            f" · peft {where['peft']}[/]"
            if stage.has_peft
            else "[/]\n[yellow]peft is not installed: no HF PEFT column[/]"
        )
    )
    if warning := busy(where):
        stage.say(f"[yellow]{warning}[/]")
    batch = minilm.tokenize(texts[:: len(texts) // 16][:16])
    serves.what_serves(stage, batch["input_ids"].numel())
    serves.unchanged(stage, minilm, batch)
    latency.latency(stage, minilm, batch)
    mixed_batch.mixed_batch(stage, minilm, texts)
    trained = training.train(stage, minilm)
    merging.merging(stage, minilm, trained, batch)
    report.summary(stage)
    seconds = time.perf_counter() - started
    files = report.write(
        stage,
        out,
        {
            "environment": where,
            "quick": quick,
            "passed": stage.passed,
            "seconds": seconds,
            "checks": stage.checks,
            **stage.figures,
        },
    )
    stage.say(f"{seconds:.0f} s. Written: {', '.join(str(file) for file in files)}")
    return stage.passed

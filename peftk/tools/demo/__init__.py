"""`peftk demo`: shows peftk on pretrained models, in under three minutes without and five with the language model."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from peftk.system import extras


def run(out: Path, console: Console, *, quick: bool = False) -> bool:
    """Runs all steps and writes demo.png and demo.json into the folder `out`. True if every check passed.

    Raises extras.MissingExtraError if a required package is not installed.
    """
    from peftk.tools.minilm import MODULES, MiniLM

    extras.require("demo", "peftk demo", MODULES)

    from peftk.tools.benchmark.environment import busy, environment
    from peftk.tools.demo import latency, merging, mixed_batch, report, serves, serving, training
    from peftk.tools.demo.stage import Stage
    from peftk.tools.sentences import SENTENCES

    started = time.perf_counter()
    stage = Stage(console, quick=quick, has_peft=extras.is_installed("peft"))
    env = environment()
    with stage.busy("loading all-MiniLM-L6-v2"):
        minilm = MiniLM()
    texts = [sentence.text for sentence in SENTENCES]
    parameters = sum(p.numel() for p in minilm.plain.parameters())
    stage.say(
        f"[bold]peftk {env['peftk']}[/] on all-MiniLM-L6-v2, {parameters / 1e6:.1f} M parameters\n"
        f"[dim]{env['cpu']}, {env['threads']} threads · torch {env['torch']}"
        + (
            f" · peft {env['peft']}[/]"
            if stage.has_peft
            else "[/]\n[yellow]peft is not installed: no HF PEFT column[/]"
        )
    )
    if warning := busy(env):
        stage.say(f"[yellow]{warning}[/]")
    batch = minilm.tokenize(texts[:: len(texts) // 16][:16])
    serves.show_backends(stage, batch["input_ids"].numel())
    serves.check_unchanged(stage, minilm, batch)
    latency.measure(stage, minilm, batch)
    mixed_batch.measure(stage, minilm, texts)
    trained = training.train(stage, minilm)
    merging.measure(stage, minilm, trained, batch)
    serving.show(stage)
    report.summary(stage)
    seconds = time.perf_counter() - started
    files = report.write(
        stage,
        out,
        {
            "environment": env,
            "quick": quick,
            "passed": stage.passed,
            "seconds": seconds,
            "checks": stage.checks,
            **stage.figures,
        },
    )
    stage.say(f"{seconds:.0f} s. Written: {', '.join(str(file) for file in files)}")
    return stage.passed


def run_serving(console: Console, *, quick: bool = False) -> bool:
    """Runs the last step alone. True if its checks passed.

    Raises extras.MissingExtraError if a required package is not installed.
    """
    from peftk.tools.demo import serving
    from peftk.tools.demo.stage import Stage

    reason = serving.why_not()
    if reason is not None:
        raise extras.MissingExtraError(reason)
    stage = Stage(console, quick=quick, has_peft=True)
    serving.show(stage)
    return stage.passed

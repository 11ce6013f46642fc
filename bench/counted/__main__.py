"""`python -m bench.counted`: what peftk's GPU kernels launch and move, beside models of other libraries.

`docs/counted.md` says how.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench.counted import peers, report, run
from bench.counted.work import H100
from peftk.tools.benchmark import report as files
from peftk.tools.benchmark.environment import environment
from peftk.tools.options import FILE, INTEGERS, CommaList, dims_of, make_folders


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--dims", type=CommaList("K or KxN,…", dims_of), help="in_features, or in_features x out_features.")
@click.option("--tokens", type=INTEGERS, help="Rows of x.")
@click.option("--adapters", type=INTEGERS, help="Adapters in the batch.")
@click.option("--ranks", type=INTEGERS, help="LoRA ranks: each by itself, and mixed where there are several adapters.")
@click.option("--json", "json_file", type=FILE, help="Writes every figure and the environment.")
@click.option("--csv", "csv_file", type=FILE, help="Writes every figure.")
@click.option("--markdown", "markdown_file", type=FILE, help="Writes the tables.")
def main(json_file: Path | None, csv_file: Path | None, markdown_file: Path | None, **asked: Any) -> None:
    """Launches and bytes of peftk's GPU kernels, per linear, beside models of other libraries. It measures nothing.

    It counts what peftk's kernels launch, read, write and multiply, beside models of vLLM, SGLang, Punica, LoRAFusion
    and HF PEFT, and gives every side a modelled time on an H100. Lists are separated by commas.
    """
    options = run.Options(**{name: value for name, value in asked.items() if value is not None})
    counted = run.count(options)
    console = Console()
    report.show(console, counted)
    rows = [row for one in counted for row in one.rows()]
    written = {"json": json_file, "csv": csv_file, "markdown": markdown_file}
    make_folders(written)
    if json_file is not None:
        files.write_json(
            json_file,
            rows,
            environment(),
            dataclasses.asdict(options),
            roofline=H100._asdict(),
            sources={name: source._asdict() for name, source in peers.SOURCES.items()},
            launches=run.tensors(counted),
        )
    if csv_file is not None:
        files.write_csv(csv_file, run.Row, rows)
    if markdown_file is not None:
        markdown_file.write_text(report.markdown(counted), encoding="utf-8")
    if any(written.values()):
        console.print(f"Written: {', '.join(str(file) for file in written.values() if file)}", highlight=False)


if __name__ == "__main__":
    main(prog_name="python -m bench.counted")

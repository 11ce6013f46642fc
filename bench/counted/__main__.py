"""`python -m bench.counted`: counts what peftk's GPU kernels launch and move, compared with models of other libraries.

`docs/counted.md` explains the method.
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
@click.option("--adapters", type=INTEGERS, help="Numbers of adapters in the batch.")
@click.option("--ranks", type=INTEGERS, help="LoRA ranks: each alone and, with several adapters, mixed.")
@click.option("--json", "json_file", type=FILE, help="Writes all figures and the environment to this file.")
@click.option("--csv", "csv_file", type=FILE, help="Writes all figures to this file.")
@click.option("--markdown", "markdown_file", type=FILE, help="Writes the tables to this file.")
def main(json_file: Path | None, csv_file: Path | None, markdown_file: Path | None, **options_given: Any) -> None:
    """Counts launches and bytes of peftk's GPU kernels per linear layer, and of other libraries. Measures nothing.

    Counts what peftk's kernels launch, read, write and multiply, compares it with models of vLLM, SGLang, Punica,
    LoRAFusion and HF PEFT, and gives each a modelled time on an H100. Lists are separated by commas.
    """
    options = run.Options(**{name: value for name, value in options_given.items() if value is not None})
    counted = run.count(options)
    console = Console()
    report.show(console, counted)
    rows = [row for linear in counted for row in linear.rows()]
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

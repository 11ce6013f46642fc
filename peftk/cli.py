"""The command line: peftk demo, bench, tune, selftest. Heavy imports wait until a command needs them."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from peftk.system import extras
from peftk.tools.options import FILE, FOLDER, INTEGERS, CommaList, dims_of, make_folders, one_of

T = TypeVar("T")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="peftk")
def main() -> None:
    """Kernels that make parameter-efficient fine-tuning free."""


@main.command()
@click.option("--out", type=FOLDER, default=Path("peftk-demo"), show_default=True, help="For demo.png and demo.json.")
@click.option("--quick", is_flag=True, help="Fewer ranks, adapters and steps: well under a minute.")
def demo(out: Path, quick: bool) -> None:
    """peftk on a real pretrained model, in under three minutes.

    Adapts every linear of all-MiniLM-L6-v2; compares latency per rank with the plain model and HF PEFT; serves LoRAs of
    many ranks in one batch; trains one; merges and unmerges exactly. Exits with 1 if any check fails.
    """
    from peftk.backends.call import BackendError
    from peftk.tools import demo as demo_package

    try:
        passed = demo_package.run(out, _console(), quick=quick)
    except (extras.MissingExtraError, BackendError) as error:
        raise click.ClickException(str(error)) from error
    if not passed:
        raise SystemExit(1)


OPS = ("lora_linear", "multi_lora_linear", "train", "merge", "unmerge")
SUITE_OPS = ("lora_linear", "compile", "multi_lora_linear", "train", "adapter_cost", "merge", "model")
BACKENDS = ("reference", "cpu", "gemm", "triton", "cuda")


@main.command()
@click.option("--suite", type=click.Choice(["cpu"]), help="Every target of a backend, with pass or short.")
@click.option(
    "--op",
    "ops",
    type=CommaList("OP,OP…", one_of(*dict.fromkeys(OPS + SUITE_OPS))),
    help=f"{', '.join(OPS)} [default: all but unmerge]; of the suite: {', '.join(SUITE_OPS)} [default: all]",
)
@click.option("--ranks", type=INTEGERS, help="LoRA ranks; multi_lora_linear mixes them in one batch.")
@click.option("--tokens", type=INTEGERS, help="Rows of x.")
@click.option("--adapters", type=INTEGERS, help="For multi_lora_linear: adapters in the batch.")
@click.option("--dtype", "dtypes", type=CommaList("DTYPE,…", one_of("bf16", "fp16", "fp32")), help="bf16, fp16, fp32.")
@click.option("--dims", type=CommaList("K or KxN,…", dims_of), help="in_features, or in_features x out_features.")
@click.option(
    "--backend",
    "backends",
    type=CommaList("NAME,NAME…", one_of(*BACKENDS)),
    help="peftk backends to time [default: every compiled one that can run]",
)
@click.option("--no-compile", is_flag=True, help="Of the suite: leaves out torch.compile, which takes seconds per row.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: torch's]")
@click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), help="Time for each row [default: 0.7; the suite 1.5]"
)
@click.option("--repeats", type=click.IntRange(min=1), help="At most so many repetitions a row [default: 1000]")
@click.option("--json", "json_file", type=FILE, help="Writes every figure and the environment.")
@click.option("--csv", "csv_file", type=FILE, help="Writes every figure.")
@click.option("--plot", "plot_file", type=FILE, help="Writes a PNG, SVG or PDF (needs matplotlib).")
@click.option("--markdown", "markdown_file", type=FILE, help="Of the suite: writes the tables.")
def bench(
    suite: str | None,
    no_compile: bool,
    device: str,
    threads: int | None,
    **asked: Any,
) -> None:
    """Latency beside nn.Linear (without any adapter) and HF PEFT, checked before it is timed.

    All sides of a row take turns within one run; medians. "×" is how many times faster. Every result is first compared
    with fp64 arithmetic; a side that is wrong shows FAIL, is not timed, and the exit code is 1. Without options: all
    ops at a few shapes, in under two minutes. Lists are separated by commas: --ranks 1,2,4,8,16,32,64 --dims 768,4096.

    --suite cpu measures the targets of the CPU backend instead, each with its ratio, the target and the limit that this
    machine sets; the other options then choose among its rows. A target that is missed is no error.
    """
    import torch

    from peftk.backends.call import BackendError

    chosen = {name: value for name, value in asked.items() if value is not None}
    files = {kind: chosen.pop(f"{kind}_file", None) for kind in ("json", "csv", "plot", "markdown")}
    _fits_suite(suite, device, no_compile, chosen, files)
    _need_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    console = _console()
    try:
        if suite is not None:
            right = _bench_suite(console, {**chosen, "compile": not no_compile}, files)
        else:
            right = _bench_ops(console, {**chosen, "device": device}, files)
    except (BackendError, extras.MissingExtraError) as error:
        raise click.ClickException(str(error)) from error
    written = [str(file) for file in files.values() if file is not None]
    if written:
        console.print(f"Written: {', '.join(written)}", highlight=False)
    if not right:
        console.print(
            "[bold red]FAIL[/]: a side is wrong (its error as a multiple of what is allowed stands beside it)."
        )
        raise SystemExit(1)


def _fits_suite(
    suite: str | None, device: str, no_compile: bool, chosen: dict[str, Any], files: dict[str, Path | None]
) -> None:
    """Raises UsageError for an option that means nothing with, or without, --suite."""
    ops = chosen.get("ops", ())
    if suite is None:
        wrong = {"--no-compile": no_compile, "--markdown": files["markdown"], "--op": set(ops) - set(OPS)}
        rule = "only with --suite"
    else:
        wrong = {
            "--device cuda": device != "cpu",
            "--backend": "backends" in chosen,
            "--plot": files["plot"],
            "--op": set(ops) - set(SUITE_OPS),
        }
        rule = f"not with --suite {suite}"
    for option, given in wrong.items():
        if given:
            what = f"{option} {','.join(sorted(given))}" if isinstance(given, set) else option
            raise click.UsageError(f"{what}: {rule}")


def _bench_ops(console: Console, asked: dict[str, Any], files: dict[str, Path | None]) -> bool:
    from peftk.tools.benchmark import report
    from peftk.tools.benchmark.common import Record
    from peftk.tools.benchmark.environment import environment
    from peftk.tools.benchmark.run import Options, measure_all

    if files["plot"] is not None:
        extras.require("bench", "--plot", ["matplotlib"])
    options = Options(**asked)
    where = environment(options.device)
    records = measure_all(console, options, where)
    make_folders(files)
    if files["json"] is not None:
        report.write_json(files["json"], records, where, dataclasses.asdict(options))
    if files["csv"] is not None:
        report.write_csv(files["csv"], Record, records)
    if files["plot"] is not None:
        report.write_plot(files["plot"], records, where)
    return all(record.passed for record in records)


def _bench_suite(console: Console, asked: dict[str, Any], files: dict[str, Path | None]) -> bool:
    from peftk.tools.benchmark import report, suite
    from peftk.tools.benchmark.environment import environment

    options = suite.Options(**asked)
    where = environment()
    outcome = suite.run(console, options, where)
    make_folders(files)
    if files["json"] is not None:
        report.write_json(
            files["json"],
            outcome.records,
            where,
            dataclasses.asdict(options),
            roofline=outcome.roofline._asdict(),
            targets=[dataclasses.asdict(result) for result in outcome.results],
        )
    if files["csv"] is not None:
        report.write_csv(files["csv"], suite.Result, outcome.results)
    if files["markdown"] is not None:
        files["markdown"].write_text(suite.markdown(outcome, where), encoding="utf-8")
    return outcome.right


SECTIONS = ("parity", "behaviour", "speed")


@main.command()
@click.option("--device", type=click.Choice(["cpu", "cuda", "interpreter"]), default="cpu", show_default=True)
@click.option(
    "--section",
    "sections",
    type=CommaList("SECTION,…", one_of(*SECTIONS)),
    default=SECTIONS,
    help="parity, behaviour, speed [default: all; on a CPU there is parity alone]",
)
@click.option(
    "--out", type=FOLDER, help="For report.json and report.txt [default: peftk-selftest; on a CPU none is written]"
)
def selftest(device: str, sections: tuple[str, ...], out: Path | None) -> None:
    """Every backend that can run on the device against the reference in fp64: error bounds, determinism, exact unmerge.

    --device cuda also asks what only a GPU can show (CUDA graphs, streams, launches, torch.compile) and measures speed:
    all GPU tests and benchmarks in one report. --device interpreter rehearses that without a GPU, in Triton's
    interpreter, on tiny shapes. Exits with 1 if anything is wrong.
    """
    if device == "interpreter":
        _interpret()
    _need_device(device)

    from peftk.tools import selftest as package

    if out is None and device != "cpu":
        out = Path("peftk-selftest")
    if not package.run(package.target(device), _console(record=out is not None), sections=sections, out=out):
        raise SystemExit(1)


def _interpret() -> None:
    """Triton decides when it is imported, which nothing has done yet in a process of the command."""
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"

    from peftk.backends import registry
    from peftk.backends.call import BackendError

    try:
        registry.backend("triton")
    except BackendError as error:
        raise click.ClickException(f"--device interpreter: {error}") from error
    from peftk.backends import triton

    if not triton.INTERPRETED:
        raise click.ClickException("--device interpreter: triton was imported before, without TRITON_INTERPRET=1")


@main.command()
@click.option("--forget", is_flag=True, help="Deletes what was measured on this machine.")
def tune(forget: bool) -> None:
    """Measures where torch's matrix product is faster than our kernels on this CPU, for the choice in later processes.

    Takes seconds. Kept in $PEFTK_CACHE_DIR/choice.json (else below $XDG_CACHE_HOME or ~/.cache/peftk), by processor.
    Where there is a GPU, also measures which tiles its Triton kernels are the fastest with; minutes, since all are
    compiled. Kept in gpu.json beside it, by GPU.
    """
    from rich.table import Table

    from peftk.backends import measured
    from peftk.tuning import tune

    console = _console()
    try:
        if forget:
            console.print("Forgotten." if tune.forget() else "Nothing was measured on this machine.")
            return
        with console.status("") as status:
            found = tune.tune(lambda what: status.update(f"[dim]{what}"))
    except OSError as error:
        raise click.ClickException(f"the cache cannot be written: {error}") from error
    console.print("torch's GEMM with peftk's adapters on top: how many times as fast as peftk's own kernels.")
    console.print("[bold]Bold[/]: `gemm` runs such calls from now on; `cpu` runs all others.")
    table = Table("operation", "K = N", *(f"M = {M}" for M in tune.TOKENS))
    for key, points in found.items():
        margin = measured.margin(key)
        for dim in tune.DIMS:
            gains = {point.M: point.gain for point in points if point.dim == dim}
            cells = (f"{gains[M]:.2f}" if M in gains else "small" for M in tune.TOKENS)
            bold = (
                f"[bold]{c}[/]" if gains.get(M, 0) >= margin else c for M, c in zip(tune.TOKENS, cells, strict=True)
            )
            table.add_row(key, str(dim), *bold)
        table.add_section()
    console.print(table)
    console.print(f"Written: {measured.cache_file()}", highlight=False)
    if tune.has_gpu():
        _tune_gpu(console)


def _tune_gpu(console: Console) -> None:
    from rich.table import Table

    from peftk.tuning import tune

    try:
        with console.status("") as status:
            found, file = tune.tune_gpu(lambda what: status.update(f"[dim]{what}"))
    except OSError as error:
        raise click.ClickException(f"the cache cannot be written: {error}") from error
    table = Table("Triton kernels", "shipped, µs", "fastest, µs", "with")
    for key, best in found.items():
        table.add_row(key, f"{best.shipped_us:.1f}", f"{best.best_us:.1f}", best.name)
    console.print(table)
    console.print(f"Written: {file}", highlight=False)


def _console(*, record: bool = False) -> Console:
    """Files and pipes have no width of their own: wide enough there for every table."""
    console = Console(record=record)
    return console if console.is_terminal else Console(width=110, record=record)


def _need_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(
            f"--device cuda: expected a CUDA GPU, torch {torch.__version__} finds none (torch.cuda.is_available())"
        )


if __name__ == "__main__":
    main()

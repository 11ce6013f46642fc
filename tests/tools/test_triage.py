"""`peftk selftest --triage`: what hangs, crashes or fails loses its own group only; the rehearsal without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from triton import knobs
from triton.runtime.cache import FileCacheManager

from peftk import cli
from peftk.backends import choice
from peftk.cli import main
from peftk.tools import selftest, triage
from peftk.tools.selftest import parity
from peftk.tools.selftest.check import Check, Outcome, Target, WrongError
from peftk.tools.triage import ahead, environment, full, prepare, records
from peftk.tools.triage.group import Group
from peftk.tools.triage.groups import GROUPS
from peftk.tools.triage.records import Verdict
from peftk.tools.triage.worker import work
from tests.support import faulty_triage
from tests.support.paths import ROOT
from tests.support.tiers import FULL

REHEARSAL = Target("interpreter", "cpu", ())


def console() -> Console:
    return Console(record=True, width=200)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@FULL
def test_a_rehearsal_in_which_checks_hang_crash_and_fail(tmp_path: Path) -> None:
    """Each loses the rest of its own group only. In processes as the command starts them."""
    faulty = faulty_triage.GROUPS
    groups = [GROUPS["host"], faulty["hanging"], faulty["crashing"], GROUPS["merge"], faulty["failing"], GROUPS["host"]]
    shown = console()
    assert not triage.run("interpreter", groups, tmp_path, shown, command=faulty_triage.command)
    text = shown.export_text()
    verdicts = {group.name: lines(tmp_path / f"{group.name}.jsonl")[-1] for group in groups}
    assert {name: v["verdict"] for name, v in verdicts.items()} == {
        "host": "passed", "hanging": "timed out", "crashing": "crashed", "merge": "passed", "failing": "failed"
    }  # fmt: skip
    assert {name: verdicts[name]["passed"] for name in faulty} == {"hanging": 1, "crashing": 1, "failing": 2}
    assert verdicts["failing"]["failed"] == ["none op, fails"]
    assert (verdicts["crashing"]["why"], verdicts["crashing"]["during"]) == ("SIGSEGV", "none op, crashes")
    assert verdicts["hanging"]["during"] == "none op, hangs"
    assert "crashing: crashed (SIGSEGV), 1 passed, in none op, crashes" in text
    assert re.search(r"hanging: timed out \(ended after \d+ s\), 1 passed, in none op, hangs", text)
    assert "3 of 6 groups did not pass" in text
    assert text.count("host: passed") == 2  # the second time from the folder
    log = (tmp_path / "hanging.log").read_text()
    assert "about to hang" in log
    assert "in hangs" in log  # the stack, from just before the end
    assert "Segmentation fault" in (tmp_path / "crashing.log").read_text()
    assert (tmp_path / "report.txt").read_text() == text


def quick(folder: Path, script: str, **limits: float) -> dict[str, Any]:
    """The verdict on a process that runs a script, which gets the group's file as its argument. It imports no torch."""
    group = Group("quick", "a script", lambda target: (), **limits)

    def command(device: str, group: Group, file: Path) -> list[str]:
        return [sys.executable, "-c", script, str(file)]

    triage.run("interpreter", [group], folder, console(), command=command)
    return records.read(folder / "quick.jsonl")[-1]


LINES = """
import os, signal, sys, time

def line(text):
    with open(sys.argv[1], "a") as file:
        file.write(text + chr(10))

line('''{"check": "a", "state": "running"}
{"check": "a", "state": "passed"}
{"check": "b", "state": "running"}''')
"""
ENDS = {
    "passed": """line('{"check": "b", "state": "passed"}'); line('{"done": true}')""",
    "failed": """line('{"check": "b", "state": "failed"}'); line('{"done": true}')""",
    "crashed": "os.kill(os.getpid(), signal.SIGSEGV)",
    "timed out": "time.sleep(600)",
}


def test_each_end_has_its_verdict(tmp_path: Path) -> None:
    """And the groups after it run."""
    groups = [Group(state, "a script", lambda target: ()) for state in (*ENDS, "again")]
    groups = [group._replace(check_limit=0.5) if group.name == "timed out" else group for group in groups]

    def command(device: str, group: Group, file: Path) -> list[str]:
        return [sys.executable, "-c", LINES + ENDS.get(group.name, ENDS["passed"]), str(file)]

    assert not triage.run("interpreter", groups, tmp_path, console(), command=command)
    verdicts = {group.name: lines(tmp_path / f"{group.name}.jsonl")[-1] for group in groups}
    assert {name: v["verdict"] for name, v in verdicts.items()} == {
        **{state: state for state in ENDS},
        "again": "passed",
    }
    assert {name: v["during"] for name, v in verdicts.items() if v["during"]} == {"crashed": "b", "timed out": "b"}
    assert verdicts["failed"]["failed"] == ["b"]
    assert [v["passed"] for v in verdicts.values()] == [2, 1, 1, 1, 2]


def test_a_process_that_ends_early_has_crashed(tmp_path: Path) -> None:
    """Even if its exit code is 0."""
    assert quick(tmp_path, "")["verdict"] == "crashed"
    assert quick(tmp_path, "raise SystemExit(3)")["why"] == "exit code 3"
    assert quick(tmp_path, "import os; os.abort()")["why"] == "SIGABRT"


def test_what_a_group_started_ends_with_it(tmp_path: Path) -> None:
    script = """
import subprocess, sys, time
print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
open(sys.argv[1], "a").write("{}\\n")
time.sleep(600)
"""
    assert quick(tmp_path, script, check_limit=0.5)["verdict"] == "timed out"
    status = Path("/proc", (tmp_path / "quick.log").read_text().strip(), "status")
    for _ in range(100):  # a killed process may first have to be scheduled
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail(status.read_text())


def test_a_line_that_was_cut_off_is_ignored(tmp_path: Path) -> None:
    verdict = quick(
        tmp_path,
        """import sys; open(sys.argv[1], "a").write('{"check": "a", "state": "running"}\\n{"check": "a", "st')""",
    )
    file = tmp_path / "quick.jsonl"
    assert verdict["during"] == "a"
    assert '"st\n' in file.read_text()
    assert [next(iter(record)) for record in records.read(file)] == ["group", "check", "verdict"]


def checks(*runs: Callable[[], float]) -> Group:
    return Group("some", "", lambda target: (Check("triage", "b", "op", r.__name__, r) for r in runs))


def test_shares_have_every_check_once() -> None:
    def numbered(first: int, count: int) -> Group:
        names = [str(number) for number in range(first, first + count)]
        checks = [Check("triage", "b", "op", name, lambda: 0.0) for name in names]
        return Group("some", "", lambda target: checks)

    groups = [numbered(0, 3), numbered(3, 0), numbered(3, 5)]
    shares = [[check.case for check in prepare.share_of(groups, REHEARSAL, n, 3)] for n in range(3)]
    assert shares == [["0", "3", "6"], ["1", "4", "7"], ["2", "5"]]


def test_every_check_is_on_disk_before_the_next(tmp_path: Path) -> None:
    file, seen = tmp_path / "some.jsonl", []

    def look() -> float:
        seen.append([(r["check"], r["state"]) for r in lines(file)])
        return float("inf") if len(seen) == 2 else 0.25

    work(checks(look, look, look), REHEARSAL, file)
    name = "b op, look"
    assert seen[0] == [(name, "running")]
    assert seen[2] == [(name, "running"), (name, "passed"), (name, "running"), (name, "failed"), (name, "running")]
    assert lines(file)[1]["error"] == 0.25
    assert lines(file)[3]["error"] == "inf"  # JSON has no infinity
    assert lines(file)[-1]["done"]


def test_after_the_gpu_is_lost_the_rest_of_the_group_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> float:
        raise RuntimeError("an illegal memory access\nand more")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    work(checks(lost, lambda: 1 / 0), Target("cuda", "cuda", ()), tmp_path / "some.jsonl")
    states = [record["state"] for record in lines(tmp_path / "some.jsonl") if "state" in record]
    assert states == ["running", "failed", "running", "not run"]
    assert "cannot use the GPU since b op, lost" in lines(tmp_path / "some.jsonl")[3]["why"]


class Recorder:
    """Runs groups in this process, and notes which."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, states: dict[str, str]) -> None:
        self.folder, self.ran = folder, []

        def run(device: str, group: Group, folder: Path, build: str, command: object) -> Verdict:
            self.ran.append(group.name)
            verdict = Verdict(group.name, states[group.name], 1.0, 1, [], 0)
            with (folder / f"{group.name}.jsonl").open("w") as stream:
                records.write(stream, records.header(group.name, device, build))
                records.write(stream, records.verdict_record(verdict))
            return verdict

        monkeypatch.setattr(triage.process, "run", run)
        self.groups = [Group(name, "", lambda target: ()) for name in states]

    def __call__(self, device: str = "cuda", **options: Any) -> list[str]:
        self.ran.clear()
        triage.run(device, self.groups, self.folder, console(), **options)
        return list(self.ran)


def test_a_folder_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Recorder(tmp_path, monkeypatch, {"a": "passed", "b": "failed", "c": "crashed", "d": "timed out"})
    assert run() == ["a", "b", "c", "d"]
    assert run() == ["c", "d"]  # what has no complete result
    assert run(chosen=("b", "d")) == ["b", "d"]
    assert run(device="interpreter") == ["a", "b", "c", "d"]
    (tmp_path / "a.jsonl").write_text("{")
    assert run(device="interpreter") == ["a", "c", "d"]
    monkeypatch.setattr(records, "build", lambda: "another")
    assert run(device="interpreter") == ["a", "b", "c", "d"]


def test_a_build_is_known_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(folder / "lora_linear.py").exists() for folder in records._folders()] == [False, True]
    kernel = tmp_path / "expand.py"
    kernel.write_text("1")
    monkeypatch.setattr(records, "_folders", lambda: [tmp_path])
    before = records.build()
    assert records.build() == before
    kernel.write_text("2")
    assert records.build() != before
    assert f"torch {torch.__version__.split('+')[0]}" in before


KEY, OTHER = "A" * 52, "B" * 52


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A folder of two kernels that were compiled ahead for compute capability 9.0, by this Triton and package."""
    cache = tmp_path / "compiled"
    for key, name in ((KEY, "expand"), (OTHER, "sort")):
        (cache / key).mkdir(parents=True)
        for suffix in ("cubin", "json", "ptx", "ttir"):
            (cache / key / f"{name}.{suffix}").write_text(f"{suffix} of {name}")
    ahead.save(cache, 90, tmp_path / "kernels")
    return tmp_path / "kernels"


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_triton_finds_kernels_that_were_compiled_ahead(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Triton's own look-up, at the folder's new place; only what a launch needs is there."""
    cache, moved = tmp_path / "cache", tmp_path / "moved"
    kernels.rename(moved)
    assert ahead.install(moved, 90, cache) == 2
    assert {file.name for file in moved.rglob("*.*")} == {
        "manifest.json", "expand.cubin", "expand.json", "sort.cubin", "sort.json"
    }  # fmt: skip
    monkeypatch.setattr(knobs.cache, "dir", str(cache))
    monkeypatch.setattr("triton.runtime.cache._base32", lambda key: key)
    found = FileCacheManager(KEY).get_group("expand.json")
    assert found == {f"expand.{suffix}": str(cache / KEY / f"expand.{suffix}") for suffix in ("cubin", "json")}
    assert ahead.install(moved, 90, cache) == 2  # again


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m["made with"].update(Triton="3.5.0"), r"made for Triton 3\.5\.0, here it is 3"),
        (lambda m: m["made with"].update(ptxas="release 12"), "made for ptxas release 12, here it is"),
        (lambda m: m["made with"].update(package="another"), "made for package another, here it is"),
        (lambda m: m["made with"].update(Python="3.1"), r"made for Python 3\.1, here it is 3"),
        (lambda m: m["made with"].update(libfoo="1"), "made for libfoo 1, here it is None"),
        (lambda m: m["made with"].update(target=80), "made for target 80, here it is 90"),
        (lambda m: m["kernels"][OTHER].update(sha256="7"), "B: not the files that were compiled"),
        (lambda m: m["kernels"].update(C={"name": "gone", "sha256": "7"}), "C: not the files that were compiled"),
        (lambda m: m["kernels"].update({"../out": {"name": "gone", "sha256": "7"}}), "expected a manifest of"),
        (lambda m: m.pop("kernels"), "expected a manifest of"),
        (lambda m: m.update(kernels={KEY: 1}), "expected a manifest of"),
    ],
)
def test_kernels_that_do_not_fit_are_named_and_not_used(
    kernels: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_manifest(kernels, change)
    with pytest.raises(ValueError, match=why):
        ahead.install(kernels, 90, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(prepare, "capability", lambda: 90)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "cache"))
    shown = console()
    ahead.use(kernels, shown)
    assert re.search(why, shown.export_text())
    assert not (tmp_path / "cache").exists()


def test_the_command_uses_kernels_before_the_groups_run(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    Recorder(out, monkeypatch, dict.fromkeys(GROUPS, "passed"))
    monkeypatch.setattr(cli, "_require_device", lambda device: None)
    monkeypatch.setattr(prepare, "capability", lambda: 90)
    monkeypatch.setattr(knobs.cache, "dir", str(cache))
    arguments = ["selftest", "--device", "cuda", "--triage", "--out", str(out), "--kernels", str(kernels)]
    result = CliRunner().invoke(main, arguments)
    assert "2 kernels from" in result.output
    assert "2 kernels from" in (out / "report.txt").read_text()
    assert {folder.name for folder in cache.iterdir()} == {KEY, OTHER}


def test_the_triage_goes_on_when_the_gpu_cannot_be_asked(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> int:
        raise RuntimeError("no driver")

    monkeypatch.setattr(prepare, "capability", broken)
    shown = console()
    ahead.use(kernels, shown)
    assert "RuntimeError: no driver; the kernels compiled ahead are not used" in shown.export_text()


def test_a_folder_without_a_manifest_is_named(tmp_path: Path) -> None:
    for text in (None, "{", "[]"):
        if text is not None:
            (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json: expected a manifest of"):
            ahead.install(tmp_path, 90, tmp_path / "cache")


def test_too_many_bytes_are_not_saved(kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MOST_BYTES", 20)
    with pytest.raises(ValueError, match="2 kernels: expected at most 20 bytes, got 54"):
        ahead.save(tmp_path / "compiled", 90, tmp_path / "large")
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize(
    ("target", "said"), [("90", "expected a new or empty folder"), ("75", "75 is not in the range")]
)
def test_ahead_refuses_a_folder_in_use_and_an_old_gpu(kernels: Path, target: str, said: str) -> None:
    result = CliRunner().invoke(ahead.main, ["--target", target, "--out", str(kernels)])
    assert result.exit_code == 2
    assert said in result.output


def test_a_group_says_what_it_compiled(tmp_path: Path) -> None:
    def compiles() -> float:
        for name, cached in (("expand", True), ("sort", False)):
            knobs.compilation.listener(src=SimpleNamespace(name=name), cache_hit=cached, metadata={})
        return 0.0

    before = knobs.compilation.listener
    work(checks(compiles), REHEARSAL, tmp_path / "some.jsonl")
    assert lines(tmp_path / "some.jsonl")[-1]["compiled"] == ["sort"]
    assert knobs.compilation.listener is before


@pytest.mark.parametrize("device", ["interpreter", pytest.param("cuda", marks=FULL)])
def test_full_has_every_check_of_the_selftest_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every backend runs."""
    monkeypatch.setattr(choice, "cannot_run", lambda backend, call: None)
    for module in (full, selftest):
        monkeypatch.setattr(module, "cuda_events", lambda: None)
    target = Target(device, "cpu" if device == "interpreter" else device, ("reference", "gemm", "triton", "cuda"))
    sections = {"parity": parity.checks, "behaviour": full._behaviour, "speed": full._speed}
    for section, of_section in sections.items():
        for check in selftest._checks(section, target, {}):
            assert [part.section for part in full.PARTS if part.has(check)].count(of_section) == 1, check
    assert {part.section for part in full.PARTS} == set(sections.values())


def test_full_comes_after_the_triage_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(device: str, group: Group, folder: Path, build: str, command: object) -> Verdict:
        ran.append(group.name)
        state = "crashed" if group.name == "sweeps" and ran.count("sweeps") == 1 else "passed"
        verdict = Verdict(group.name, state, 1.0, 1, [], 0)
        with (folder / f"{group.name}.jsonl").open("w") as stream:
            records.write(stream, records.header(group.name, device, build))
            records.write(stream, records.verdict_record(verdict))
        return verdict

    monkeypatch.setattr(triage.process, "run", run)
    arguments = ["selftest", "--device", "interpreter", "--triage", "--out", str(tmp_path)]
    CliRunner().invoke(main, arguments)
    assert ran == list(GROUPS)
    CliRunner().invoke(main, [*arguments, "--full"])
    assert ran == [*GROUPS, *full.FULL]
    CliRunner().invoke(main, [*arguments, "--full"])
    assert ran == [*GROUPS, *full.FULL, "sweeps"]
    CliRunner().invoke(main, [*arguments, "--group", "sorts,merge"])
    assert ran[-2:] == ["merge", "sorts"]


@FULL
def test_groups_of_full_in_their_processes(tmp_path: Path) -> None:
    """A rehearsal of those that are quick there."""
    arguments = ["selftest", "--device", "interpreter", "--triage", "--group", "sweeps,sorts,speed,prepare-cases"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    verdicts = {file.stem: lines(file)[-1] for file in tmp_path.glob("*.jsonl")}
    assert {name: verdict["verdict"] for name, verdict in verdicts.items()} == dict.fromkeys(
        ("sweeps", "sorts", "speed", "prepare-cases"), "passed"
    )
    assert "speed: medians in µs" in result.output
    assert verdicts["sweeps"]["passed"] > 3


def test_every_outcome_has_a_record() -> None:
    done = Outcome("triage", "b", "op", "case", 0.5, 0.1, figures={"us": {}})
    assert records.outcome(done)["figures"] == {"us": {}}
    assert records.outcome(Outcome("triage", "b", "op", "case", not_run="no GPU"))["state"] == "not run"


def test_a_kernel_that_is_compiled_again_is_found(tmp_path: Path) -> None:
    files = iter(range(9))

    def always() -> None:
        (tmp_path / f"{next(files)}.cubin").touch()

    with pytest.raises(WrongError, match="the second process compiled 1 kernels again"):
        environment.check_found_again(always, tmp_path)
    assert environment.check_found_again(lambda: None, tmp_path).figures["compiled"] == [0, 0]
    with pytest.raises(WrongError, match="found none"):
        environment.check_found_again(lambda: None, tmp_path / "empty")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--triage"], "expected --device cuda or --device interpreter, got cpu"),
        (["--triage", "--device", "interpreter", "--section", "speed"], "--section: not with --triage"),
        (["--triage", "--device", "interpreter", "--group", "merge,none"], "got none"),
        (["--group", "merge"], "--group: only with --triage"),
        (["--full"], "--full: only with --triage"),
        (["--kernels", "tests"], "--kernels: only with --triage"),
        (["--triage", "--device", "interpreter", "--kernels", "tests"], "--kernels: only with --device cuda"),
    ],
)
def test_bad_options(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["selftest", *arguments, "--out", str(tmp_path / "made")])
    assert result.exit_code == 2
    assert said in result.output
    assert not (tmp_path / "made").exists()


@FULL
def test_the_rehearsal(tmp_path: Path) -> None:
    """Every group of the command in its own process, in Triton's interpreter."""
    out = tmp_path / "made"
    result = CliRunner().invoke(main, ["selftest", "--device", "interpreter", "--triage", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert [lines(out / f"{name}.jsonl")[-1]["verdict"] for name in GROUPS] == ["passed"] * len(GROUPS)
    ran = {r["check"] for name in GROUPS for r in lines(out / f"{name}.jsonl") if r.get("state") == "passed"}
    for words in ("one adapter", "many adapters", "merge", "reduce-overhead", "GPU time", "host time"):
        assert any(words in check for check in ran), words
    left_out = {
        r["check"]: r["why"] for name in GROUPS for r in lines(out / f"{name}.jsonl") if r.get("state") == "not run"
    }
    assert left_out["triton CUDA graph, other adapters, removed and loaded after the capture"] == "needs a GPU"
    timed = next(r["figures"]["us"] for r in lines(out / "time-r16.jsonl") if "figures" in r)
    assert set(timed) == {
        "nn.Linear",
        "nn.Linear + two addmm",
        "base only",
        "1 launch",
        "2 launches",
        "overlapped",
        "field",
        "gemm",
        "shrink alone",
    }
    assert "time-r16: medians in µs" in result.output
    again = CliRunner().invoke(main, ["selftest", "--device", "interpreter", "--triage", "--out", str(out)])
    assert again.output.count("from an earlier run") == len(GROUPS)


@pytest.mark.parametrize("nvcc", [True, False])
def test_the_script_builds_for_this_gpu_and_runs_the_triage(tmp_path: Path, nvcc: bool) -> None:
    """With programs that say how they were called. Without nvcc, the rest is built and checked."""
    programs = {
        "nvidia-smi": "echo 9.0; echo 9.0",
        "python": f'echo "$PEFTK_BUILD_CUDA $PEFTK_CUDA_ARCHS $*"; [ "$PEFTK_BUILD_CUDA" != 1 ] || {str(nvcc).lower()}',
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python"}
    command = [str(ROOT / "scripts/triage.sh"), "--out", "a folder"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    pip = "-m pip install -q --no-index --no-deps --no-build-isolation -e ."
    builds = ["1 90 setup.py -q build_ext --inplace"] + ([f"1 90 {pip}"] if nvcc else [])
    builds += [] if nvcc else ["0 90 setup.py -q build_ext --inplace", f"0 90 {pip}"]
    assert done.stdout.splitlines() == [*builds, " 90 -m peftk.cli selftest --device cuda --triage --out a folder"]
    assert ("do not build here" in done.stderr) is not nvcc

"""The file of a group, GROUP.jsonl: a line of JSON for each event, on disk before the next event.

    {"group": "merge", "device": "cuda", "build": "…", "time": "…"}                       the parent, before the start
    {"check": "triton merge, …", "state": "running"}                                      the group's process
    {"check": "triton merge, …", "state": "passed", "seconds": 0.2, "error": 0.4, …}      the group's process
    {"done": true, "seconds": 12.3}                                                       the group's process
    {"verdict": "passed", "passed": 14, "failed": [], …}                                  the parent, after the end

The last line but one shows what ran when a process hung or crashed. A line that was cut off is ignored.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.util
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import peftk
from peftk.tools.benchmark.environment import version
from peftk.tools.selftest.check import Check, Outcome


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a group.

    state: passed, failed, crashed or timed out. passed, not_run: numbers of checks. failed: their names. during: the
    check that ran when the process crashed or its time was up. why: how it ended, in words.
    """

    group: str
    state: str
    seconds: float
    passed: int
    failed: list[str]
    not_run: int
    during: str | None = None
    why: str | None = None

    @property
    def complete(self) -> bool:
        """Whether every check of the group has had its turn."""
        return self.state in ("passed", "failed")

    def __str__(self) -> str:
        counts = [f"{self.passed} passed"] + ([f"{self.not_run} not run"] if self.not_run else [])
        words = f"{self.state}{f' ({self.why})' if self.why else ''}"
        if self.failed:
            counts += [f"{len(self.failed)} failed: {'; '.join(self.failed)}"]
        if not self.complete:
            counts += [f"in {self.during}" if self.during else "outside of a check"]
        return f"{self.group}: {words}, {', '.join(counts)}, {self.seconds:.0f} s"


def write(stream: TextIO, record: dict[str, Any]) -> None:
    """Appends a line, and waits until it is on disk."""
    stream.write(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n")
    stream.flush()
    os.fsync(stream.fileno())


def read(file: Path) -> list[dict[str, Any]]:
    """The records of a file, without a last line that was cut off; [] if there is no file."""
    if not file.exists():
        return []
    return list(_whole(file.read_text(encoding="utf-8", errors="replace").splitlines()))


def _whole(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue  # the process ended while it wrote


def header(group: str, device: str, build: str) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"group": group, "device": device, "build": build, "time": now}


def running(check: Check) -> dict[str, Any]:
    return {"check": str(check), "state": "running"}


def outcome(result: Outcome) -> dict[str, Any]:
    state = "failed" if result.failed else "not run" if result.not_run is not None else "passed"
    why = result.problem or result.not_run
    found = {"seconds": round(result.seconds, 3), "error": result.error, "why": why, "figures": result.figures}
    name = f"{result.backend} {result.op}, {result.case}"
    return {"check": name, "state": state, **{key: value for key, value in found.items() if value is not None}}


def judge(found: list[dict[str, Any]], group: str, exit_code: int | None, seconds: float) -> Verdict:
    """The verdict on a process that left these records. exit_code: as of `subprocess`, or None if its time was up."""
    checks = [record for record in found if "check" in record]
    ended = [record for record in checks if record["state"] != "running"]
    failed = [record["check"] for record in ended if record["state"] == "failed"]
    during = checks[-1]["check"] if checks and checks[-1]["state"] == "running" else None
    done = any("done" in record for record in found)
    why = None
    if exit_code is None:
        state, why = "timed out", f"ended after {seconds:.0f} s"
    elif exit_code or not done:
        state, why = "crashed", _end(exit_code)
    else:
        state = "failed" if failed else "passed"
    counts = {name: sum(record["state"] == name for record in ended) for name in ("passed", "not run")}
    return Verdict(group, state, round(seconds, 1), counts["passed"], failed, counts["not run"], during, why)


def _end(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def verdict_record(verdict: Verdict) -> dict[str, Any]:
    return {"verdict": verdict.state, **{k: v for k, v in dataclasses.asdict(verdict).items() if k != "state"}}


def complete(folder: Path, group: str, device: str, build: str) -> Verdict | None:
    """The verdict that the folder has on a group, if it is of this device and build and all checks had their turn."""
    found = read(folder / f"{group}.jsonl")
    if not found or "verdict" not in found[-1] or (found[0].get("device"), found[0].get("build")) != (device, build):
        return None
    fields = dict(found[-1])
    verdict = Verdict(state=fields.pop("verdict"), **fields)
    return verdict if verdict.complete else None


def build() -> str:
    """Identifies what is tested: the package's files, and the versions of torch and triton."""
    return f"{_digest('.py', '.so')}, torch {version('torch')}, triton {version('triton')}"


def sources() -> str:
    """Identifies the package's Python files, and with them its Triton kernels and their launches."""
    return _digest(".py")


def _digest(*suffixes: str) -> str:
    digest = hashlib.sha256()
    for folder in _folders():
        for file in sorted(path for path in folder.rglob("*") if path.suffix in suffixes):
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _folders() -> list[Path]:
    """The package's folder, and that of its Triton kernels, which lies elsewhere in a checkout."""
    kernels = importlib.util.find_spec("peftk.triton_kernels")
    return [Path(peftk.__file__).parent, *map(Path, (kernels and kernels.submodule_search_locations) or ())]


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they are written as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value

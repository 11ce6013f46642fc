"""The process of a group: started, watched, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from peftk.tools.triage import records
from peftk.tools.triage.group import Group
from peftk.tools.triage.records import Verdict

_TO_DIE = 10.0  # seconds that a killed process may take: a driver may hold it
_LOOK = 0.1  # seconds between two looks at a group's file


def worker(device: str, group: Group, file: Path) -> list[str]:
    """The command that runs a group's checks and appends to its file."""
    return [sys.executable, "-m", "peftk.tools.triage", "run", device, group.name, str(file.absolute())]


def run(
    device: str, group: Group, folder: Path, build: str, command: Callable[[str, Group, Path], list[str]]
) -> Verdict:
    """Runs a group's process, until it ends or its time is up. What it prints goes to GROUP.log."""
    file = folder / f"{group.name}.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        records.write(stream, records.header(group.name, device, build))
    started = time.monotonic()
    with (folder / f"{group.name}.log").open("wb") as log:
        exit_code = _run(command(device, group, file), group, file, log.fileno(), _environment(device))
    verdict = records.judge(records.read(file), group.name, exit_code, time.monotonic() - started)
    with file.open("a", encoding="utf-8") as stream:
        if not file.read_bytes().endswith(b"\n"):
            stream.write("\n")  # after a line that was cut off
        records.write(stream, records.verdict_record(verdict))
    return verdict


def _environment(device: str) -> dict[str, str]:
    """With the modules of this process, whatever lies in the working directory."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, **({"TRITON_INTERPRET": "1"} if device == "interpreter" else {})}


def _run(command: list[str], group: Group, file: Path, log: int, environment: dict[str, str]) -> int | None:
    """The exit code; None if the time was up, or if the process could not even be ended."""
    process = subprocess.Popen(
        command,
        cwd=file.parent,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,  # so that compilers that it started end with it
    )
    try:
        return _wait(process, group, file)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_TO_DIE)


def _wait(process: subprocess.Popen[bytes], group: Group, file: Path) -> int | None:
    """The exit code; None if the group takes too long, or nothing was added to its file for too long."""
    started, size = time.monotonic(), file.stat().st_size
    changed: float | None = None  # unknown until the process, which may import for long, has written something
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(_LOOK)
        now, found = time.monotonic(), file.stat().st_size
        if found != size:
            size, changed = found, now
        if now - started > group.limit or (changed is not None and now - changed > group.check_limit):
            return None

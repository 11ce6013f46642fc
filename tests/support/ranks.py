"""Runs the checks of a module on several ranks over gloo: one process that imports once and forks the ranks.

    python -m tests.support.ranks WORLD RESULTS MODULE...

A check is a function `check_…(mesh)` of one of the modules. The first that fails on any rank ends the run, since the
other ranks wait for that one.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.support.paths import ROOT

TIMEOUT = 600  # seconds for a whole run


def checks_of(module: str) -> dict[str, Callable[[object], None]]:
    """The checks that a module defines, in order."""
    found = vars(importlib.import_module(module))
    return {name: check for name, check in found.items() if name.startswith("check_") and check.__module__ == module}


def run(world: int, *modules: str) -> dict[str, str]:
    """What became of each check that began: "" or the traceback of the rank that failed first."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PEFTK_FIRST_USE": "0"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.ranks", str(world), str(results), *modules],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        found: dict[str, str] = json.loads(results.read_text()) if results.exists() else {}
        if done.returncode and not any(found.values()):
            found["the run"] = done.stderr[-4000:]
        return found


def _rank(rank: int, world: int, modules: list[str], folder: str) -> None:
    import datetime

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (world,))
    found: dict[str, str] = {}
    for name, check in [named for module in modules for named in checks_of(module).items()]:
        try:
            check(mesh)
            found[name] = ""
        except BaseException:
            found[name] = f"rank {rank} of {world}:\n{traceback.format_exc()}"
        Path(f"{folder}/{rank}").write_text(json.dumps({"time": time.monotonic(), "found": found}))
        os.replace(f"{folder}/{rank}", f"{folder}/{rank}.json")  # at once, since the process may be killed
        if found[name]:
            os._exit(1)
        dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def _main(world: int, results: str, modules: list[str]) -> int:
    import signal

    for module in modules:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                _rank(rank, world, modules, folder)
            children.append(child)
        codes, deadline = {}, time.monotonic() + TIMEOUT - 20
        while len(codes) < world:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child:
                codes[child] = os.waitstatus_to_exitcode(status)
            if any(codes.values()) or time.monotonic() > deadline:
                for other in set(children) - set(codes):
                    os.kill(other, signal.SIGKILL)
                    os.waitpid(other, 0)
                    codes[other] = 1
            if not child:
                time.sleep(0.01)
        found: dict[str, str] = {}
        written = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
        for last in sorted(written, key=lambda each: float(each["time"])):  # another rank may then fail to reach it
            for name, error in last["found"].items():
                found[name] = found.get(name) or error
        Path(results).write_text(json.dumps(found))
        return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))

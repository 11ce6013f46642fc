"""The processes that `peftk selftest --triage` starts.

python -m peftk.tools.triage run DEVICE GROUP FILE                  runs a group, and appends to its file
python -m peftk.tools.triage compile GROUP,… CAPABILITY SHARE/SHARES  compiles one share of the kernels of groups
"""

from __future__ import annotations

import sys
from pathlib import Path

from peftk.tools import selftest
from peftk.tools.triage.full import EVERY
from peftk.tools.triage.prepare import compile_share
from peftk.tools.triage.worker import work


def run(device: str, group: str, file: str) -> None:
    work(EVERY[group], selftest.target(device), Path(file))


def compile(groups: str, target: str, share: str) -> None:
    problems = compile_share([EVERY[name] for name in groups.split(",")], int(target), *map(int, share.split("/")))
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    {"run": run, "compile": compile}[sys.argv[1]](*sys.argv[2:])

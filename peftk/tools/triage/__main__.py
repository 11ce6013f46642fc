"""The processes that `peftk selftest --triage` starts.

python -m peftk.tools.triage DEVICE GROUP FILE       runs a group, and appends to its file
python -m peftk.tools.triage compile SHARE SHARES    compiles one share of the kernels of all groups, on a GPU
"""

from __future__ import annotations

import sys
from pathlib import Path

from peftk.tools import selftest
from peftk.tools.triage.groups import GROUPS
from peftk.tools.triage.prepare import compile_share
from peftk.tools.triage.worker import work


def main(first: str, second: str, third: str) -> None:
    if first == "compile":
        compile_share(GROUPS.values(), selftest.target("cuda"), int(second), int(third))
    else:
        work(GROUPS[second], selftest.target(first), Path(third))


if __name__ == "__main__":
    main(*sys.argv[1:])

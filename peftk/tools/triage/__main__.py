"""`python -m peftk.tools.triage DEVICE GROUP FILE`: the process of one group, started by `peftk selftest --triage`."""

from __future__ import annotations

import sys
from pathlib import Path

from peftk.tools import selftest
from peftk.tools.triage.groups import GROUPS
from peftk.tools.triage.worker import work

if __name__ == "__main__":
    device, name, file = sys.argv[1:]
    work(GROUPS[name], selftest.target(device), Path(file))

"""Every barrier of csrc/cuda is needed: without it the race detector finds a race, or results are wrong.

No barrier is missing: tests/kernels/cuda/test_<stem>_on_host.py run the same drivers on the unchanged sources.
"""

from __future__ import annotations

import re

import pytest

from tests.support.host_cuda import FEWER_FORMS, ROOT, failure, needs_host_cuda, run_driver, with_changes
from tests.support.tiers import spread

BARRIER = re.compile(r"__sync(?:threads|warp)\(\);")
LORA_LINEAR = "csrc/cuda/lora_linear.cu"
# By driver: its arguments, the kernel's source, and changes of it that leave fewer instantiations.
DRIVERS = {
    "lora_linear": (("20",), LORA_LINEAR, FEWER_FORMS),
    "merge": ((), "csrc/cuda/merge.cu", ()),
    "segments": (("64", "300", "200", "3", "1000", "3", "2100", "20"), "csrc/cuda/segments.cu", ()),
}
FILES = {
    "lora_linear": ("tickets.cuh", "rows.cuh", "shrink.cuh", "expand.cuh"),
    "merge": ("merge.cu", "merge_tile.cuh"),
    "segments": ("segments.cu",),
}
BARRIERS = [
    (stem, f"csrc/cuda/{name}", number)
    for stem, names in FILES.items()
    for name in names
    for number in range(len(BARRIER.findall((ROOT / "csrc/cuda" / name).read_text())))
]

pytestmark = needs_host_cuda


def test_every_file_with_barriers_is_here() -> None:
    found = {path.name for path in (ROOT / "csrc/cuda").iterdir() if BARRIER.search(path.read_text())}
    assert found == {name for names in FILES.values() for name in names}


@pytest.mark.parametrize(("stem", "path", "number"), spread(BARRIERS, default=0, full=5))
def test_is_needed(stem: str, path: str, number: int) -> None:
    arguments, source, fewer = DRIVERS[stem]
    text = (ROOT / path).read_text()
    begin, end = list(BARRIER.finditer(text))[number].span()
    mutants = {source: with_changes(source, *fewer)} | {path: f"{text[:begin]};{text[end:]}"}
    found = failure(run_driver(stem, "thread", mutants, *arguments))
    assert found is not None, f"{path}:{text[:begin].count(chr(10)) + 1}: nothing shows without it"

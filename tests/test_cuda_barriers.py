"""Every barrier of csrc/cuda is needed: without any one of them the race detector finds a race, or results are wrong.

And there is none too few: tests/test_<stem>_on_host.py run the same drivers on the sources as they are.
"""

from __future__ import annotations

import re

import pytest

from tests.host_cuda import HOST, REPORT, ROOT, executed, needs_host_cuda, program, replaced
from tests.test_lora_linear_on_host import FEWER_FORMS

BARRIER = re.compile(r"__sync(?:threads|warp)\(\);")
LORA_LINEAR = "csrc/cuda/lora_linear.cu"
# The driver's source, its arguments, the kernel's source, and what is changed in it to have fewer forms.
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

pytestmark = [pytest.mark.full, needs_host_cuda]


def test_every_file_with_barriers_is_here() -> None:
    found = {path.name for path in (ROOT / "csrc/cuda").iterdir() if BARRIER.search(path.read_text())}
    assert found == {name for names in FILES.values() for name in names}


@pytest.mark.parametrize(("stem", "path", "number"), BARRIERS)
def test_is_needed(stem: str, path: str, number: int) -> None:
    arguments, source, fewer = DRIVERS[stem]
    text = (ROOT / path).read_text()
    begin, end = list(BARRIER.finditer(text))[number].span()
    mutants = {source: replaced(source, *fewer)} | {path: f"{text[:begin]};{text[end:]}"}
    done = executed(program([HOST / f"{stem}_races.cpp", ROOT / source], "thread", mutants), *arguments)
    line = text[:begin].count("\n") + 1
    assert done.returncode, f"{path}:{line}: nothing shows without it"
    assert REPORT.search(done.stderr) or done.returncode == 1, f"{path}:{line}: {done.stderr}"

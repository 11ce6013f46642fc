"""Checks the compiled CPU kernels.

Every SIMD level has its instructions, no accumulators are spilled, and no machine can come to run a function that was
compiled for a higher level.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import cpp_build

pytestmark = [
    pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump and nm, of binutils"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 instructions"),
]

FMA = re.compile(r"vfn?m(add|sub)\d+ps|vdpbf16ps")


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str

    @property
    def is_vex(self) -> bool:
        """Whether it is beyond the baseline (AVX or later), by name and registers."""
        return self.name.startswith("v") and re.search(r"%[xyz]mm", self.operands) is not None

    @property
    def is_avx512(self) -> bool:
        return self.is_vex and re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]|\{1to", self.operands) is not None


class Function(NamedTuple):
    name: str
    instructions: list[Instruction]

    def stack(self) -> str:
        """A pattern of operands that access the stack. rbp may be the frame pointer or not."""
        framed = any(i.name == "mov" and i.operands == "%rsp,%rbp" for i in self.instructions)
        return r"\(%r[sb]p" if framed else r"\(%rsp"

    def innermost_loops(self) -> Iterator[list[Instruction]]:
        jumps = [(jump_target(i), i.address) for i in self.instructions if i.name.startswith("j")]
        spans = [(first, last) for first, last in jumps if first is not None and first <= last]
        for span in spans:
            if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans):
                yield [i for i in self.instructions if span[0] <= i.address <= span[1]]


def jump_target(jump: Instruction) -> int | None:
    match = re.match(r"([0-9a-f]+)\b", jump.operands)
    return int(match[1], 16) if match else None


def functions(binary: Path) -> list[Function]:
    command = ["objdump", "-d", "--no-show-raw-insn", str(binary)]
    found: list[Function] = []
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            found.append(Function(head[1], []))
        elif match := re.match(r"\s*([0-9a-f]+):\t(\S+)(?:\s+(.*))?$", line):
            found[-1].instructions.append(Instruction(int(match[1], 16), match[2], match[3] or ""))
    return found


def symbols(binary: Path) -> Iterator[tuple[str, str]]:
    """The functions and variables that an object file defines: (nm's letter for the kind, mangled name)."""
    command = ["nm", "--defined-only", str(binary)]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        _, kind, name = line.split(maxsplit=2)
        yield kind, name


class Built(NamedTuple):
    levels: dict[str, list[Path]]  # the objects of every level
    others: list[Path]
    module: Path


@pytest.fixture(scope="module")
def built_module() -> Built:
    """Builds peftk._cpu and its objects with the flags of setup.py."""
    setup = cpp_build.load_setup()
    objects = setup.cpu_objects()
    module = setup.BUILD / "cpu.so"
    cpp_build.build(setup, objects, [module])
    levels: dict[str, list[Path]] = {}
    for item in objects:
        if item.folder.startswith("cpu/"):
            levels.setdefault(item.folder.removeprefix("cpu/"), []).append(cpp_build.ROOT / item.path)
    others = [cpp_build.ROOT / item.path for item in objects if not item.folder.startswith("cpu/")]
    return Built(levels, others, cpp_build.ROOT / module)


@pytest.fixture(scope="module")
def code(built_module: Built) -> dict[Path, list[Function]]:
    return {
        path: functions(path)
        for path in [*built_module.others, *(p for paths in built_module.levels.values() for p in paths)]
    }


def test_only_names_of_its_own_leave_a_level(built_module: Built) -> None:
    """If several objects define a function with external linkage, the linker keeps one of them for all levels, which
    might be the one compiled for AVX-512."""
    for level, paths in built_module.levels.items():
        for path in paths:
            for kind, name in symbols(path):
                own = f"5peftk{len(level)}{level}" in name
                assert kind not in "TWui" or own, f"{path}: {name} is not in namespace peftk::{level}"


def test_instructions_of_every_level(built_module: Built, code: dict[Path, list[Function]]) -> None:
    for path in [*built_module.others, *built_module.levels["portable"]]:
        for function in code[path]:
            beyond = [i for i in function.instructions if i.is_vex]
            assert not beyond, f"{path}: {function.name}: {beyond[0]}"
    for path in built_module.levels.get("avx2", []):
        for function in code[path]:
            beyond = [i for i in function.instructions if i.is_avx512]
            assert not beyond, f"{path}: {function.name}: {beyond[0]}"
    for path in built_module.levels.get("avx512", []):
        for function in code[path]:
            beyond = [i for i in function.instructions if "bf16" in i.name]
            assert not beyond, f"{path}: {function.name}: {beyond[0]}"


def test_the_module_has_no_such_instructions_from_elsewhere(
    built_module: Built, code: dict[Path, list[Function]]
) -> None:
    of_levels = {function.name for paths in built_module.levels.values() for path in paths for function in code[path]}
    for function in functions(built_module.module):
        if function.name not in of_levels:
            beyond = [i for i in function.instructions if i.is_vex]
            assert not beyond, f"{function.name}: {beyond[0]}"


@pytest.mark.parametrize(
    ("level", "register", "tiles"),
    [
        ("avx2", "ymm", ["outer_tile", "panel_tile"]),
        ("avx512", "zmm", ["outer_tile", "dot_tile"]),
        ("avx512_bf16", "zmm", ["outer_tile", "dot_tile"]),
    ],
)
def test_tiles_stay_in_registers(
    built_module: Built, code: dict[Path, list[Function]], level: str, register: str, tiles: list[str]
) -> None:
    """The innermost loops multiply whole registers, and neither store registers on the stack nor reload them."""
    if level not in built_module.levels:
        pytest.skip(f"the compiler does not know {level}")
    (path,) = (path for path in built_module.levels[level] if path.stem == "lora_linear")
    for tile in tiles:
        loops = [
            (function, loop)
            for function in code[path]
            if f"{len(tile)}{tile}I" in function.name
            for loop in function.innermost_loops()
            if any(FMA.match(i.name) for i in loop)
        ]
        assert loops, f"{path}: no {tile}"
        for function, loop in loops:
            name = function.name
            products = [i for i in loop if FMA.match(i.name)]
            narrow = [i for i in products if f"%{register}" not in i.operands]
            assert not narrow, f"{name}: {narrow[0]}"
            spilled = [i for i in loop if f"%{register}" in i.operands and re.search(function.stack(), i.operands)]
            # Known exception: with fp32 tokens and bf16 rows, 4 x 6 sums and their operands need over 32 registers. The
            # compiler keeps one sum in memory, and may not keep more.
            allowed = len(products) // 24 if "7EvenOdd" in name else 0
            assert len(spilled) <= allowed, (
                f"{name}: {len(spilled)} accesses to the stack among {len(products)} products: {spilled[0]}"
            )
        pairs = [function.name for function, loop in loops if any(i.name == "vdpbf16ps" for i in loop)]
        assert bool(pairs) == (level == "avx512_bf16"), f"{path}: {tile} with vdpbf16ps: {pairs}"

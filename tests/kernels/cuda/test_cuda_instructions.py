"""The asm statements of csrc/cuda/instructions.cuh do what its comments say. The host runs different definitions of the
same functions (tests/cuda_emulator/cuda/instructions.cuh), so no other test would notice a misplaced operand."""

from __future__ import annotations

import re

import pytest

from tests.support.paths import ROOT

NAMES = re.compile(r"__device__ inline \w+ (\w+)\(")

# From PTX ISA 8.x, with the C++ operands in place of the registers.
TO = "{to[0], to[1], to[2], to[3]}"
SUM, A = "{sum[0], sum[1], sum[2], sum[3]}", "{a[0], a[1], a[2], a[3]}"
EXPECTED = {
    "copy_async_16": "cp.async.cg.shared.global [shared_address(to_shared)], [from_global], 16, bytes;",
    "copy_async_commit": "cp.async.commit_group;",
    "copy_async_wait": "cp.async.wait_group kPending;",
    "load_matrices": f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {TO}, [shared_address(shared_row)];",
    "multiply_bf16": f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {SUM}, {A}, {{b[0], b[1]}}, {SUM};",
    "multiply_f16": f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {SUM}, {A}, {{b[0], b[1]}}, {SUM};",
    "add_relaxed": "atom.add.relaxed.gpu.global.s32 before, [counter], value;",
    "add_release": "atom.add.release.gpu.global.s32 before, [counter], value;",
    "add_acq_rel": "atom.add.acq_rel.gpu.global.s32 before, [counter], value;",
    "load_acquire": "ld.acquire.gpu.global.s32 value, [counter];",
}
# Clobbers and constraints: "memory" for all that access it, "+" for the sums.
TOUCH_NO_MEMORY = ("multiply_bf16", "multiply_f16")


def instructions() -> dict[str, tuple[str, str]]:
    """For each function with an asm statement: its template with operands filled in, and the rest of the statement."""
    found = {}
    text = (ROOT / "csrc/cuda/instructions.cuh").read_text()
    for function in re.split(r"(?=__device__ inline )", text)[1:]:
        statement = re.search(r'asm volatile\(\s*((?:"[^"]*"\s*)+)(:.*?)?\);', function, re.DOTALL)
        if statement is None:
            continue
        template = "".join(re.findall(r'"([^"]*)"', statement[1]))
        rest = statement[2] or ""
        operands = re.findall(r'"[=+]?[rlfn]"\(((?:[^()]|\([^()]*\))*)\)', rest)
        name = NAMES.match(function)
        assert name is not None
        for number in reversed(range(len(operands))):
            template = template.replace(f"%{number}", operands[number])
        found[name[1]] = (template, rest)
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_operands_are_in_their_places(name: str) -> None:
    template, rest = instructions()[name]
    assert template == EXPECTED[name]
    assert ('"memory"' in rest) == (name not in TOUCH_NO_MEMORY)
    if name in TOUCH_NO_MEMORY:
        assert rest.count('"+f"(sum[') == 4


def test_every_instruction_is_here() -> None:
    assert instructions().keys() == EXPECTED.keys()


def test_the_host_defines_the_same_functions() -> None:
    device = set(NAMES.findall((ROOT / "csrc/cuda/instructions.cuh").read_text()))
    host = (ROOT / "tests/cuda_emulator/cuda/instructions.cuh").read_text()
    assert {name for name in device if not re.search(rf"\b{name}\b", host)} <= {"shared_address"}

"""Writes a table of registers, spills and instructions of every shipped Triton configuration.

    python -m tests.support.triton_table > docs/compiled.md      takes about two minutes

Needs no GPU: every configuration is compiled for its target, as in `tests/kernels/triton/test_triton_compile.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
import triton

from tests.support.triton_aot import Compiled
from tests.support.triton_calls import BF16, F32, FORMS, MORE_TARGETS, TARGETS, compile_call, compile_wgrad

HEADER = f"""# What the compiler makes of the shipped configurations

Written by `python -m tests.support.triton_table` with triton {triton.__version__}; nothing was timed, and no GPU was
there. K = N = 4096, rows that start on 16 bytes. Spilled: bytes of stack per thread. Tensor cores: the instructions in
the code, not how often they run. 16 bytes: accesses of global memory that are so wide; copy engine: those by tensor
descriptors.

| target | kernel | x | rows | registers | spilled | shared, KiB | tensor mem. | tensor cores | 16 bytes | copy engine |
|---|---|---|--:|--:|--:|--:|--:|---|--:|--:|"""

# by assembly: NVIDIA's PTX, AMD's instructions
_TENSOR_CORES = r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma\w*?)(?=[._ ])"
_WIDE = r"cp\.async\.cg\.shared\.global|(?:ld|st)\.global\S*\.v4\.[bf]32|(?:global|buffer)_(?:load|store)_dwordx4"
_ENGINE = r"cp\.async\.bulk\.tensor"


def rows() -> Iterator[tuple[int | str, str, torch.dtype, int, Compiled]]:
    for target in [*TARGETS, *MORE_TARGETS]:
        for form, keywords in FORMS.items():
            for M in (16, 64, 4096):
                yield target, form, BF16, M, compile_call(target, M, (BF16, BF16, BF16), **keywords)
        for M in (16, 4096):
            yield target, "one", F32, M, compile_call(target, M, (F32, F32, F32), many=False)
        for rank in (16, 64):
            for many in (False, True):
                name = f"wgrad, {'many' if many else 'one'}, rank {rank}"
                yield target, name, BF16, 4096, compile_wgrad(target, BF16, BF16, rank, many=many)


def line(target: int | str, form: str, dtype: torch.dtype, M: int, c: Compiled) -> str:
    kinds: dict[str, int] = {}
    for kind in re.findall(_TENSOR_CORES, c.assembly):
        kinds[kind] = kinds.get(kind, 0) + 1
    cores = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
    cells = [
        f"sm_{target}" if isinstance(target, int) else target, form, str(dtype).removeprefix("torch."), M,
        c.registers, c.spilled, f"{c.shared / 1024:.1f}", c.tensor_memory, cores,
        len(re.findall(_WIDE, c.assembly)), len(re.findall(_ENGINE, c.assembly)),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    print(HEADER)
    for row in rows():
        print(line(*row), flush=True)

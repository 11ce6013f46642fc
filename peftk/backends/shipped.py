"""Our kernels or torch's matrix product on a CPU, where nothing was measured: a table by vendor, SIMD level and dtype.

`known` rows were measured on such processors, or follow from an instruction that only one side uses. In the others
neither side is known to be faster, and the first call of a class of shapes measures both (`peftk.backends.first_use`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from peftk.system.processor import cpu_vendor

_16_BIT = (torch.bfloat16, torch.float16)
_AMX_TOKENS = 32


class Row(NamedTuple):
    """vendor: as in /proc/cpuinfo. level: of SIMD, or "amx". Each of the first three, if empty: any. gemm_from: tokens
    from which torch's product is taken; None: never. known: nothing is measured."""

    vendor: str
    level: str
    dtypes: tuple[torch.dtype, ...]
    gemm_from: int | None
    known: bool
    why: str


# The first row that fits counts.
_TABLE = (
    Row("", "amx", (torch.bfloat16,), _AMX_TOKENS, False, "many bf16 tokens go to AMX tiles, which torch's GEMM uses"),
    Row("", "avx2", _16_BIT, None, True, "torch has no fast 16-bit product for AVX2: it took 4 to 9 times as long"),
    Row("AuthenticAMD", "avx2", (torch.float32,), None, False, "on a Zen 3 our kernels were faster in most shapes"),
    Row("", "", (), None, False, "our kernels are the default"),
)


def row_for(dtype: torch.dtype) -> Row:
    """The row of the table for x and W in `dtype` on this processor."""
    from peftk.backends import cpu

    levels = ("", cpu.simd_level(), *(("amx",) if torch.cpu._is_amx_tile_supported() else ()))
    vendors = ("", cpu_vendor())
    fits = (row for row in _TABLE if row.level in levels and row.vendor in vendors)
    return next(row for row in fits if not row.dtypes or dtype in row.dtypes)

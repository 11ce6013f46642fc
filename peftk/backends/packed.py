"""Quantized weights as the CPU kernels read them: packed, in place. Docs: `docs/quantized.md`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import peftk._cpu as _cpu
from peftk.backends.call import Packing
from peftk.launch.merge_args import DTYPES
from peftk.quantized import formats
from peftk.quantized.weight import QuantizedWeight

_CODES = {"int8": 1, "int8_absmax": 1, "int4": 2, "nf4": 3, "fp4": 3, "q8_0": 4, "q4_0": 5}  # `Codes` of the kernels
_BYTES_OF_32 = {1: 32, 2: 16, 3: 16, 4: 34, 5: 18}
FORMATS = tuple(_CODES)


def cannot_read(packing: Packing, K: int, slices: int) -> str | None:
    """Why the kernels cannot read a W [N, K] in one of FORMATS; None if they can."""
    if slices > 1:
        return "reads no packed weight for packed outputs whose slices have their own adapters"
    if K < 2:
        return f"reads packed weights of two columns or more, got {K}"
    group = packing.group
    if group == K and _CODES[packing.format] == 1:
        return None
    if group % 32 or K % group or (group != K and group & (group - 1)):
        return f"needs groups of 32, 64, 128, … elements that divide K = {K}, or of K, got {group}"
    return None


def arguments(weight: QuantizedWeight) -> tuple[Tensor, _cpu.Packing]:
    """The codes of a weight that `cannot_read` allows, and what they mean: addresses of its tensors.

    Raises TypeError or ValueError if its parts do not fit any more.
    """
    weight.check_parts()
    K, scales = weight.shape[1], weight.scales
    if scales is None:
        return weight.packed, plan(Packing(weight.format, weight.block[1]), K)  # type: ignore[return-value]
    table = _table(weight.format).data_ptr() if weight.format in formats.CODEBOOKS else 0
    return weight.packed, _cpu.Packing.of(
        _CODES[weight.format],
        row_bytes=_row_bytes(weight.format, K),
        groups=K // weight.block[1],
        group_shift=_shift(weight.block[1], K),
        scales=scales.data_ptr(),
        scale_dtype=DTYPES[scales.dtype],
        scale_factor=formats.ONE_127TH if weight.format == "int8_absmax" else 1.0,
        zeros=0 if weight.zeros is None else weight.zeros.data_ptr(),
        table=table,
    )


def plan(packing: Packing | None, K: int) -> _cpu.Packing | None:
    """The same without addresses."""
    if packing is None:
        return None
    return _cpu.Packing.of(_CODES[packing.format], row_bytes=_row_bytes(packing.format, K), scale_factor=1.0)


def _row_bytes(format: str, K: int) -> int:
    return K * _BYTES_OF_32[_CODES[format]] // 32


def _shift(group: int, K: int) -> int:
    """k >> shift is the group of element k."""
    return 62 if group == K else group.bit_length() - 1


@functools.cache
def _table(format: str) -> Tensor:
    return formats.codebook(format, torch.device("cpu"))

"""Launchers of merge: one launch for a list of layers (`peftk.launch.merge_layers`). Kernels: `merge_tile`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from peftk.launch.merge_layers import Layers, Notes, Raw
from peftk.system import streams

from . import config
from .lora_linear import DTYPES, target
from .merge_tile import checksum_kernel, merge_kernel, restore_kernel, unmerge_kernel

_RESTORED_AT_ONCE = 256


def tile(dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    block = config.merge(target(device))
    return block.BLOCK_N, block.BLOCK_K


def merge(layers: Layers, notes: Notes, raw: Raw) -> None:
    with streams.on(layers.device):
        merge_kernel[(layers.tiles,)](
            layers.table, layers.ends, layers.scaling, notes.merged, notes.row_sums, notes.status[1:], notes.status,
            *raw, len(layers.table), len(raw.keys),
            DTYPE=DTYPES[layers.dtype], ADAPTER_DTYPE=DTYPES[layers.adapter_dtype], **_options(layers),
        )  # fmt: skip


def unmerge(layers: Layers, merged: Tensor) -> None:
    with streams.on(layers.device):
        unmerge_kernel[(layers.tiles,)](
            layers.table, layers.ends, layers.scaling, merged, len(layers.table),
            DTYPE=DTYPES[layers.dtype], ADAPTER_DTYPE=DTYPES[layers.adapter_dtype], **_options(layers),
        )  # fmt: skip


def restore(layers: Layers, raw: Raw) -> None:
    count = len(raw.keys)
    if count:
        with streams.on(layers.device):
            restore_kernel[(triton.cdiv(count, _RESTORED_AT_ONCE),)](
                layers.table, *raw, len(layers.table), count,
                DTYPE=DTYPES[layers.dtype], BLOCK=_RESTORED_AT_ONCE, num_warps=4,
            )  # fmt: skip


def sum_rows(layers: Layers, row_sums: Tensor) -> None:
    with streams.on(layers.device):
        checksum_kernel[(layers.tiles,)](
            layers.table, row_sums, len(layers.table), DTYPE=DTYPES[layers.dtype], **_options(layers)
        )


def _options(layers: Layers) -> dict[str, int | bool]:
    compile_target = target(layers.device)
    return {**config.merge(compile_target)._asdict(), **config.exact_options(compile_target)}

"""Tables of adapters that come as flat lists of tensors: built once, and found again by where the tensors are.

The ops of a compiled training step get such lists in every call. Building a table copies it to the device, which a
capture of a CUDA graph can't do, and its memory would lie in the graph's pool.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftk.adapters import table
from peftk.adapters.flat import unpack
from peftk.adapters.table import AdapterTable
from peftk.system import storage, streams
from peftk.system.lasting import keep_for_graphs, outside_pools

_MOST = 4096

_kept: dict[tuple[Any, ...], tuple[AdapterTable, int]] = {}  # with the handle of the stream that made it


def find(
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    scalings: Sequence[float],
    columns: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> AdapterTable:
    """The table of the adapters that `flat.pack` made into these lists. It is dropped when one of the tensors is.

    Raises as `table.build`, and RuntimeError if it would have to be built while a CUDA graph is captured.
    """

    def build() -> AdapterTable:
        adapters = unpack([tensor.detach() for tensor in tensors], layout, scalings)
        built = table.build(adapters, dtype=dtype, device=device)
        return dataclasses.replace(built, columns=tuple(columns))

    if not storage.dense(*tensors):
        return build()  # which raises
    places = tuple(map(table.place, tensors))
    key = (places, tuple(layout), tuple(scalings), tuple(columns), dtype, device)
    capturing, stream = streams.capturing(device), streams.handle(device)
    found = _kept.get(key)
    if found is None:
        if capturing:
            raise RuntimeError(
                "adapters: expected tensors that were there, at the same addresses, in a call before the capture of a "
                "CUDA graph, got others"
            )
        while len(_kept) >= _MOST:
            _kept.pop(next(iter(_kept)), None)
        found = _kept[key] = outside_pools(device, build), stream
        for tensor in tensors:
            weakref.finalize(tensor, _kept.pop, key, None).atexit = False
    built, made_on = found
    if capturing:
        keep_for_graphs(key, built)
    elif stream != made_on:
        _record(built, streams.current(device))
    return built


def _record(built: AdapterTable, stream: torch.cuda.Stream | None) -> None:
    """The table's memory is not used again before what the stream was given so far is over."""
    for tensor in (built.pages, built.rows, built.scaling, built.biases, built.ends):
        if tensor is not None and stream is not None:
            tensor.record_stream(stream)

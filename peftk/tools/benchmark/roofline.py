"""The machine's limits, measured: a row's multiply-adds on registers only, and only reading its weights.

Both probes are sides of the row they bound, so they are timed in turn with the others, under the same conditions. No
kernel at the SIMD level in use can be faster than the slower of the two.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from peftk import _cpu
from peftk.launch.merge_args import DTYPES
from peftk.system.timing import interleave
from peftk.tools.benchmark.common import Case, Side
from peftk.tools.benchmark.targets import FMA_PEAK, READ

_SERIAL_BELOW = 1 << 17  # multiply-adds; below this a second thread costs more than it saves, as in our kernels


class Work(NamedTuple):
    """The minimum work: multiply-adds, and bytes that are read or written once."""

    multiply_adds: int
    bytes: int

    def minus(self, other: Work) -> Work:
        return Work(self.multiply_adds - other.multiply_adds, self.bytes - other.bytes)


class Bound(NamedTuple):
    """work: of peftk's side. probed: the multiply-adds of the side FMA_PEAK, and the bytes of the side READ."""

    work: Work
    probed: Work

    def min_time_us(self, work: Work, times: dict[str, float]) -> float:
        """The minimum time for `work` in µs at the measured speeds, if reading and computing overlap perfectly."""
        computing = times[FMA_PEAK] * work.multiply_adds / self.probed.multiply_adds
        return max(computing, times[READ] * work.bytes / self.probed.bytes)


def probes(work: Work, dtype: torch.dtype, weight: Tensor) -> tuple[Bound, list[Side]]:
    """The bound and the two sides. dtype: for bf16, FMA_PEAK uses bf16 pair instructions if the SIMD level has them."""
    threads = 1 if work.multiply_adds < _SERIAL_BELOW else torch.get_num_threads()
    read_bytes = weight.numel() * weight.element_size()

    def multiply() -> None:
        _cpu.fma_peak(work.multiply_adds, DTYPES[dtype], threads)

    def read() -> None:
        _cpu.read_peak(weight.data_ptr(), read_bytes, threads)

    sides = [Side(FMA_PEAK, multiply, lambda: 0.0), Side(READ, read, lambda: 0.0)]
    return Bound(work, Work(work.multiply_adds, read_bytes)), sides


class Roofline(NamedTuple):
    simd_level: str
    threads: int
    fp32_gflops: float
    bf16_gflops: float
    read_gbytes: float  # per second, from memory

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"{self.simd_level}, {threads}: {self.fp32_gflops:.0f} GFLOP/s fp32, {self.bf16_gflops:.0f} GFLOP/s bf16, "
            f"reading {self.read_gbytes:.0f} GB/s"
        )


def measure_roofline(seconds: float = 0.5, mebibytes: int = 256) -> Roofline:
    """The two probes alone, on memory larger than any cache."""
    threads, work = torch.get_num_threads(), 1 << 27
    memory = torch.zeros(mebibytes << 18)
    times = interleave(
        {
            "fp32": lambda: _cpu.fma_peak(work, DTYPES[torch.float32], threads),
            "bf16": lambda: _cpu.fma_peak(work, DTYPES[torch.bfloat16], threads),
            "read": lambda: _cpu.read_peak(memory.data_ptr(), memory.nbytes, threads),
        },
        seconds=seconds,
    )
    gflops = {name: 2e-3 * work / times[name].median_us for name in ("fp32", "bf16")}
    return Roofline(
        _cpu.simd_level(), threads, gflops["fp32"], gflops["bf16"], 1e-3 * memory.nbytes / times["read"].median_us
    )


def linear_work(M: int, K: int, N: int, dtype: torch.dtype) -> Work:
    """y = xWᵀ."""
    return Work(M * K * N, (K * N + M * (K + N)) * dtype.itemsize)


def adapter_work(M: int, K: int, N: int, rank: int, count: int, dtype: torch.dtype, *, trained: bool = False) -> Work:
    """s·(xAᵀ)Bᵀ of `count` adapters, over M rows in total. trained: with the backward, two more products for each."""
    return Work((3 if trained else 1) * M * rank * (K + N), count * rank * (K + N) * dtype.itemsize)


def add(*works: Work) -> Work:
    return Work(sum(work.multiply_adds for work in works), sum(work.bytes for work in works))


@dataclasses.dataclass(frozen=True)
class Row:
    """A case and its bounds.

    extra: the additional work of peftk's side, if the peer is also peftk's. rest: the name of a side whose time no
    linear layer can save. adapter: the adapter's part of peftk's work.
    """

    case: Case
    bound: Bound | None = None
    extra: Work | None = None
    rest: str | None = None
    adapter: Work | None = None

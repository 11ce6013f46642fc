"""The work of a launch (bytes per tensor, products, atomics), and its time on a GPU's roofline.

*requested* bytes: those of all loads and stores, which L2 handles. *distinct* bytes: those read before the launch has
written them itself, and those written, each counted once. They go through HBM if L2 keeps what a launch reads again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from peftk.triton_kernels import waves


class Traffic(NamedTuple):
    """Bytes of one tensor in one launch."""

    read: int = 0
    written: int = 0
    distinct_read: int = 0
    distinct_written: int = 0

    def __add__(self, other: tuple[int, ...]) -> Traffic:  # type: ignore[override]
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def requested(self) -> int:
        return self.read + self.written

    @property
    def distinct(self) -> int:
        return self.distinct_read + self.distinct_written


@dataclasses.dataclass(frozen=True)
class Launch:
    """flops: of `dot`s, as executed. vector_flops: of products outside the tensor cores. atomics: number by tensor.

    waves_us: how long its tiles take in whole waves of an H100 (`peftk.triton_kernels.waves`); 0 if nothing is known of
    them. overlapped: starts while the launch before it still runs (programmatic dependent launch).
    """

    kernel: str
    tensors: Mapping[str, Traffic]
    flops: int = 0
    atomics: Mapping[str, int] = dataclasses.field(default_factory=dict)
    vector_flops: int = 0
    waves_us: float = 0.0
    overlapped: bool = False

    @property
    def requested(self) -> int:
        return sum(traffic.requested for traffic in self.tensors.values())

    @property
    def distinct(self) -> int:
        return sum(traffic.distinct for traffic in self.tensors.values())


class Machine(NamedTuple):
    name: str
    bytes_per_us: float
    flops_per_us: float  # bf16 tensor cores, fp32 accumulators, dense
    vector_flops_per_us: float  # fp32 outside the tensor cores

    def us(self, launch: Launch, hbm_bytes: int) -> float:
        """The time in µs of memory, of products at their peak, or of the waves of tiles: the longest of them."""
        computing = launch.flops / self.flops_per_us + launch.vector_flops / self.vector_flops_per_us
        return max(hbm_bytes / self.bytes_per_us, computing, launch.waves_us)

    def total_us(self, launches: Sequence[Launch], hbm_bytes: Sequence[int]) -> float:
        """The launches one after the other, with a gap before each but the first and those that are overlapped."""
        gaps = sum(not launch.overlapped for launch in launches[1:])
        return sum(map(self.us, launches, hbm_bytes)) + gaps * waves.GAP_US


# NVIDIA H100 Tensor Core GPU data sheet, H100 SXM: 3.35 TB/s, 1,979 TFLOPS bf16 with sparsity (half of it dense),
# 67 TFLOPS fp32.
GPU = waves.machine(90)
H100 = Machine("H100 SXM", GPU.bytes_per_us, GPU.flops_per_us, 67e6)


OUTPUTS = frozenset({"y", "dx", "dA", "dB"})


def hbm_bytes(launches: Sequence[Launch], *, l2_keeps_all: bool) -> list[int]:
    """Bytes that each launch moves through HBM, if L2 keeps nothing between launches, or everything.

    l2_keeps_all: an input is moved when it is first read, an output when it is last written, and intermediate tensors
    not at all. A real GPU is between the two.
    """
    if not l2_keeps_all:
        return [launch.distinct for launch in launches]
    writers = [(i, name, t.distinct_written) for i, launch in enumerate(launches) for name, t in launch.tensors.items()]
    last = {name: i for i, name, written in writers if written}
    output_bytes = {name: max(w for _, other, w in writers if other == name) for name in OUTPUTS & last.keys()}
    in_l2: dict[str, int] = {}  # bytes of a tensor that L2 has
    moved = [0] * len(launches)
    for i, launch in enumerate(launches):
        for name, traffic in launch.tensors.items():
            moved[i] += max(traffic.distinct_read - in_l2.get(name, 0), 0)
            in_l2[name] = max(in_l2.get(name, 0), traffic.distinct_read, traffic.distinct_written)
            if name in output_bytes and last[name] == i:
                moved[i] += output_bytes[name]
    return moved

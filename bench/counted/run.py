"""Which linear layers are counted, and the figures of each side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bench.counted import lora_linear, lora_wgrad, peers
from bench.counted.batch import Batch, one_adapter
from bench.counted.work import H100, Launch, hbm_bytes

PEFTK = "peftk"
TARGET = 90  # the GPU architecture for peftk's tile sizes: H100
LIMIT, LIMIT_WITH_SPLITS = (
    1.02,
    1.15,
)  # for distinct / minimum bytes; with splits, partial sums are written and read, too


@dataclasses.dataclass(frozen=True)
class Options:
    dims: tuple[tuple[int, int], ...] = ((4096, 4096), (4096, 14336))
    tokens: tuple[int, ...] = (1, 16, 64, 512, 4096)
    adapters: tuple[int, ...] = (1, 8, 64)
    ranks: tuple[int, ...] = (8, 16, 64)  # each alone and, with several adapters, mixed


@dataclasses.dataclass(frozen=True)
class Row:
    """One side of one linear layer, as written to JSON and CSV. Bytes are counted, times are modelled."""

    op: str
    M: int
    K: int
    N: int
    adapters: int
    rank: str
    side: str
    launches: int
    requested_bytes: int
    distinct_bytes: int  # through HBM, if L2 keeps nothing between launches
    kept_bytes: int  # … if it keeps everything
    compulsory_bytes: int
    over_compulsory: float
    flops: int  # that the linear layer needs
    executed_flops: int
    modelled_us: float
    modelled_us_kept: float


@dataclasses.dataclass(frozen=True)
class Counted:
    """One linear layer: its compulsory bytes by tensor, and each side's launches (None: it has no kernel for this)."""

    op: str
    batch: Batch
    rank: str
    compulsory: dict[str, int]
    sides: dict[str, list[Launch] | None]

    @property
    def flops(self) -> int:
        """The necessary products; those of the backward are dX, dA, dB and u."""
        batch = self.batch
        base = 2 * batch.M * batch.K * batch.N
        adapters = 2 * batch.rank_rows * (batch.K + batch.N)
        return base + adapters * (2 if self.op == "backward" else 1)

    def rows(self) -> list[Row]:
        return [self.row(side) for side, launches in self.sides.items() if launches is not None]

    def row(self, side: str) -> Row:
        launches = self.sides[side]
        assert launches is not None
        cold, l2_kept = hbm_bytes(launches, l2_keeps_all=False), hbm_bytes(launches, l2_keeps_all=True)
        minimum = sum(self.compulsory.values())
        batch = self.batch
        return Row(
            op=self.op,
            M=batch.M,
            K=batch.K,
            N=batch.N,
            adapters=len(batch.ranks),
            rank=self.rank,
            side=side,
            launches=len(launches),
            requested_bytes=sum(launch.requested for launch in launches),
            distinct_bytes=sum(cold),
            kept_bytes=sum(l2_kept),
            compulsory_bytes=minimum,
            over_compulsory=sum(cold) / minimum,
            flops=self.flops,
            executed_flops=sum(launch.flops + launch.vector_flops for launch in launches),
            modelled_us=H100.total_us(launches, cold),
            modelled_us_kept=H100.total_us(launches, l2_kept),
        )

    @property
    def splits(self) -> bool:
        return any("partials" in launch.tensors for launch in self.sides[PEFTK] or ())

    @property
    def over_minimum(self) -> float:
        """peftk's distinct bytes over the minimum for its number of launches, where each reads its inputs once."""
        return self.row(PEFTK).distinct_bytes / (sum(self.compulsory.values()) + self.second_launch_bytes)

    @property
    def second_launch_bytes(self) -> int:
        """Additional bytes of each launch but the first.

        A backward's gradients also read dY, and the u that was written. An expand after its shrink reads x (in the
        backward dY) and z (u) again. z and u are fp32; `compulsory` counts z in 16 bits.
        """
        batch, of_op = self.batch, 0
        if self.op != "forward":
            of_op = batch.M * batch.N * batch.itemsize + batch.rank_rows * (3 * 4 - batch.itemsize)
        if not self.overlapped:
            return of_op
        columns = batch.K if self.op == "forward" else batch.N
        return of_op + batch.M * columns * batch.itemsize + 2 * 4 * batch.rank_rows

    @property
    def overlapped(self) -> bool:
        """Whether peftk's shrink has a launch of its own, which the product overlaps with."""
        return any(launch.overlapped for launch in self.sides[PEFTK] or ())

    @property
    def on_target(self) -> bool:
        max_launches = (1 if self.op == "forward" else 2) + self.overlapped
        limit = LIMIT_WITH_SPLITS if self.splits else LIMIT
        return self.row(PEFTK).launches <= max_launches and self.over_minimum <= limit


def batches(options: Options) -> list[tuple[Batch, str]]:
    """The batches, each with a name for its ranks. Rows are distributed evenly over the adapters."""
    named_batches = []
    for K, N in options.dims:
        for M in options.tokens:
            for n in options.adapters:
                for rank in options.ranks:
                    named_batches.append((_batch(M, K, N, (rank,) * n), str(rank)))
                if n > 1 and len(options.ranks) > 1:
                    mixed = tuple(options.ranks[i % len(options.ranks)] for i in range(n))
                    named_batches.append((_batch(M, K, N, mixed), "mixed"))
    return named_batches


def _batch(M: int, K: int, N: int, ranks: tuple[int, ...]) -> Batch:
    if len(ranks) == 1:
        return one_adapter(M, K, N, ranks[0])
    n = len(ranks)
    return Batch(M, K, N, ranks, tuple(M // n + (i < M % n) for i in range(n)))


def forward(batch: Batch, rank: str) -> Counted:
    ours = lora_linear.forward(batch, lora_linear.plan(batch, TARGET))
    sides = {PEFTK: ours, **{name: model(batch) for name, model in peers.FORWARD.items()}}
    return Counted("forward", batch, rank, compulsory(batch, "forward"), sides)


def backward(batch: Batch, rank: str) -> Counted:
    """The gradients of x, and of every A and B that rows use."""
    ours = lora_linear.backward(batch, lora_linear.plan(batch.swapped(), TARGET, backward=True))
    ours += lora_wgrad.wgrad(batch, lora_wgrad.tiling(batch, TARGET))
    sides = {PEFTK: ours, **{name: model(batch) for name, model in peers.BACKWARD.items()}}
    return Counted("backward", batch, rank, compulsory(batch, "backward"), sides)


def compulsory(batch: Batch, op: str) -> dict[str, int]:
    """Bytes by tensor if inputs are read once and outputs written once. Only adapters that rows use; v in x's dtype."""
    M, K, N, e, a = batch.M, batch.K, batch.N, batch.itemsize, batch.adapter_itemsize
    A, B = batch.used_ranks * K * a, batch.used_ranks * N * a
    if op == "forward":
        return {"x": M * K * e, "weight": N * K * e, "lora_A": A, "lora_B": B, "y": M * N * e}
    tensors_read = {
        "dy": M * N * e,
        "x": M * K * e,
        "z": batch.rank_rows * e,
        "weight": N * K * e,
        "lora_A": A,
        "lora_B": B,
    }
    return {**tensors_read, "dx": M * K * e, "dA": A, "dB": B}


TRAINED_FROM = 512  # rows; training with fewer is unusual


def count(options: Options) -> list[Counted]:
    wanted = batches(options)
    counted_linears = [forward(batch, rank) for batch, rank in wanted]
    return counted_linears + [backward(batch, rank) for batch, rank in wanted if batch.M >= TRAINED_FROM]


def tensors(counted: Sequence[Counted]) -> list[dict[str, Any]]:
    """Every launch with its bytes by tensor, as JSON values."""
    return [
        {
            "op": one.op,
            "M": one.batch.M,
            "K": one.batch.K,
            "N": one.batch.N,
            "adapters": len(one.batch.ranks),
            "rank": one.rank,
            "compulsory": one.compulsory,
            "sides": {
                side: [
                    {
                        "kernel": launch.kernel,
                        "flops": launch.flops,
                        "vector_flops": launch.vector_flops,
                        "atomics": dict(launch.atomics),
                        "tensors": {name: t._asdict() for name, t in by_adapter(launch).items()},
                    }
                    for launch in launches
                ]
                for side, launches in one.sides.items()
                if launches is not None and not (side == "HF PEFT" and len(launches) > 10)
            },
        }
        for one in counted
    ]


def by_adapter(launch: Launch) -> dict[str, Any]:
    """The traffic by tensor, with all adapters added up: lora_A[3] counts as lora_A."""
    traffic_of: dict[str, Any] = {}
    for name, traffic in launch.tensors.items():
        stem = name.split("[")[0]
        traffic_of[stem] = traffic_of[stem] + traffic if stem in traffic_of else traffic
    return traffic_of

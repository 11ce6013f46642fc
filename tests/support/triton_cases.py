"""Small cases for the Triton kernels in the interpreter."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from peftk.adapters.adapter import Adapter
from tests.support.cases import Case, normal

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MIXES = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (BF16, BF16, F32), (F32, BF16, BF16), (F32, F16, F16)]


def adapter(rank: int, K: int, N: int, dtype: torch.dtype, activation: str, seed: int, biases: bool = True) -> Adapter:
    if rank == 0:
        return Adapter((), (), 1.0, "identity", None, normal(N, dtype=dtype, seed=seed))
    return Adapter(
        (normal(rank, K, dtype=dtype, seed=seed, scale=K**-0.5),),
        (normal(N, rank, dtype=dtype, seed=seed + 1, scale=rank**-0.5),),
        1.5,
        activation,
        normal(rank, dtype=dtype, seed=seed + 2) if biases else None,
        normal(N, dtype=dtype, seed=seed + 3) if biases else None,
    )


def make(
    mix: tuple[torch.dtype, torch.dtype, torch.dtype],
    adapters: tuple[Adapter | None, ...],
    ids: list[int] | None,
    M: int = 19,
    K: int = 70,
    N: int = 37,
) -> Case:
    x = normal(M, K, dtype=mix[0], seed=1)
    weight = normal(N, K, dtype=mix[1], seed=2, scale=K**-0.5)
    bias = normal(N, dtype=mix[1], seed=3)
    return Case(x, weight, bias, adapters, None if ids is None else torch.tensor(ids, dtype=torch.int32))


PATTERNS = {
    "base": [-1] * 40,
    "single": [3] * 40,
    "random": torch.randint(-1, 8, (40,), generator=torch.Generator().manual_seed(5)).tolist(),
    "sorted": sorted(i % 8 for i in range(40)),
    "long": [5] * 18 + [-1] * 4 + [2] * 18,
    "one row each": [7, 0, 6, 1, 5, 2, 4, 3] + [-1] * 32,
}


def far_apart(tensor: Tensor) -> Tensor:
    """The same rows 2³⁰ elements apart. Addresses are reserved for the space between them, but no memory."""
    stride, no_reserve = 2**30, 0x4000  # MAP_NORESERVE, which not every Python's mmap defines
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    room = mmap.mmap(-1, tensor.shape[0] * stride * tensor.itemsize, flags=flags)
    return torch.frombuffer(room, dtype=tensor.dtype).as_strided(tensor.shape, (stride, 1)).copy_(tensor)


def with_far_rows(which: str, many: bool) -> Case:
    """Four rows of x, W, A or B, the last of which begins at element 3 · 2³⁰."""
    tensors = {name: normal(4, 18, dtype=BF16, seed=seed) for seed, name in enumerate(("x", "weight", "A"))}
    tensors["B"] = normal(4, 4, dtype=BF16, seed=3)
    tensors |= {name: far_apart(tensor) for name, tensor in tensors.items() if name == which}
    x, weight, A, B = tensors.values()
    ids = torch.tensor([0, -1, -1, 0], dtype=torch.int32) if many else None
    return Case(x, weight, None, (Adapter((A,), (B,), 0.5),), ids)

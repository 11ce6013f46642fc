"""What a kernel reads about the adapters of a batch: addresses, strides, ranks, scalings.

An adapter's ranks lie in *pages* of up to 16 (`PAGE`), the smallest contraction that tensor cores take, wherever its
tensors happen to be: a trainable `Parameter` is one run of pages in place, an adapter of a bank is pages of a pool.
The kernels see no difference. Layout (all tensors on the table's device):

    pages     int64   [P, 5]   address of A's page [r, K], its row stride,
                               address of B's page [N, r], its n-stride, its r-stride       (strides in elements)
    rows      int32   [n, 4]   first page, rank, activation code (`peftk.activations.CODES`), 1 if the slot is taken
    scaling   float32 [n]      s_i, dimensionless
    biases    int64   [n, 2]   address of a_i [R] or 0, address of β_i [N] or 0

Page p of an adapter of rank R holds ranks 16p … min(16p + 16, R) - 1. A's columns and both biases are contiguous.
An empty slot (row 3 = 0) and an adapter of rank 0 have no pages. One table has one dtype.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from peftk.activations import CODES

PAGE = 16


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter of one linear layer: `s · act(x Aᵀ + a) Bᵀ + β`.

    pages_A: tensors [r_p, K], contiguous rows; pages_B: tensors [N, r_p], any strides; the ranks are their
    concatenation. Every tensor but the last of the list holds a multiple of 16 ranks. Empty for a bias-only adapter.
    """

    pages_A: tuple[Tensor, ...]
    pages_B: tuple[Tensor, ...]
    scaling: float
    activation: str = "identity"
    bias_A: Tensor | None = None
    bias_B: Tensor | None = None

    @property
    def rank(self) -> int:
        return sum(page.shape[0] for page in self.pages_A)

    @property
    def lora_A(self) -> Tensor | None:
        """A as one tensor [R, K]: the page itself where there is one, a copy where there are several."""
        if len(self.pages_A) <= 1:
            return self.pages_A[0] if self.pages_A else None
        return torch.cat(self.pages_A, dim=0)

    @property
    def lora_B(self) -> Tensor | None:
        """B as one tensor [N, R]: the page itself where there is one, a copy where there are several."""
        if len(self.pages_B) <= 1:
            return self.pages_B[0] if self.pages_B else None
        return torch.cat(self.pages_B, dim=1)

    def tensors(self) -> tuple[Tensor, ...]:
        biases = tuple(t for t in (self.bias_A, self.bias_B) if t is not None)
        return self.pages_A + self.pages_B + biases


@dataclasses.dataclass(frozen=True)
class AdapterTable:
    """The adapters of a batch by id, and their device-readable form. Built by `build`, never changed."""

    adapters: tuple[Adapter | None, ...]
    dtype: torch.dtype
    device: torch.device
    max_rank: int
    pages: Tensor
    rows: Tensor
    scaling: Tensor
    biases: Tensor

    @property
    def z_width(self) -> int:
        """Columns of the saved pre-activations z: the largest rank, rounded up to whole pages."""
        return -(-self.max_rank // PAGE) * PAGE


def build(adapters: tuple[Adapter | None, ...], *, dtype: torch.dtype, device: torch.device) -> AdapterTable:
    """Writes the table of `adapters` (index = id, None = empty slot). It holds addresses: rebuild it when they move.

    Raises ValueError where a tensor lies in a way that the layout cannot express.
    """
    pages: list[list[int]] = []
    rows: list[list[int]] = []
    biases: list[list[int]] = []
    for index, adapter in enumerate(adapters):
        if adapter is None:
            rows.append([len(pages), 0, 0, 0])
            biases.append([0, 0])
            continue
        for tensor in adapter.tensors():
            if tensor.dtype != dtype or tensor.device != device:
                raise ValueError(
                    f"adapters[{index}]: expected tensors of {dtype} on {device}, got {tensor.dtype} on {tensor.device}"
                )
        rows.append([len(pages), adapter.rank, CODES[adapter.activation], 1])
        biases.append([0 if b is None else _contiguous(b, index).data_ptr() for b in (adapter.bias_A, adapter.bias_B)])
        for number, (page_A, page_B) in enumerate(zip(adapter.pages_A, adapter.pages_B, strict=True)):
            if page_A.shape[0] % PAGE and number + 1 < len(adapter.pages_A):
                raise ValueError(f"adapters[{index}]: only the last page may hold fewer than {PAGE} ranks")
            if page_A.stride(1) != 1 and page_A.shape[1] > 1:
                raise ValueError(
                    f"adapters[{index}]: expected contiguous rows in lora_A, got strides {page_A.stride()}"
                )
            for r in range(0, page_A.shape[0], PAGE):
                pages.append(
                    [
                        page_A.data_ptr() + r * page_A.stride(0) * page_A.element_size(),
                        page_A.stride(0),
                        page_B.data_ptr() + r * page_B.stride(1) * page_B.element_size(),
                        page_B.stride(0),
                        page_B.stride(1),
                    ]
                )
    return AdapterTable(
        adapters=adapters,
        dtype=dtype,
        device=device,
        max_rank=max((a.rank for a in adapters if a is not None), default=0),
        pages=torch.tensor(pages, dtype=torch.int64, device=device).reshape(-1, 5),
        rows=torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, 4),
        scaling=torch.tensor([0.0 if a is None else a.scaling for a in adapters], dtype=torch.float32, device=device),
        biases=torch.tensor(biases, dtype=torch.int64, device=device).reshape(-1, 2),
    )


def _contiguous(bias: Tensor, index: int) -> Tensor:
    if bias.numel() > 1 and bias.stride(0) != 1:
        raise ValueError(f"adapters[{index}]: expected a contiguous bias, got stride {bias.stride(0)}")
    return bias

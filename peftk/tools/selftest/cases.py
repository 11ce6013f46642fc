"""Random cases of the operation, and their expected results: the reference in fp64 on the same values."""

from __future__ import annotations

import dataclasses
import itertools
import random

import torch
from torch import Tensor

from peftk.adapters import activations, table
from peftk.adapters.adapter import Adapter, AdapterGrads
from peftk.adapters.dropout import Dropout
from peftk.backends import reference
from peftk.reference import philox

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass
class Case:
    """Inputs of `multi_lora_linear`, or of `lora_linear` with one adapter and ids None.

    weight None: series adapters. columns: of packed outputs, as in `AdapterTable`.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    adapters: tuple[Adapter | None, ...]
    ids: Tensor | None
    columns: tuple[int, ...] = ()

    @property
    def out_features(self) -> int:
        return self.x.shape[1] if self.weight is None else self.weight.shape[0]

    def weight_dtype(self) -> torch.dtype:
        return self.x.dtype if self.weight is None else self.weight.dtype

    def adapter_dtype(self) -> torch.dtype:
        return next((t.dtype for a in self.adapters if a is not None for t in a.tensors()), self.weight_dtype())

    def table(self) -> table.AdapterTable:
        return _table(self.adapters, self.columns, self.adapter_dtype(), self.x.device)

    def valid_ids(self) -> list[int]:
        """The ids that a row may have."""
        count = len(self.adapters) // max(len(self.columns) - 1, 1)
        return [-1, *sorted({entry % count for entry, a in enumerate(self.adapters) if a is not None})]

    def all_ids(self) -> Tensor:
        """ids, or all 0 if there is one adapter."""
        return torch.zeros(self.x.shape[0], dtype=torch.int32, device=self.x.device) if self.ids is None else self.ids

    def to(self, device: str) -> Case:
        """The same values with the same strides on the device."""
        adapters = tuple(
            None
            if a is None
            else dataclasses.replace(
                a,
                pages_A=tuple(_to_device(t, device) for t in a.pages_A),
                pages_B=tuple(_to_device(t, device) for t in a.pages_B),
                bias_A=None if a.bias_A is None else _to_device(a.bias_A, device),
                bias_B=None if a.bias_B is None else _to_device(a.bias_B, device),
            )
            for a in self.adapters
        )
        weight, bias, ids = (None if t is None else _to_device(t, device) for t in (self.weight, self.bias, self.ids))
        return Case(_to_device(self.x, device), weight, bias, adapters, ids, self.columns)

    def __str__(self) -> str:
        ranks = [None if a is None else (a.rank, a.activation) for a in self.adapters]
        ids = "one adapter" if self.ids is None else f"ids {self.ids.tolist()[:8]}"
        weight = "none" if self.weight is None else _describe(self.weight)
        columns = f" of columns {list(self.columns)}" if self.columns else ""
        return (
            f"x {_describe(self.x)}, weight {weight}, bias {self.bias is not None}, "
            f"{self.adapter_dtype()} ranks {ranks}{columns}, {ids}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} strides {tensor.stride()}"


def _table(
    adapters: tuple[Adapter | None, ...], columns: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> table.AdapterTable:
    sizes = [end - start for start, end in itertools.pairwise(columns)]
    count = len(adapters) // max(len(sizes), 1)
    slices = [adapters[j * count : (j + 1) * count] for j in range(max(len(sizes), 1))]
    tables = [table.build(one, dtype=dtype, device=device) for one in slices]
    return table.pack(tables, sizes) if sizes else tables[0]


def _to_device(tensor: Tensor, device: str) -> Tensor:
    whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return whole.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def random_case(seed: int, *, many: bool | None = None, max_rows: int = 70, max_width: int = 200) -> Case:
    """A random case with anything a user may pass: odd shapes, dtypes, ranks 1 to 256, ids of every pattern,
    non-contiguous x and weight, no tokens, no adapters, empty slots, adapters with only a bias.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    x_dtype = rng.choice(DTYPES)
    weight_dtype = rng.choice([x_dtype, x_dtype, rng.choice(DTYPES)])
    adapter_dtype = rng.choice([weight_dtype, torch.float32, rng.choice(DTYPES)])
    M = rng.choice([0, 1, 1, 2, 3, 4, 5, 8, 16, 17, 33, 64, rng.randint(1, max_rows)])
    K = rng.choice([1, 3, 8, 16, 31, 64, 65, 128, rng.randint(1, max_width)])
    N = rng.choice([1, 2, 7, 16, 24, 63, 64, 129, rng.randint(1, max_width)])
    many = rng.random() < 0.6 if many is None else many

    def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    def adapter() -> Adapter | None:
        kind = rng.random()
        if many and kind < 0.08:
            return None
        bias_B = draw(N, dtype=adapter_dtype) if rng.random() < 0.4 else None
        if kind < 0.18:
            return Adapter((), (), 1.0, "identity", None, draw(N, dtype=adapter_dtype))
        rank = rng.choice([1, 2, 3, 4, 8, 15, 16, 17, 32, 64, rng.randint(1, 256)])
        A = draw(rank, K, dtype=adapter_dtype, scale=K**-0.5)
        B = draw(N, rank, dtype=adapter_dtype, scale=rank**-0.5)
        if rng.random() < 0.3:
            B = B.t().contiguous().t()
        activation = rng.choice(["identity"] * 4 + list(activations.CODES))
        bias_A = draw(rank, dtype=adapter_dtype) if rng.random() < 0.4 else None
        return Adapter((A,), (B,), rng.choice([0.5, 1.0, 2.0, -1.5]), activation, bias_A, bias_B)

    x = draw(M, K, dtype=x_dtype)
    if rng.random() < 0.2:
        x = draw(M, K + 5, dtype=x_dtype)[:, 2 : K + 2]  # row stride, unaligned
    elif rng.random() < 0.15:
        x = draw(K, M, dtype=x_dtype).t()
    weight = draw(N, K, dtype=weight_dtype, scale=K**-0.5)
    if rng.random() < 0.15:
        weight = draw(N, K + 3, dtype=weight_dtype, scale=K**-0.5)[:, 1 : K + 1]
    elif rng.random() < 0.15:
        weight = draw(K, N, dtype=weight_dtype, scale=K**-0.5).t()
    bias = draw(N, dtype=weight_dtype) if rng.random() < 0.5 else None
    if not many:
        one = adapter() if rng.random() < 0.9 else None
        return Case(x, weight, bias, (one,), None)
    adapters = tuple(adapter() for _ in range(rng.choice([0, 1, 2, 8, 30])))
    valid_ids = [-1] + [i for i, a in enumerate(adapters) if a is not None]
    pattern = rng.choice(["random", "random", "base", "one", "sorted", "sequences"])
    if pattern == "base":
        ids = [-1] * M
    elif pattern == "one":
        ids = [rng.choice(valid_ids)] * M
    elif pattern == "sequences":
        ids = [i for i in (rng.choice(valid_ids) for _ in range(M)) for _ in range(7)][:M]
    else:
        ids = [rng.choice(valid_ids) for _ in range(M)]
    if pattern == "sorted":
        ids.sort()
    return Case(x, weight, bias, adapters, torch.tensor(ids, dtype=torch.int32))


def normal(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def _misaligned(tensor: Tensor) -> Tensor:
    """A copy at an odd address: one element after the start of its heap block, with no memory after its end."""
    block = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return block[1:].view(tensor.shape).copy_(tensor)


def decode_adapter(rng: random.Random, N: int, K: int, dtype: torch.dtype, rank: int) -> Adapter:
    """A random adapter: B contiguous along ranks or rows, or strided; tensors possibly at odd addresses."""
    seed = rng.getrandbits(30)
    bias_B = normal(N, dtype=dtype, seed=seed) if rng.random() < 0.5 else None
    if rank == 0:
        return Adapter((), (), 1.0, "identity", None, normal(N, dtype=dtype, seed=seed))
    A = normal(rank, K, dtype=dtype, seed=seed + 1, scale=K**-0.5)
    B = normal(N, rank, dtype=dtype, seed=seed + 2, scale=rank**-0.5)
    if rng.random() < 0.4:
        B = normal(rank, N, dtype=dtype, seed=seed + 2, scale=rank**-0.5).t()
    elif rng.random() < 0.3:
        B = normal(N, 2 * rank, dtype=dtype, seed=seed + 2, scale=rank**-0.5)[:, ::2]
    if rng.random() < 0.2:
        A = _misaligned(A)
    if rng.random() < 0.2:
        B = _misaligned(B) if B.is_contiguous() else _misaligned(B.t().contiguous()).t()
    activation = rng.choice(["identity", *activations.CODES])
    bias_A = normal(rank, dtype=dtype, seed=seed + 3) if rng.random() < 0.5 else None
    return Adapter((A,), (B,), rng.choice([0.5, 1.0, -1.5]), activation, bias_A, bias_B)


def decode_case(seed: int, M: int | None = None) -> Case:
    """A random decode step: 1 to 64 rows in 16 bits, every rank and kind of adapter, ids in any order."""
    rng = random.Random(seed)
    M = M or rng.choice([1, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64])
    K = rng.choice([8, 16, 24, 56, 64, 72, 120, 128, 136, 264, 512, 1032])
    N = rng.choice([1, 2, 7, 15, 16, 17, 63, 64, 65, 96, 129, 192])
    dtype = rng.choice([torch.bfloat16, torch.float16])
    adapter_dtype = rng.choice([dtype, dtype, torch.float32])
    ranks = [0, 1, 2, 3, 8, 15, 16, 17, 32, 33, 64, 65, 80]
    count = rng.choice([0, 1, 1, 2, 3, 5, 9, 64])
    if count == 64:
        ranks = [0, 1, 4, 16]
    adapters: list[Adapter | None] = [decode_adapter(rng, N, K, adapter_dtype, rng.choice(ranks)) for _ in range(count)]
    ids: Tensor | None = None
    if count == 0:
        adapters = [None]
    elif count > 1 or rng.random() < 0.5:
        if rng.random() < 0.3:
            adapters[rng.randrange(count)] = None
        valid_ids = [-1, *(i for i, a in enumerate(adapters) if a is not None)]
        drawn = [rng.choice(valid_ids) for _ in range(M)]
        ids = torch.tensor(sorted(drawn) if rng.random() < 0.2 else drawn, dtype=torch.int32)
    x = normal(M, K, dtype=dtype, seed=seed + 1)
    if rng.random() < 0.2:
        x = normal(M, K + 8, dtype=dtype, seed=seed + 1)[:, 8:]
    elif rng.random() < 0.2:
        x = _misaligned(x)
    weight = normal(N, K, dtype=dtype, seed=seed + 2, scale=K**-0.5)
    if rng.random() < 0.2:
        weight = normal(N, K + 16, dtype=dtype, seed=seed + 2, scale=K**-0.5)[:, 8 : K + 8]
    bias = normal(N, dtype=rng.choice([dtype, torch.float32]), seed=seed + 3) if rng.random() < 0.6 else None
    return Case(x, weight, bias, tuple(adapters), ids)


def double(adapter: Adapter | None) -> Adapter | None:
    """The same values in fp64."""
    if adapter is None:
        return None
    return Adapter(
        tuple(t.double() for t in adapter.pages_A),
        tuple(t.double() for t in adapter.pages_B),
        # kernels take s in fp32
        float(torch.tensor(adapter.scaling, dtype=torch.float32)),
        adapter.activation,
        None if adapter.bias_A is None else adapter.bias_A.double(),
        None if adapter.bias_B is None else adapter.bias_B.double(),
    )


def _weight(case: Case) -> Tensor:
    """W in fp64; the identity for series adapters."""
    K = case.x.shape[1]
    return torch.eye(K, dtype=torch.float64, device=case.x.device) if case.weight is None else case.weight.double()


def _keep_factor(x: Tensor, dropout: Dropout | None) -> Tensor:
    """mask / (1 - p) [M, K] in fp64; ones without dropout."""
    if dropout is None:
        return torch.ones_like(x)
    return philox.keep_mask(x.shape[0], x.shape[1], dropout.p, dropout.seed).double() / (1 - dropout.p)


def expected(case: Case, *, dropout: Dropout | None = None) -> tuple[Tensor, Tensor, int]:
    """y* [M, N] in fp64; its magnitude |x||W|ᵀ + |s||v||B|ᵀ + |bias| + |β|; and the number of terms of a sum, K + R.

    A series adapter has no large |x||W|ᵀ, so there the error of v itself counts: |v| is replaced by 1.13·(|x̃||A|ᵀ +
    |a|), where 1.13 bounds every act'.
    """
    x, weight = case.x.double(), _weight(case)
    bias = None if case.bias is None else case.bias.double()
    ids = case.all_ids()
    x_dropped = x * _keep_factor(x, dropout)
    full = _table(tuple(double(a) for a in case.adapters), case.columns, torch.float64, x.device)
    magnitude, _ = reference.lora_linear(x.abs(), weight.abs(), None if bias is None else bias.abs(), None)
    y, _ = reference.lora_linear(x, weight, bias, None)
    for entry, adapter in enumerate(full.adapters):
        if adapter is None:
            continue
        rows, columns = (ids == entry % full.count).nonzero().flatten(), slice(*full.columns_of(entry, y.shape[1]))
        zero = torch.zeros_like(weight[columns])
        delta, z = reference.lora_linear(x_dropped[rows], zero, None, adapter, save_z=True)
        y[rows, columns] += delta
        if adapter.bias_B is not None:
            magnitude[rows, columns] += adapter.bias_B.abs()
        if z is not None:
            assert adapter.lora_A is not None
            assert adapter.lora_B is not None
            v = activations.apply(adapter.activation, z).abs()
            if case.weight is None:
                sums = x_dropped[rows].abs() @ adapter.lora_A.abs().t()
                v = 1.13 * (sums if adapter.bias_A is None else sums + adapter.bias_A.abs())
            magnitude[rows, columns] += abs(adapter.scaling) * (v @ adapter.lora_B.abs().t())
    return y, magnitude, x.shape[1] + full.max_rank


def expected_grads(
    case: Case, dy: Tensor, *, dropout: Dropout | None = None
) -> tuple[Tensor, list[AdapterGrads | None], Tensor, list[AdapterGrads | None], int]:
    """dx and the adapters' gradients in fp64, the magnitudes that bound their errors, and the number of terms.

    u and v are computed in fp32 themselves. So the magnitudes use |dY||B| and |x||A| + |a| (and z's terms, if act'
    depends on z) instead of |u| and |v|, which may be small through cancellation.
    """
    x, weight, dy = case.x.double(), _weight(case), dy.double()
    ids = case.all_ids()
    full = _table(tuple(double(a) for a in case.adapters), case.columns, torch.float64, x.device)
    _, z = reference.multi_lora_linear(x, weight, None, full, ids, dropout=dropout, save_z=True)
    assert z is not None
    dx, grads = reference.multi_lora_linear_backward(dy, x, weight, full, ids, z, dropout=dropout)
    assert dx is not None

    keep = _keep_factor(x, dropout)
    x_abs = x.abs() * keep
    dx_magnitude = dy.abs() @ weight.abs()
    magnitudes: list[AdapterGrads | None] = []
    for entry, adapter in enumerate(full.adapters):
        rows = (ids == entry % full.count).nonzero().flatten()
        dy_abs = dy[rows, slice(*full.columns_of(entry, dy.shape[1]))].abs()
        if adapter is None or adapter.lora_A is None or adapter.lora_B is None:
            total = dy_abs.sum(0)
            magnitudes.append(None if adapter is None else AdapterGrads(None, None, None, total))
            continue
        z_abs = x_abs[rows] @ adapter.lora_A.abs().t() + (0 if adapter.bias_A is None else adapter.bias_A.abs())
        slope = 1.0 if adapter.activation == "identity" else 1.13 + z_abs
        u_abs = (dy_abs @ adapter.lora_B.abs()) * slope
        s = abs(adapter.scaling)
        dx_magnitude[rows] += s * (u_abs @ adapter.lora_A.abs()) * keep[rows]
        magnitudes.append(
            AdapterGrads(
                s * (u_abs.t() @ x_abs[rows]),
                s * (dy_abs.t() @ (1.13 * z_abs)),
                s * u_abs.sum(0),
                dy_abs.sum(0),
            )
        )
    terms = x.shape[0] + x.shape[1] + dy.shape[1] + full.max_rank * full.slices
    return dx, grads, dx_magnitude, magnitudes, terms

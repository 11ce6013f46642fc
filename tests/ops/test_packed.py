"""Packed outputs on a CPU: slices of W's rows, each with its own bank.

For Triton: tests/kernels/triton/interpreted/packed.py.
"""

from __future__ import annotations

import pytest
import torch

import peftk
from peftk import functional
from peftk.backends import cpu, reference
from peftk.ops import dispatch
from tests.support import numerics
from tests.support.cases import Case, expected, expected_grads

SIZES = (24, 8, 8)
K = 20


def banks(*sizes: int, max_adapters: int = 3) -> list[peftk.AdapterBank]:
    """Adapter 0 in every bank, with a different rank in each; adapter 2 only in the first."""
    made = []
    for j, N in enumerate(sizes):
        bank = peftk.AdapterBank(K, N, max_adapters, torch.float32, torch.device("cpu"))
        bank.add("zero", torch.randn(3 + j, K), torch.randn(N, 3 + j), 0.5, bias_B=torch.randn(N))
        if j == 0:
            bank.add("two", torch.randn(18, K), torch.randn(N, 18), 2.0, activation="gelu", slot=2)
        made.append(bank)
    return made


def inputs() -> tuple[torch.Tensor, ...]:
    ids = torch.tensor([0, 2, -1, 0, 2, 2])
    return torch.randn(6, K), torch.randn(sum(SIZES), K), torch.randn(sum(SIZES)), ids


def by_slices(x, weight, bias, each, ids):  # type: ignore[no-untyped-def]
    """Computes each slice as a separate layer; an id that a bank does not have uses the base layer."""
    parts = []
    for bank, W, b in zip(each, weight.split(SIZES), bias.split(SIZES), strict=True):
        known = torch.tensor([i if i >= 0 and bank.adapters[i] is not None else -1 for i in ids.tolist()])
        parts.append(functional.multi_lora_linear(x, W, b, bank, known))
    return torch.cat(parts, dim=-1)


def check(y, x, weight, bias, each, ids):  # type: ignore[no-untyped-def]
    """y against fp64, within the error bound."""
    packed = peftk.PackedBank(each)
    numerics.check(y, *expected(Case(x, weight, bias, packed.adapters, ids.int(), packed.columns)))


def test_every_slice_has_the_adapters_of_its_bank() -> None:
    x, weight, bias, ids = inputs()
    each = banks(*SIZES)
    x.requires_grad_()
    packed, apart = (
        functional.multi_lora_linear(x, weight, bias, peftk.PackedBank(each), ids),
        by_slices(x, weight, bias, each, ids),
    )
    check(packed, x.detach(), weight, bias, each, ids)
    check(apart, x.detach(), weight, bias, each, ids)
    dy = torch.randn_like(packed)
    case = Case(x.detach(), weight, bias, peftk.PackedBank(each).adapters, ids.int(), peftk.PackedBank(each).columns)
    dx, _, magnitude, _, terms = expected_grads(case, dy)
    for y in (packed, apart):
        numerics.check(torch.autograd.grad(y, x, dy)[0], dx, magnitude, terms)


@pytest.mark.parametrize("backend", ["cpu", "gemm", "reference", None])
def test_without_gradients_too(backend: str | None) -> None:
    """A call with one bank would take the direct C++ path, which does not support slices."""
    x, weight, bias, ids = inputs()
    each = banks(*SIZES)
    with torch.no_grad():
        packed = functional.multi_lora_linear(x, weight, bias, peftk.PackedBank(each), ids, backend=backend)
    check(packed, x, weight, bias, each, ids)


def test_the_backward_of_what_our_kernels_ran_forward() -> None:
    """It reads z, in which each slice has its own columns."""
    x, weight, bias, ids = inputs()
    table = peftk.PackedBank(banks(*SIZES)).table()
    assert table is not None
    for weight_ in (weight, weight.t().contiguous().t()):
        (y, z), (expected_y, expected_z) = (
            backend.multi_lora_linear(x, weight_, bias, table, ids.int(), save_z=True) for backend in (cpu, reference)
        )
        torch.testing.assert_close(y, expected_y)
        for row, id in enumerate(ids.tolist()):
            for entry in range(id, len(table.adapters), table.count) if id >= 0 else ():
                adapter, start = table.adapters[entry], table.z_from(entry)
                columns = slice(start, start + (0 if adapter is None else adapter.rank))
                torch.testing.assert_close(z[row, columns], expected_z[row, columns])


def test_added_to_a_base_layer_that_another_library_computed() -> None:
    x, weight, bias, ids = inputs()
    packed = peftk.PackedBank(banks(*SIZES))
    table = packed.table()
    assert table is not None
    wide = torch.full((len(x), sum(SIZES) + 3), torch.nan)
    y = wide[:, : sum(SIZES)]  # rows that are not next to each other
    y.copy_(x @ weight.t() + bias)
    dispatch.add_adapters_(y, x, table, ids.int())
    check(y, x, weight, bias, packed.banks, ids)
    assert wide[:, sum(SIZES) :].isnan().all()
    with pytest.raises(ValueError, match=r"y: expected \[M, N\] beside x \[M, K\] and ids \[M\]"):
        dispatch.add_adapters_(y, x, table, ids[:2].int())
    with pytest.raises(ValueError, match="bank: expected slices of 39 columns together like weight, got 40"):
        dispatch.add_adapters_(y[:, 1:], x, table, ids.int())
    with pytest.raises(ValueError, match=r"ids\[1\]: .* an empty slot|adapter"):
        dispatch.add_adapters_(y, x, table, torch.ones(6, dtype=torch.int32))


def test_a_bank_that_changes_is_seen() -> None:
    x, weight, bias, ids = inputs()
    each = banks(*SIZES)
    packed = peftk.PackedBank(each)
    functional.multi_lora_linear(x, weight, bias, packed, ids)
    each[1].remove("zero")
    each[1].add("other", torch.randn(2, K), torch.randn(8, 2), 1.0, slot=0)
    y = functional.multi_lora_linear(x, weight, bias, packed, ids)
    check(y, x, weight, bias, each, ids)


@torch._inductor.config.patch(force_disable_caches=True)  # do not test graphs compiled earlier
def test_compiles_without_a_graph_break() -> None:
    x, weight, bias, ids = inputs()
    x.requires_grad_()
    packed = peftk.PackedBank(banks(*SIZES))

    def call(x):  # type: ignore[no-untyped-def]
        return functional.multi_lora_linear(x, weight, bias, packed, ids)

    found, expected = torch.compile(call, fullgraph=True)(x), call(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)))


def test_bad_banks_are_named() -> None:
    x, weight, bias, ids = inputs()
    with pytest.raises(ValueError, match="banks: expected one or more"):
        peftk.PackedBank([])
    with pytest.raises(TypeError, match=r"banks\[1\]: expected an AdapterBank, got int"):
        peftk.PackedBank([*banks(8), 3])
    with pytest.raises(ValueError, match=r"banks\[1\]: expected adapters 3 as in the first one, got 4"):
        peftk.PackedBank([*banks(8), *banks(8, max_adapters=4)])
    narrow = peftk.AdapterBank(K + 1, 8, 3, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"banks\[1\]: expected in_features 20 as in the first one, got 21"):
        peftk.PackedBank([*banks(8), narrow])
    with pytest.raises(ValueError, match="bank: expected slices of 40 columns together like weight, got 16"):
        functional.multi_lora_linear(x, weight, bias, peftk.PackedBank(banks(8, 8)), ids)
    with pytest.raises(ValueError, match=r"ids\[1\]: expected -1 or an adapter's number below 3, got 1, an empty slot"):
        functional.multi_lora_linear(x, weight, bias, peftk.PackedBank(banks(*SIZES)), torch.tensor([0, 1, 0, 0, 0, 0]))

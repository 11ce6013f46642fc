"""Tests of the paged bank: any rank, no padding, slots and pages reused, failures that change nothing."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch

from peftk import functional
from peftk.adapters import table
from peftk.adapters.adapter import Adapter
from peftk.adapters.bank import AdapterBank


def bank(max_adapters: int = 3) -> AdapterBank:
    return AdapterBank(8, 6, max_adapters, torch.float32, torch.device("cpu"))


def factors(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, 8), torch.randn(6, rank)


@pytest.mark.parametrize("rank", [1, 15, 16, 17, 300, 1100])
def test_an_adapter_of_any_rank_reads_back_unchanged(rank: int) -> None:
    made, (A, B) = bank(), factors(rank)
    number = made.add("a", A, B, 2.0)
    slot = made.adapters[number]
    assert slot is not None
    assert len(slot.pages_A) == -(-rank // 16)
    assert torch.equal(slot.lora_A, A)
    assert torch.equal(slot.lora_B, B)
    table = made.table()
    assert table.rows[0].tolist() == [0, rank, 0, 1]
    assert table.pages.shape == (-(-rank // 16) * len(made.slots), 5)  # every slot has room for it


def test_pages_and_slots_are_reused() -> None:
    made = bank()
    made.add("a", *factors(100), 1.0)
    chunks = len(made.pool.chunks)
    numbers = []
    for turn in range(50):
        numbers.append(made.add(f"b{turn}", *factors(200), 1.0))
        made.remove(f"b{turn}")
    assert len(set(numbers)) == 50  # the number of a removed adapter is not reused
    assert {number % 3 for number in numbers} == {1, 2}
    assert len(made.pool.chunks) == chunks
    assert len(made.pool.free) == 64 * chunks - 7


def test_bad_additions_change_nothing() -> None:
    made = bank(2)
    made.add("a", *factors(4), 1.0)
    before = (dict(made.names), list(made.pool.free), made.table())
    A, B = factors(4)
    for arguments, message in [
        (("a", A, B, 1.0), "name: expected a new one, got 'a'"),
        (("b", A[:, :7], B, 1.0), "lora_A: expected shape"),
        (("b", A, B[:, :3], 1.0), "lora_B: expected shape"),
        (("b", A[:0], B[:, :0], 1.0), "R ≥ 1"),
        (("b", A, B, float("inf")), "scaling: expected a finite number"),
        (("b", A, None, 1.0), "lora_B: expected a tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            made.add(*arguments)
    assert (dict(made.names), list(made.pool.free), made.table()) == before
    made.add("b", A, B, 1.0)
    with pytest.raises(ValueError, match="bank: expected a free slot, got 2 of 2 taken"):
        made.add("c", A, B, 1.0)
    with pytest.raises(ValueError, match="name: expected a loaded adapter \\(a, b\\), got 'x'"):
        made.remove("x")


def test_the_pool_never_moves_what_it_holds() -> None:
    made = AdapterBank(8, 6, 200, torch.float32, torch.device("cpu"))
    made.add("first", *factors(16), 1.0)
    address = made.adapters[0].pages_A[0].data_ptr()
    for number in range(150):
        made.add(f"a{number}", *factors(16), 1.0)
    assert made.adapters[0].pages_A[0].data_ptr() == address


def test_a_copy_has_its_own_storage_and_table() -> None:
    made = bank()
    made.add("a", *factors(20), 1.0)
    made.table()
    other = copy.deepcopy(made)
    assert other.table().pages[0, 0] != made.table().pages[0, 0]
    assert torch.equal(other.adapters[0].lora_A, made.adapters[0].lora_A)
    other.pool.chunks[0][0].zero_()
    assert made.adapters[0].lora_A.abs().sum() > 0
    assert other.adapters[0].lora_A.abs().sum() == 0


class Lent(torch.nn.Module):
    """A square adapter that a bank does not copy."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = torch.nn.Parameter(torch.randn(8, 8)), torch.nn.Parameter(torch.randn(8, 8))

    def adapter(self) -> Adapter:
        return Adapter((self.A,), (self.B,), 1.0)


def test_a_table_is_rebuilt_when_the_strides_of_a_lent_tensor_change() -> None:
    """The address and the shape of a square factor stay the same."""
    made, lent = AdapterBank(8, 8, 2, torch.float32, "cpu"), Lent()
    made.lend("a", lent.adapter)
    before = made.table()
    assert made.table() is before
    x, weight, ids = torch.randn(3, 8), torch.zeros(8, 8), torch.zeros(3, dtype=torch.int32)
    lent.B.data = lent.B.data.t()
    assert made.table() is not before
    with torch.no_grad():
        y = functional.multi_lora_linear(x, weight, None, made, ids)
        torch.testing.assert_close(y, x @ lent.A.t() @ lent.B.t())


def test_a_table_is_rebuilt_for_a_different_parameter_in_the_same_memory() -> None:
    made, lent = AdapterBank(8, 8, 2, torch.float32, "cpu"), Lent()
    made.lend("a", lent.adapter)
    before = made.table()
    lent.A = torch.nn.Parameter(lent.A.detach())
    now = made.table()
    assert now is not before
    assert now.adapters[0].pages_A[0] is lent.A
    assert made.table() is now


def test_a_table_no_longer_has_the_only_adapter_after_its_removal() -> None:
    made, x, weight = bank(), torch.randn(2, 8), torch.randn(6, 8)
    ids = torch.full((2,), made.add("a", *factors(2), 1.0))
    functional.multi_lora_linear(x, weight, None, made, ids)
    assert made.table().adapters[0] is not None
    made.remove("a")
    assert made.table().adapters[0] is None
    with pytest.raises(ValueError, match="ids"):
        functional.multi_lora_linear(x, weight, None, made, ids)


def test_a_kept_adapter_is_not_copied_and_computes_as_an_added_one() -> None:
    made, (A, B) = bank(), factors(20)
    kept = Adapter((A,), (B,), 2.0)
    made.add("added", A, B, 2.0)
    made.keep("kept", kept, 1)
    assert made.adapters[1].pages_A[0] is A
    x, W = torch.randn(2, 8), torch.randn(6, 8)
    added, other = functional.multi_lora_linear(x[:1].repeat(2, 1), W, None, made, torch.tensor([0, 1]))
    assert torch.equal(added, other)
    for same in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        same.adapters[1].pages_A[0].zero_()  # memory of its own, which its table reads
        y = functional.multi_lora_linear(x, W, None, same, torch.tensor([0, 1]))
        torch.testing.assert_close(y[1], x[1] @ W.t())
    with pytest.raises(ValueError, match="in use"):
        made.keep("kept", kept, 2)
    with pytest.raises(ValueError, match="expected a free one"):
        made.keep("other", kept, 1)
    with pytest.raises(ValueError, match=r"float32"):
        made.keep("other", Adapter((A.double(),), (B.double(),), 1.0), 2)
    assert made.names == {"added": 0, "kept": 1}


def test_a_table_is_that_of_the_adapters_whatever_came_and_went() -> None:
    """On a CPU a table is made from the one before. It must say what one that is built anew says."""
    generator = random.Random(0)
    made, tables = bank(), []
    for turn in range(60):
        if made.names and (generator.random() < 0.4 or None not in made.slots):
            made.remove(generator.choice(list(made.names)))
        else:
            made.add(f"a{turn}", *factors(generator.choice([1, 16, 17, 40])), turn + 1.0)
        found, fresh = made.table(), table.build(made.adapters, dtype=made.dtype, device=made.device)
        tables.append((found, [t.clone() for t in (found.pages, found.rows, found.scaling)]))
        assert torch.equal(found.rows[:, 1:], fresh.rows[:, 1:])
        assert torch.equal(found.scaling, fresh.scaling)
        for slot, adapter in enumerate(made.adapters):
            count = 0 if adapter is None else len(adapter.pages_A)
            first, other = int(found.rows[slot, 0]), int(fresh.rows[slot, 0])
            assert torch.equal(found.pages[first : first + count], fresh.pages[other : other + count])
    for old, before in tables:  # running calls still read it
        assert all(torch.equal(a, b) for a, b in zip((old.pages, old.rows, old.scaling), before, strict=True))

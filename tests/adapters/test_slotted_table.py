"""The table of a bank on a CPU: written in place, unless someone still has the last one."""

from __future__ import annotations

import pytest
import torch

from peftk import functional
from peftk.adapters import slotted_table
from peftk.adapters.bank import AdapterBank

K, N = 8, 6


@pytest.fixture
def copies(monkeypatch):
    """How often a table was copied."""
    made, copy = [], slotted_table._copied
    monkeypatch.setattr(slotted_table, "_copied", lambda found: made.append(1) or copy(found))
    return made


def factors(rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, K, generator=generator), torch.randn(N, rank, generator=generator)


def bank(count: int = 3) -> AdapterBank:
    made = AdapterBank(K, N, 4, torch.float32, "cpu")
    for number in range(count):
        made.add(f"a{number}", *factors(3, number), 1.0)
    return made


def outputs(table, slot: int) -> torch.Tensor:
    x, weight = torch.ones(2, K), torch.zeros(N, K)
    return functional.multi_lora_linear(x, weight, None, table, torch.tensor([slot, -1]))[0]


def expected(seed: int, rank: int = 3) -> torch.Tensor:
    A, B = factors(rank, seed)
    return torch.ones(K) @ A.t() @ B.t()


def test_a_table_that_nobody_has_is_written_in_place(copies):
    made = bank()
    before = made.table().pages.data_ptr()
    for turn in range(5):
        made.remove("a1")
        made.add("a1", *factors(7, 50 + turn), 2.0, slot=1)
        table = made.table()
        assert table.pages.data_ptr() == before
        torch.testing.assert_close(outputs(table, 1), 2 * expected(50 + turn, 7))
        torch.testing.assert_close(outputs(table, 0), expected(0))
        assert table.adapters == list(made.adapters)
        del table
    assert not copies


@pytest.mark.parametrize("what", ["table", "adapters"])
def test_a_table_that_someone_has_stays(copies, what):
    made = bank()
    kept = made.table() if what == "table" else made.table().adapters
    old = list(made.adapters)
    made.remove("a1")
    made.add("a1", *factors(7, 50), 1.0, slot=1)
    torch.testing.assert_close(outputs(made.table(), 1), expected(50, 7))
    assert len(copies) == 1
    if what == "table":
        torch.testing.assert_close(outputs(kept, 1), expected(1))
        kept = kept.adapters
    assert kept == old
    made.remove("a0")  # of the copy nobody else has anything
    assert made.table().adapters[0] is None
    assert len(copies) == 1


def test_a_graph_that_waits_for_its_backward_keeps_its_adapters():
    made = bank()
    x = torch.ones(2, K, requires_grad=True)
    y = functional.multi_lora_linear(x, torch.zeros(N, K), None, made, torch.tensor([1, -1]))
    made.remove("a1")
    made.add("a1", *factors(7, 50), 1.0, slot=1)
    made.table()
    y.sum().backward()
    A, B = factors(3, 1)
    torch.testing.assert_close(x.grad[0], B.sum(0) @ A)


def test_a_larger_rank_makes_room():
    made = bank()
    assert made.table().room == (1,)
    made.add("a3", *factors(40, 60), 1.0)
    table = made.table()
    assert table.room == (3,)
    torch.testing.assert_close(outputs(table, 3), expected(60, 40))
    torch.testing.assert_close(outputs(table, 2), expected(2))


@pytest.mark.parametrize(("rank", "at"), [(7, "table.lasting_entry"), (40, "SlottedTable.__init__")])
def test_a_table_that_cannot_be_made_is_made_anew(monkeypatch, rank, at):
    made = bank()
    made.table()
    made.remove("a1")
    made.add("a1", *factors(rank, 50), 1.0, slot=1)

    def fail(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(f"peftk.adapters.slotted_table.{at}", fail)
        with pytest.raises(MemoryError):
            made.table()
    torch.testing.assert_close(outputs(made.table(), 1), expected(50, rank))
    torch.testing.assert_close(outputs(made.table(), 0), expected(0))


def test_a_table_that_is_made_within_a_transform_is_as_any_other():
    made = bank()
    made.table()
    made.remove("a1")
    made.add("a1", *factors(40, 50), 1.0, slot=1)
    torch.func.functionalize(lambda x: x + made.table().scaling[0])(torch.ones(1))
    torch.testing.assert_close(outputs(made.table(), 1), expected(50, 40))
    made.add("a3", *factors(50, 51), 1.0, slot=3)
    with torch.device("meta"):
        made.table()
    torch.testing.assert_close(outputs(made.table(), 1), expected(50, 40))
    torch.testing.assert_close(outputs(made.table(), 3), expected(51, 50))

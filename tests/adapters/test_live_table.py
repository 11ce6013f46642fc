"""Tables on a GPU, which CUDA graphs read: addresses stay, and what a launch would read is complete at every moment.

A replay is a call with the tensors that a capture saw.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import pathlib
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import peftk
from peftk import functional
from peftk.adapters.adapter import Adapter
from peftk.adapters.bank import AdapterBank, PackedBank
from peftk.adapters.table import AdapterTable
from peftk.checkpoints.files import CheckpointError
from tests.support.fake_streams import Device, Stream
from tests.support.served_model import small_model, two_adapters

K, N = 8, 6


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def bank(max_adapters: int = 3, max_rank: int | None = 48) -> AdapterBank:
    return AdapterBank(K, N, max_adapters, torch.float32, "cpu", max_rank=max_rank)


def whole(*shape: int) -> Tensor:
    """Small whole numbers, whose sums are exact in any order."""
    return torch.randint(-4, 5, shape).float()


def factors(rank: int) -> tuple[Tensor, Tensor]:
    return whole(rank, K), whole(N, rank)


def tensors(table: AdapterTable | None) -> list[Tensor]:
    """All that kernels read."""
    assert table is not None
    return [t for t in (table.pages, table.rows, table.scaling, table.biases, table.ends) if t is not None]


def addresses(made: AdapterBank | PackedBank) -> list[int]:
    return [t.data_ptr() for t in tensors(made.table())]


Parts = tuple[Tensor | None, Tensor | None, float, Tensor | None]


def replay(live: AdapterTable, numbers: Tensor, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """What a graph computes that has captured this table: it knows addresses and constants, and no adapter."""
    slots = ids % live.count
    slots = torch.where((ids >= 0) & (numbers[slots] == ids), slots, -1)
    y = x @ weight.t()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            rank, A, B, beta = read(live, slot)
            assert rank <= live.z_width
            y[row] += live.scaling[slot] * (x[row] @ A.t()) @ B
            y[row] += 0 if beta is None else beta
    return y


def read(live: AdapterTable, slot: int) -> tuple[int, Tensor, Tensor, Tensor | None]:
    """Rank, A [R, K], Bᵀ [R, N] and β, from the addresses in the table."""
    first, rank, _, taken = live.rows[slot].tolist()
    assert taken or not rank
    A, B = [torch.empty(0, K)], [torch.empty(0, N)]
    for page in range(-(-rank // 16)):
        at_A, stride_A, at_B, stride_Bn, stride_Br = live.pages[first + page].tolist()
        assert (stride_A, stride_Bn, stride_Br) == (K, 1, N)
        ranks = min(16, rank - page * 16)
        A.append(at(at_A, ranks, K))
        B.append(at(at_B, ranks, N))
    beta = int(live.biases[slot, 1])
    return rank, torch.cat(A), torch.cat(B), at(beta, 1, N)[0] if beta else None


def at(address: int, *shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.frombuffer(bytearray(ctypes.string_at(address, 4 * count)), dtype=torch.float32).view(shape)


class Watch(TorchDispatchMode):
    """After every operation of torch, each number in the table must have the whole adapter of that number."""

    def __init__(self, made: AdapterBank) -> None:
        super().__init__()
        self.made, self.table = made, made.table()
        self.expected: dict[int, Parts] = {}
        self.slot = 0
        self.checks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            self.check(self.slot)
        return result

    def check(self, slot: int) -> None:
        self.checks += 1
        number = int(self.made._live_numbers[slot])
        if number < 0:
            return
        A, B, scaling, bias = self.expected[number]
        rank = 0 if A is None else A.shape[0]
        first, *row = self.table.rows[slot].tolist()
        assert row == [rank, 0, 1]
        for r, page in zip(range(0, rank, 16), self.table.pages[first:].tolist(), strict=False):
            ranks = min(16, rank - r)
            assert ctypes.string_at(page[0], 4 * K * ranks) == as_bytes(A[r : r + ranks])
            assert ctypes.string_at(page[2], 4 * N * ranks) == as_bytes(B[:, r : r + ranks].t())
        assert float(self.table.scaling[slot]) == scaling
        beta = int(self.table.biases[slot, 1])
        assert (beta == 0) == (bias is None)
        assert bias is None or ctypes.string_at(beta, 4 * N) == as_bytes(bias)


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def test_a_thousand_loads_and_unloads_move_nothing_and_show_no_half_adapter(gpu: Device) -> None:
    made, generator = bank(max_adapters=5), torch.Generator().manual_seed(0)
    before, watch, loaded = addresses(made), Watch(made), []
    kinds: list[Parts] = [
        (None if not rank else torch.randn(rank, K), None if not rank else torch.randn(N, rank), float(rank), bias)
        for rank in (0, 1, 7, 16, 17, 48)
        for bias in (None, torch.randn(N))
        if rank or bias is not None
    ]
    with gpu.capture():
        made.table()
    with watch:
        for turn in range(1000):
            if len(loaded) == 5:
                name = loaded.pop(int(torch.randint(5, (1,), generator=generator)))
                watch.slot = made.number(name) % 5
                made.remove(name)
            A, B, scaling, bias = kinds[turn % len(kinds)]
            number = made.free_number(f"a{turn}")
            watch.slot, watch.expected[number] = number % 5, (A, B, scaling, bias)
            assert made.add(f"a{turn}", A, B, scaling, bias_B=bias) == number
            loaded.append(f"a{turn}")
            made._cached_table = None  # drop what the last call held
            if turn % 100 == 0:
                assert addresses(made) == before
                for slot in range(5):
                    watch.check(slot)
    assert watch.checks > 5000
    assert addresses(made) == before
    assert made.table().z_width == 48
    assert len(made.pool.chunks) == 1


def test_a_replay_sees_the_adapters_that_there_are(gpu: Device) -> None:
    made, x, weight = bank(), whole(4, K), whole(N, K)
    for name in "abc":
        made.add(name, *factors(5), 1.0)
    ids = torch.tensor([0, 1, 2, -1])
    with gpu.capture():
        captured, numbers = made.table(), made.numbers_on(x.device)
    for turn in range(4):
        made.remove("abc"[turn % 3])
        gone = replay(captured, numbers, x, weight, ids)
        assert torch.equal(gone[turn % 3], x[turn % 3] @ weight.t())
        ids[turn % 3] = made.add("abc"[turn % 3], *factors(3 + 15 * turn), 2.0, bias_B=whole(N))
        expected = functional.multi_lora_linear(x, weight, None, made, ids)
        assert torch.equal(replay(captured, numbers, x, weight, ids), expected)
    stale = ids.clone()
    stale[0] = 0  # whose adapter is long gone
    assert torch.equal(replay(captured, numbers, x, weight, stale)[0], x[0] @ weight.t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_have_the_bits_of_a_table_that_is_built(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(9, K, dtype=dtype), torch.randn(N, K, dtype=dtype)
    ids = torch.tensor([0, 1, 2, -1, 0, 2, 1, 1, 0])
    adapters = [(*factors(rank), torch.randn(rank), torch.randn(N)) for rank in (1, 17, 40)]

    def results() -> list[Tensor]:
        made, inputs = AdapterBank(K, N, 3, dtype, "cpu", max_rank=64), x.clone().requires_grad_()
        for number, (A, B, a, beta) in enumerate(adapters):
            made.add(f"{number}", A, B, 0.5, activation="gelu", bias_A=a, bias_B=beta)
        y = functional.multi_lora_linear(inputs, weight, None, made, ids)
        y.float().sum().backward()
        return [y.detach(), inputs.grad]

    built = results()
    Device(monkeypatch)
    for one, other in zip(built, results(), strict=True):
        assert torch.equal(one, other)


def test_a_backward_after_a_removal_uses_the_adapter_of_its_forward(gpu: Device) -> None:
    def gradient(remove: bool) -> Tensor:
        torch.manual_seed(0)
        made, x = bank(), torch.randn(2, K, requires_grad=True)
        ids = torch.tensor([made.add("a", *factors(20), 1.0, activation="relu"), -1])
        y = functional.multi_lora_linear(x, torch.randn(N, K), None, made, ids)
        if remove:
            made.remove("a")
            made.add("b", *factors(40), 1.0)
        y.sum().backward()
        return x.grad

    assert torch.equal(gradient(True), gradient(False))


def test_without_a_declared_rank_the_table_grows_until_a_graph_has_it(gpu: Device) -> None:
    made = bank(max_rank=None)
    made.add("a", *factors(10), 1.0)
    small = addresses(made)
    made.add("b", *factors(33), 1.0)
    assert made.table().z_width == 48
    large = addresses(made)
    assert small != large
    with gpu.capture():
        made.table()
    before = (dict(made.names), list(made.pool.free))
    with pytest.raises(ValueError, match=r"lora_A: expected at most 48 ranks, for which a captured .*got 49"):
        made.add("c", *factors(49), 1.0)
    assert (dict(made.names), list(made.pool.free)) == before
    made.add("c", *factors(48), 1.0)
    assert addresses(made) == large


def test_a_declared_rank_is_the_largest_on_every_device() -> None:
    made = bank(max_rank=16)
    made.add("a", *factors(16), 1.0)
    with pytest.raises(ValueError, match="lora_A: expected at most max_rank = 16 ranks, got 17"):
        made.add("b", *factors(17), 1.0)
    with pytest.raises(ValueError, match="max_rank: expected an integer of 1 or more, got 0"):
        bank(max_rank=0)


def test_what_a_graph_cannot_see_raises(gpu: Device) -> None:
    made, trained = bank(), Adapter(tuple(factors(4)[:1]), tuple(factors(4)[1:]), 1.0)
    made.add("a", *factors(4), 1.0)
    with gpu.capture():
        made.table()
        with pytest.raises(
            RuntimeError, match="bank: expected no capture of a CUDA graph while adapters change, got one"
        ):
            made.add("b", *factors(4), 1.0)
    with pytest.raises(RuntimeError, match="expected trainable adapters before a CUDA graph captures it"):
        made.lend("b", lambda: trained)
    with pytest.raises(RuntimeError, match=r"expected to stay in torch\.float32 on cpu, where a CUDA graph reads"):
        made.apply(lambda tensor: tensor.double())
    before = addresses(made)
    made.apply(lambda tensor: tensor)
    assert addresses(made) == before
    assert list(made.names) == ["a"]


def test_trained_adapters_are_followed_in_place(gpu: Device) -> None:
    made, x, weight = bank(), whole(2, K), whole(N, K)
    A, B = (torch.nn.Parameter(factor) for factor in factors(20))
    number = made.lend("t", lambda: Adapter((A,), (B,), 1.0))
    ids, before = torch.tensor([number, -1]), addresses(made)
    with torch.no_grad():
        A.data = A.data.clone()
        y = functional.multi_lora_linear(x, weight, None, made, ids)
        assert torch.equal(y[0], x[0] @ (weight + B @ A).t())
    assert addresses(made) == before
    with gpu.capture():
        made.table()
        A.data = A.data.clone()
        with pytest.raises(RuntimeError, match="expected no capture of a CUDA graph while adapters change"):
            made.table()
    B.data = B.data.t().contiguous().t()
    with pytest.raises(RuntimeError, match="with the strides and alignment that a CUDA graph has captured"):
        made.table()


def test_packed_banks_have_one_table_that_stays(gpu: Device) -> None:
    sizes = (4, 6)
    each = [AdapterBank(K, size, 3, torch.float32, "cpu", max_rank=32) for size in sizes]
    packed, x, weight = PackedBank(each), whole(3, K), whole(sum(sizes), K)
    before = addresses(packed)
    for turn in range(7):
        for made, size in zip(each, sizes, strict=True):
            if turn >= 3:
                made.remove(f"{turn - 3}")
            made.add(f"{turn}", whole(turn * 5 + 1, K), whole(size, turn * 5 + 1), 1.0)
        ids = torch.tensor([each[0].number(f"{turn}"), -1, each[0].number(f"{max(turn - 1, 0)}")])
        parts = [
            functional.multi_lora_linear(x, part, None, made, ids)
            for part, made in zip(weight.split(sizes), each, strict=True)
        ]
        y = functional.multi_lora_linear(x, weight, None, packed, ids)
        assert torch.equal(y, torch.cat(parts, dim=1))
        assert addresses(packed) == before
    assert packed.table().columns == (0, 4, 10)


def test_a_copy_has_a_table_of_its_own(gpu: Device) -> None:
    made = bank()
    made.add("a", *factors(20), 1.0)
    made.remove("a")
    made.add("b", *factors(20), 1.0)
    with gpu.capture():
        made.table()
    other = copy.deepcopy(made)
    assert not set(addresses(other)) & set(addresses(made))
    assert sorted([*other.pool.free, *(page for pages in other._pages.values() for page in pages)]) == list(range(64))
    other.add("c", *factors(30), 1.0)
    assert not other.order.captured


# ---- streams


def test_a_write_waits_for_the_streams_that_read_and_a_read_for_the_last_write(gpu: Device) -> None:
    made, loading, reading, idle = bank(), gpu.stream, Stream(), Stream()
    made.add("a", *factors(4), 1.0)
    with gpu.on(reading):
        made.table()
        reading.launch()
    assert reading.waits_for(loading)
    assert not loading.waits_for(reading)
    made.remove("a")
    assert loading.waits_for(reading)
    assert not loading.waits_for(idle)
    loading.launch()
    made.add("b", *factors(4), 1.0)
    with gpu.on(reading):
        made.table()
        waits = len(reading.waits)
        made.table()
    assert reading.waits_for(loading)
    assert len(reading.waits) == waits  # once per write


def test_pages_are_used_again_after_all_streams_that_may_read_them(gpu: Device) -> None:
    made, reading = bank(), Stream()
    made.add("a", *factors(16), 1.0)
    [page] = made._pages[0]
    with gpu.on(reading):
        made.table()
        reading.launch()
    made.remove("a")
    made.table()  # lets go of the old one
    gc.collect()
    made.add("b", *factors(16), 1.0)
    assert made._pages[1] != [page]  # the launch has not ended, and there are other pages
    reading.done = reading.given
    made.add("c", *factors(16), 1.0)
    assert made._pages[2] == [page]


def test_a_stream_waits_for_pages_when_there_are_no_others(gpu: Device) -> None:
    made, reading = AdapterBank(K, N, 2, torch.float32, "cpu"), Stream()
    made.add("a", *factors(16 * 64), 1.0)
    with gpu.on(reading):
        made.table()
        reading.launch()
    made.remove("a")
    made.table()
    gc.collect()
    with gpu.on(Stream()) as loading:
        made.add("b", *factors(16), 1.0)
        assert loading.waits_for(reading)
    assert len(made.pool.chunks) == 1


def test_biases_live_as_long_as_launches_may_read_them(gpu: Device) -> None:
    made, reading = bank(), Stream()
    made.add("a", None, None, 1.0, bias_B=torch.randn(N))
    with gpu.on(reading):
        made.table()
        reading.launch()
    made.remove("a")
    made.table()
    gc.collect()
    made.add("b", *factors(1), 1.0)
    assert [tensor.shape for retired in made.pool._retired for tensor in retired.tensors] == [(N,)]
    reading.done = reading.given
    made.add("c", *factors(1), 1.0)
    assert not made.pool._retired


def test_a_table_that_was_replaced_lives_as_long_as_launches_may_read_it(gpu: Device) -> None:
    made, reading = AdapterBank(K, N, 4, torch.float32, "cpu"), Stream()
    made.add("a", *factors(4), 1.0)
    with gpu.on(reading):
        old = weakref.ref(made.table().pages)
        reading.launch()
    made.add("b", *factors(40), 1.0)  # of more pages than the table has room for
    made.table()
    gc.collect()
    assert old() is not None
    reading.done = reading.given
    made.add("c", *factors(1), 1.0)
    gc.collect()
    assert old() is None


def test_a_packed_table_that_was_replaced_lives_as_long(gpu: Device) -> None:
    each = [AdapterBank(K, size, 4, torch.float32, "cpu") for size in (4, 6)]
    packed, reading = PackedBank(each), Stream()

    def add(name: str, rank: int) -> None:
        for made, size in zip(each, (4, 6), strict=True):
            made.add(name, torch.randn(rank, K), torch.randn(size, rank), 1.0)

    add("a", 4)
    with gpu.on(reading):
        old = weakref.ref(packed.table().pages)
        reading.launch()
    add("b", 40)
    packed.table()
    gc.collect()
    assert old() is not None
    reading.done = reading.given
    add("c", 1)
    gc.collect()
    assert old() is None


def test_who_uses_a_table_again_reads_too(gpu: Device) -> None:
    """A layer that keeps a table asks only whether it is still valid."""
    made = bank()
    made.add("a", *factors(4), 1.0)
    kept = made.table()
    with gpu.on(Stream()) as reading:
        assert kept.live.is_valid(kept.overwritten)
        reading.launch()
    with gpu.on(Stream()) as loading:
        made.add("b", *factors(4), 1.0)
        assert loading.waits_for(reading)


def test_the_host_waits_for_replays_before_it_writes(gpu: Device) -> None:
    made = bank()
    made.add("a", *factors(4), 1.0)
    assert gpu.waits == 0
    with gpu.capture():
        made.table()
    made.remove("a")
    assert gpu.waits == 0
    made.add("b", *factors(4), 1.0)
    assert gpu.waits == 1
    assert gpu.stream.done == gpu.stream.given


def test_nothing_is_written_while_a_graph_is_captured(gpu: Device) -> None:
    """The garbage collector may free an adapter at any time."""
    made = bank()
    number = made.add("a", *factors(4), 1.0)
    made.forget("a")
    live = made.table()
    with gpu.capture():
        made.free(number)
        assert live.rows[0, 1] == 4
        made.table()
    assert made.adapters[0] is None
    made.table()
    assert live.rows[0, 1:].tolist() == [0, 0, 0]
    assert made.numbers_on(torch.device("cpu")).tolist() == [-1, -1, -1]


# ---- a server


def test_a_server_loads_and_unloads_under_a_graph(gpu: Device, tmp_path: pathlib.Path) -> None:
    model, server = two_adapters(tmp_path)
    x = torch.randn(3, 16)
    ids = server.ids(["alice", "bob", None])
    with torch.no_grad():
        with gpu.capture(), server.route(ids):
            model(x)
        before = {name: addresses(layer.bank) for name, layer in server._layers.items()}
        numbers = server._slots._tensor.data_ptr()
        expected = {}
        for name in ("alice", "bob"):
            with server.route([name] * 3):
                expected[name] = model(x)
        for _ in range(70):  # slots are used again after 64
            server.unload("alice")
            server.load("alice", tmp_path / "alice")
            ids.copy_(server.ids(["alice", "bob", None]))
        with server.route(ids):
            y = model(x)
        assert torch.equal(y[0], expected["alice"][0])
        assert torch.equal(y[1], expected["bob"][1])
    assert {name: addresses(layer.bank) for name, layer in server._layers.items()} == before
    assert server._slots._tensor.data_ptr() == numbers
    assert int(ids[0]) >= 64
    assert server._slots.slots_of(ids).tolist() == [int(ids[0]) % 64, int(ids[1]), -1]


def test_a_server_refuses_what_a_graph_of_it_would_not_see(gpu: Device, tmp_path: pathlib.Path) -> None:
    model, server = two_adapters(tmp_path)  # query and dense, ranks 2 and 3
    with gpu.capture(), server.route(server.ids(["alice"])), torch.no_grad():
        model(torch.randn(1, 16))
    for name, rank in (("value", 2), ("query", 17)):
        other = small_model()
        peftk.inject(other, peftk.LoraConfig(r=rank, target_modules=[name]))
        peftk.save_adapter(other, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"block\.value: expected a linear with adapters when a CUDA graph"):
        server.load("value", tmp_path / "value")
    with pytest.raises(CheckpointError, match=r"block\.query: lora_A: expected at most 16 ranks, for which a captured"):
        server.load("query", tmp_path / "query")
    assert server.names == ["alice", "bob"]


def test_a_server_declares_the_largest_rank(tmp_path: pathlib.Path) -> None:
    two_adapters(tmp_path)  # ranks 2 and 3
    server = peftk.MultiAdapter(small_model(), max_rank=2)
    server.load("alice", tmp_path / "alice")
    with pytest.raises(CheckpointError, match="expected at most max_rank = 2 ranks, got 3"):
        server.load("bob", tmp_path / "bob")
    assert server.names == ["alice"]

"""Compiled calls with many adapters: no table is built per call, and nothing that is kept comes from a graph's pool."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import peftk
from peftk import AdapterBank, PackedBank, functional
from peftk.adapters import handles, kept_tables, table
from peftk.adapters.adapter import Adapter
from peftk.adapters.flat import pack
from peftk.launch import workspace
from peftk.ops import custom_ops
from peftk.system import lasting
from tests.support.fake_streams import Device, Stream

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _new_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(kept_tables, "_kept", {})
    monkeypatch.setattr(lasting, "read_by_graphs", {})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the tables that were built."""
    found: list[int] = []
    build = table.build

    def counted(adapters: tuple[Adapter | None, ...], **rest: Any) -> table.AdapterTable:
        found.append(len(adapters))
        return build(adapters, **rest)

    monkeypatch.setattr(table, "build", counted)
    return found


class Allocations(TorchDispatchMode):
    """Memory that this thread allocates, as a graph's pool has it; `kept` is what is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(out, Tensor) and out.numel() and out.untyped_storage().data_ptr() not in known:
            self.made.append(torch.multiprocessing.reductions.StorageWeakRef(out.untyped_storage()))
        return out

    def kept(self) -> int:
        gc.collect()
        return sum(not storage.expired() for storage in self.made)


def add(bank: AdapterBank | peftk.MultiLoRALinear, name: str, rank: int, N: int = 6) -> int:
    into = bank.add if isinstance(bank, AdapterBank) else bank.add_adapter
    return into(name, torch.randn(rank, 8), torch.randn(N, rank), 0.5)


def serving(max_rank: int = 20) -> peftk.MultiLoRALinear:
    torch.manual_seed(0)
    layer = peftk.MultiLoRALinear.from_linear(nn.Linear(8, 6), max_adapters=4, max_rank=max_rank)
    add(layer, "a", 3)
    add(layer, "b", 17)
    return layer


class Compiles:
    """A compiler that counts what it is given."""

    count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


def test_a_compiled_graph_follows_its_bank(builds: list[int]) -> None:
    layer, x, compiles = serving(), torch.randn(3, 5, 8), Compiles()
    model = torch.compile(layer, fullgraph=True, backend=compiles)
    with torch.no_grad():
        assert torch.equal(model(x, torch.tensor([1, -1, 0])), layer(x, torch.tensor([1, -1, 0])))
        once = len(builds)
        for _ in range(3):
            model(x, torch.tensor([0, 1, 1]))
        assert len(builds) == once
        ids = torch.tensor([1, add(layer, "c", 20), -1])
        assert torch.equal(model(x, ids), layer(x, ids))
        assert compiles.count == 1
        layer.remove_adapter("a")
        add(layer, "d", 3)
        number = add(layer, "e", 1)  # in the slot that "a" had
        ids = torch.tensor([number, 1, -1])
        assert number >= 4
        assert torch.equal(model(x, ids), layer(x, ids))
        assert torch.equal(model(x, ids.to(torch.int32)), layer(x, ids))
        count = compiles.count
        layer.remove_adapter("d")
        add(layer, "f", 2)
        assert torch.equal(model(x, ids), layer(x, ids))
        assert compiles.count == count
        with pytest.raises(ValueError, match="expected -1 or numbers of adapters in the bank, got 0"):
            model(x, torch.tensor([number, 0, -1]))


def test_a_bank_on_a_gpu_builds_no_table_at_all(gpu: Device, builds: list[int]) -> None:
    layer, x, compiles = serving(), torch.randn(3, 8), Compiles()
    model = torch.compile(layer, fullgraph=True, backend=compiles)
    with torch.no_grad():
        for name in "cd":
            number = add(layer, name, 5)
            ids = torch.tensor([number, 0, -1])
            assert torch.equal(model(x, ids), layer(x, ids))
    assert not builds
    assert compiles.count == 1
    with torch.no_grad(), gpu.capture():
        model(x, ids)
    assert layer.bank.order.captured  # later writes wait for replays


def test_packed_banks_and_blocks(builds: list[int]) -> None:
    banks = [AdapterBank(8, n, 3, torch.float32, "cpu", max_rank=16) for n in (4, 2)]
    for number, bank in enumerate(banks):
        for name in "ab":
            add(bank, name, 2 + number, bank.shape[0])
    packed, block = PackedBank(banks), AdapterBank(8, 8, 2, torch.float32, "cpu")
    add(block, "a", 3, 8)
    x, W, compiles = torch.randn(3, 8), torch.randn(6, 8), Compiles()

    def call(ids: Tensor) -> tuple[Tensor, Tensor]:
        return (
            functional.multi_lora_linear(x, W, None, packed, ids),
            functional.multi_adapter_block(x, block, ids.clamp(max=0), dropout_p=0.5, seed=torch.tensor([3])),
        )

    compiled = torch.compile(call, fullgraph=True, backend=compiles)
    for ids in (torch.tensor([1, 0, -1]), torch.tensor([-1, 1, 1])):
        assert all(map(torch.equal, compiled(ids), call(ids)))
    add(banks[0], "c", 9, 4)
    add(banks[1], "c", 9, 2)
    ids = torch.tensor([2, 2, 1])
    once = len(builds)
    assert all(map(torch.equal, compiled(ids), call(ids)))
    assert len(builds) <= once + 2
    assert compiles.count == 1


def test_a_copy_of_a_bank_has_a_number_of_its_own() -> None:
    layer = serving()
    other = copy.deepcopy(layer)
    assert len({layer.bank.handle, other.bank.handle}) == 2
    assert handles.bank(other.bank.handle) is other.bank
    packed = PackedBank([layer.bank])
    assert handles.bank(copy.deepcopy(packed).handle) is not packed
    gone = other.bank.handle
    del other
    gc.collect()
    with pytest.raises(RuntimeError, match=f"compiled with, number {gone}, got none"):
        custom_ops.bank_lora_linear(torch.randn(1, 8), layer.weight, None, gone, torch.tensor([0]), 0.0, None, None)


def test_with_gradients_or_trained_adapters_tensors_are_inputs(builds: list[int]) -> None:
    """Autograd has to see them; their table is built once."""
    layer = serving()
    layer.add_adapter("t", torch.randn(2, 8), torch.randn(6, 2), trainable=True)
    assert layer.bank.lent == 1
    x, ids = torch.randn(3, 8, requires_grad=True), torch.tensor([2, 0, 1])
    model = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step(run: nn.Module) -> list[Tensor]:
        y = run(x, ids)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    eager = step(layer)
    before = len(builds)
    for _ in range(3):
        for one, other in zip(step(model), eager, strict=True):
            torch.testing.assert_close(one, other)
    assert len(builds) == before + 1  # forward and backward share it
    with torch.no_grad():
        for parameter in leaves[1:]:
            parameter.mul_(2.0)
    for one, other in zip(step(model), step(layer), strict=True):  # the values are not part of a table
        torch.testing.assert_close(one, other)
    layer.remove_adapter("t")
    assert layer.bank.lent == 0


def test_a_bias_that_trains_gets_its_gradient() -> None:
    layer, x, ids = serving(), torch.randn(3, 8), torch.tensor([1, 0, -1])
    weight, bias = torch.randn(6, 8), torch.randn(6, requires_grad=True)

    def loss() -> Tensor:
        return functional.multi_lora_linear(x, weight, bias, layer.bank, ids).square().sum()

    [expected] = torch.autograd.grad(loss(), bias)
    [found] = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(), bias)
    torch.testing.assert_close(found, expected)


def test_graphs_read_pages_and_parameters_where_they_are() -> None:
    """A table has their addresses, so a graph's copies of them would not be the ones that kernels read."""
    layer = serving()
    layer.add_adapter("t", torch.randn(2, 8), torch.randn(6, 2), trainable=True)
    copied: list[list[tuple[int, ...]]] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        metadata = torch._guards.TracingContext.get().fw_metadata
        copied.append([tuple(t.shape) for i, t in enumerate(inputs) if i not in metadata.static_input_indices])
        return make_boxed_func(graph.forward)

    model = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    model(torch.randn(5, 8), torch.tensor([0, 1, 2, -1, 2]))
    assert sorted(copied[0]) == [(5,), (5, 8)]  # ids and x


def flat(rank: int = 3) -> tuple[list[Tensor], list[int], list[float]]:
    return pack((Adapter((torch.randn(rank, 8),), (torch.randn(6, rank),), 0.5), None))


def find(packed: tuple[list[Tensor], list[int], list[float]]) -> table.AdapterTable:
    return kept_tables.find(*packed, (), dtype=torch.float32, device=CPU)


def test_a_kept_table_is_the_one_of_these_places() -> None:
    tensors, layout, scalings = packed = flat()
    first = find(packed)
    assert find(packed) is first
    assert find((tensors, layout, [0.25, 0.0])) is not first
    moved = [tensors[0].clone(), tensors[1]]
    assert find((moved, layout, scalings)).pages[0, 0] == moved[0].data_ptr()
    strided = [tensors[0], tensors[1].t().contiguous().t()]
    assert find((strided, layout, scalings)).pages[0, 3:].tolist() == [1, 6]
    with pytest.raises(ValueError, match=r"expected tensors of torch\.float32"):
        find(([tensor.double() for tensor in tensors], layout, scalings))
    tensors[0].data = tensors[0].clone()  # it moves
    assert find(packed).pages[0, 0] == tensors[0].data_ptr()


def test_a_kept_table_goes_with_its_tensors_unless_a_graph_reads_it(gpu: Device) -> None:
    packed = flat()
    find(packed)
    assert len(kept_tables._kept) == 1
    del packed
    gc.collect()
    assert not kept_tables._kept
    packed = flat()
    find(packed)
    with gpu.capture():
        captured = find(packed)
        with pytest.raises(RuntimeError, match="expected tensors that were there, at the same addresses, in a call"):
            find(flat())
    del packed
    gc.collect()
    assert not kept_tables._kept
    assert [*lasting.read_by_graphs.values()] == [captured]


def test_another_stream_that_reads_a_kept_table_is_recorded(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[Stream] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: recorded.append(stream), raising=False)
    packed = flat()
    find(packed)
    find(packed)
    assert not recorded
    with gpu.on(Stream()) as other:
        find(packed)
    assert set(recorded) == {other}
    assert len(recorded) == 4


def test_what_is_kept_is_not_allocated_by_the_thread_that_runs_a_graph(gpu: Device) -> None:
    """Where a graph runs before its capture, all that its thread allocates lies in the graph's pool."""
    banks = [AdapterBank(8, n, 3, torch.float32, "cpu", max_rank=16) for n in (4, 2)]
    packed, tensors = PackedBank(banks), flat()
    add(banks[0], "a", 3, 4)
    packed._live = packed._packed = None
    with Allocations() as pool, torch.inference_mode():
        counters = workspace._counters(CPU, 3000)
        found = find(tensors)
        both = packed.table()
    assert both is not None
    assert pool.kept() == 0
    assert not counters.is_inference()
    assert not found.pages.is_inference()
    assert counters.numel() >= 3000
    with Allocations() as pool:
        kept = torch.zeros(3)
    assert pool.kept() == 1  # that the count would see it
    del kept


def test_outside_pools_raises_what_is_raised_there(gpu: Device) -> None:
    def fail() -> None:
        raise MemoryError("no memory left")

    with pytest.raises(MemoryError, match="no memory left"):
        lasting.outside_pools(CPU, fail)


def test_opcheck_of_the_ops_that_find_a_bank() -> None:
    layer = serving()
    x, ids = torch.randn(4, 8), torch.tensor([0, -1, 1, 1])
    torch.library.opcheck(custom_ops.slots_of, (ids, layer.bank.handle))
    for dtype in (torch.int32, torch.int64):
        arguments = (x, layer.weight, layer.bias, layer.bank.handle, ids.to(dtype), 0.25, torch.tensor([3]), None)
        torch.library.opcheck(custom_ops.bank_lora_linear, arguments)


@torch.no_grad()  # torch built without CUDA has no engine for gradients there
def test_fake_tensors_of_a_gpu() -> None:
    """What Inductor asks the ops, on a device that is not there."""
    bank = serving().bank
    tensors, layout, scalings = pack(bank.adapters)
    with FakeTensorMode():
        x = torch.empty(4, 8, device="cuda", dtype=torch.bfloat16)
        weight, ids = x.new_empty(6, 8), torch.empty(4, device="cuda", dtype=torch.int32)
        slots = custom_ops.slots_of(ids.long(), bank.handle)
        y = custom_ops.bank_lora_linear(x, weight, None, bank.handle, slots, 0.0, None, None)
        packed = ([torch.empty(t.shape, device="cuda") for t in tensors], layout, scalings, (), ids)
        trained, z = custom_ops.multi_lora_linear(x, weight, None, *packed, 0.0, None, None)
        needs = [True] * (1 + len(tensors))
        dx, *grads = custom_ops.multi_lora_linear_backward(y, x, weight, *packed, z, 0.0, None, None, needs)
    assert (slots.shape, slots.dtype) == (ids.shape, torch.int64)
    for found, shape, dtype in ((y, (4, 6), x.dtype), (trained, (4, 6), x.dtype), (dx, (4, 8), x.dtype)):
        assert (found.shape, found.dtype, found.device.type) == (shape, dtype, "cuda")
    assert (z.shape, z.dtype, z.device.type) == ((4, 32), torch.float32, "cuda")
    assert [grad.shape for grad in grads] == [t.shape for t in tensors]


def test_a_compiled_graph_has_no_table_and_no_page_in_it() -> None:
    layer, x, ids = serving(), torch.randn(3, 8), torch.tensor([1, 0, -1])
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        assert len(inputs) == 4  # x, W, bias, ids
        return graph.forward

    with torch.no_grad():
        torch.compile(layer, fullgraph=True, backend=keep)(x, ids)
    [graph] = graphs
    ops = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert ops == [torch.ops.peftk.bank_lora_linear.default]


def test_exported_programs_bring_their_adapters() -> None:
    layer, x, ids = serving(), torch.randn(3, 8), torch.tensor([1, 0, -1])
    with torch.no_grad():
        program = torch.export.export(layer, (x, ids))
        expected = layer(x, ids)
        layer.remove_adapter("b")
        assert torch.equal(program.module()(x, ids), expected)

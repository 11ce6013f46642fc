"""Tests of routes: an id always means the same adapter, and a route applies to what runs inside it and nothing else."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import copy
import functools
import gc
import multiprocessing.pool
import pathlib
import pickle
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftk
from peftk import AdapterBank, MultiAdapter, functional
from peftk.adapters import carry
from peftk.methods.inject import lora_layers

NAMES = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def _few_threads(one_thread: None) -> None:
    pass


class Tenants:
    """A server with adapters a, b, c, …, and for each adapter a model that has only that one."""

    def __init__(
        self, base: nn.Module, folder: pathlib.Path, *names: str, targets: Any = "all-linear", **arguments: Any
    ):
        self.base, self.folder, self.targets = base.eval(), folder, targets
        self.alone: dict[str | None, nn.Module] = {None: base}
        self.model = copy.deepcopy(base)
        self.server = MultiAdapter(self.model, **arguments)
        for name in names:
            self.load(name)

    def load(self, name: str, targets: Any = None, seed: int | None = None) -> None:
        model = copy.deepcopy(self.base)
        peftk.inject(model, peftk.LoraConfig(r=2, lora_alpha=4, target_modules=targets or self.targets))
        torch.manual_seed(ord(name[0]) if seed is None else seed)
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_B)
        peftk.save_adapter(model, self.folder / name)
        self.server.load(name, self.folder / name)
        self.alone[name] = model.eval()

    def answers(self, x: Tensor) -> str | None:
        """The name of the adapter with which the server's model computes one sequence x; None for the base model."""
        return self.whose(self.model(x), x)

    def whose(self, y: Tensor, x: Tensor) -> str | None:
        """The name of the adapter that gives y for x."""
        matches = [name for name, model in self.alone.items() if torch.allclose(model(x), y, atol=1e-4)]
        assert len(matches) == 1, matches
        return matches[0]


def two_linears() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


@pytest.fixture
def tenants(tmp_path: pathlib.Path) -> Tenants:
    return Tenants(two_linears(), tmp_path, "a", "b")


X = torch.linspace(-1, 1, 8)[None]

# ---------------------------------------------------------------------------------------------------------------------
# An id always means the same adapter


def test_a_route_keeps_its_adapter_when_a_different_one_takes_its_place(tmp_path: pathlib.Path) -> None:
    tenants = Tenants(two_linears(), tmp_path, "a", max_adapters=2)
    server = tenants.server
    with server.route(["a"]):
        server.unload("a")
        tenants.load("b")
        assert tenants.answers(X) == "a"
        with pytest.raises(
            ValueError, match=r"got 2 adapters loaded already, 1 of them unloaded but still used by routes"
        ):
            tenants.load("c")
        with server.route(["b"]):
            assert tenants.answers(X) == "b"
    tenants.load("c")
    for name in ("b", "c"):
        with server.route([name]):
            assert tenants.answers(X) == name
    with pytest.raises(ValueError, match=r"name: expected a loaded adapter \(b, c\), got 'a'"), server.route(["a"]):
        pass


def test_an_adapter_loaded_under_the_same_name_is_for_new_routes(tenants: Tenants) -> None:
    old = tenants.alone["a"]
    with tenants.server.route(["a"]):
        tenants.server.unload("a")
        tenants.load("a", seed=99)
        torch.testing.assert_close(tenants.model(X), old(X))
        with tenants.server.route(["a"]):
            torch.testing.assert_close(tenants.model(X), tenants.alone["a"](X))
        torch.testing.assert_close(tenants.model(X), old(X))
    assert not torch.allclose(old(X), tenants.alone["a"](X))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputation_has_the_adapter_of_its_forward(tenants: Tenants, use_reentrant: bool) -> None:
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    with tenants.server.route(["a"]):
        loss = torch.utils.checkpoint.checkpoint(tenants.model, x, use_reentrant=use_reentrant).square().sum()
    tenants.server.unload("a")
    tenants.load("c")
    tenants.load("d")
    loss.backward()
    tenants.alone["a"](y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    del loss
    gc.collect()
    tenants.server.unload("d")
    assert [n for n in tenants.server._slots.numbers if n != -1] == [1, 2]  # b and c: a's place is free again


def test_memory_is_free_when_nothing_uses_an_adapter(tenants: Tenants) -> None:
    bank = tenants.model[0].bank
    tensor = weakref.ref(bank.adapters[tenants.server.hold("a").number % len(bank.slots)].pages_A[0])
    with tenants.server.route(["a"]):
        tenants.server.unload("a")
        tenants.model(X)
        assert tensor() is not None
    bank.table()  # the old one holds its adapters
    assert tensor() is None


def test_a_layer_that_a_later_adapter_adds_has_every_earlier_one(tmp_path: pathlib.Path) -> None:
    """Each has the number that it has in the other layers, even if it was unloaded and is still in use."""
    tenants = Tenants(two_linears(), tmp_path, "a", "b", "c", targets=["0"])
    server = tenants.server
    with server.route(["b"]):
        server.unload("a")
        server.unload("b")
        tenants.load("d", targets=["0", "2"])
        for name in ("c", "d"):
            with server.route([name]):
                assert tenants.answers(X) == name
        assert tenants.answers(X) == "b"
    tenants.load("a", targets=["2"])
    with server.route(["c", "d", None, "a"]):
        y = tenants.model(X.expand(4, 8))
    assert [tenants.whose(row[None], X) for row in y] == ["c", "d", None, "a"]


def test_numbers_that_outlive_their_adapter_are_refused(tmp_path: pathlib.Path) -> None:
    tenants = Tenants(two_linears(), tmp_path, "a", "b", max_adapters=2)
    server, layer = tenants.server, tenants.model[0]
    old, number = server.ids(["a", "b"]), layer.adapter_id("a")
    server.unload("a")
    tenants.load("c")
    assert server.ids(["c"]).item() == layer.adapter_id("c") != number
    with (
        pytest.raises(ValueError, match=r"names: expected -1 and numbers of loaded adapters .*got 0"),
        server.route(old),
    ):
        pass
    with pytest.raises(ValueError, match="ids: expected -1 or numbers of adapters in the bank, got 0, which none of"):
        layer(X, torch.tensor([number]))
    for dtype in (torch.int32, torch.int64):
        ids = server.ids(["c", "b"]).to(dtype)
        with server.route(ids):
            y = tenants.model(X.expand(2, 8))
        assert [tenants.whose(row[None], X) for row in y] == ["c", "b"]
        by_ids = layer(X.expand(2, 8), ids)
        with server.route(["c", "b"]):
            torch.testing.assert_close(layer(X.expand(2, 8)), by_ids)


def full_bank() -> tuple[AdapterBank, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    bank = AdapterBank(8, 6, 2, torch.float32, "cpu")
    for name in "ab":
        bank.add(name, torch.randn(2, 8), torch.randn(6, 2), 1.0)
    return bank, torch.randn(3, 8), torch.randn(6, 8), torch.tensor([bank.number("a"), -1, bank.number("b")])


@pytest.mark.parametrize("grad", [False, True])
def test_a_banks_numbers_outlive_their_adapters(grad: bool) -> None:
    bank, x, W, ids = full_bank()
    packed = peftk.PackedBank([bank])
    x.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        before = functional.multi_lora_linear(x, W, None, bank, ids)
        A, B = torch.randn(2, 8), torch.randn(6, 2)
        bank.remove("a")
        for either in (bank, packed):
            with pytest.raises(ValueError, match=r"got 0, an empty slot"):
                functional.multi_lora_linear(x, W, None, either, ids)
        number = bank.add("c", A, B, 1.0)
        assert number == 2
        for either in (bank, packed):
            with pytest.raises(ValueError, match="got 0, which none of them has"):
                functional.multi_lora_linear(x, W, None, either, ids)
            ids = torch.tensor([number, -1, bank.number("b")])
            after = functional.multi_lora_linear(x, W, None, either, ids)
            torch.testing.assert_close(after[0], x[0] @ W.t() + x[0] @ A.t() @ B.t())
            torch.testing.assert_close(after[1:], before[1:])
            for bad in (4, -2, 2**31 - 1, 2**40):
                with pytest.raises(ValueError, match="ids"):
                    functional.multi_lora_linear(x, W, None, either, torch.tensor([bad, -1, -1]))
            ids = torch.tensor([0, -1, 1])


def test_the_numbers_of_series_adapters_outlive_them_too() -> None:
    bank = AdapterBank(8, 8, 1, torch.float32, "cpu")
    bank.add("a", torch.randn(2, 8), torch.randn(8, 2), 1.0)
    bank.remove("a")
    number = bank.add("b", torch.randn(2, 8), torch.randn(8, 2), 1.0)
    with pytest.raises(ValueError, match="got 0, which none of them has"):
        functional.multi_adapter_block(X, bank, torch.tensor([0]))
    assert not torch.equal(functional.multi_adapter_block(X, bank, torch.tensor([number])), X)


def test_in_packed_banks_a_number_must_fit_every_slice() -> None:
    """If one slice's slot holds an adapter with a different number, the number is refused."""
    torch.manual_seed(0)
    banks = [AdapterBank(8, 4, 1, torch.float32, "cpu") for _ in range(2)]
    for bank in banks:
        bank.add("a", torch.randn(2, 8), torch.randn(4, 2), 1.0)
    packed, W = peftk.PackedBank(banks), torch.randn(8, 8)
    banks[0].remove("a")
    ids = torch.tensor([banks[0].add("b", torch.randn(2, 8), torch.randn(4, 2), 1.0)])
    for gone in (ids, torch.tensor([0])):
        with pytest.raises(ValueError, match="which none of them has"):
            functional.multi_lora_linear(X, W, None, packed, gone)
    banks[1].remove("a")
    y = functional.multi_lora_linear(X, W, None, packed, ids)
    torch.testing.assert_close(y[:, 4:], (X @ W.t())[:, 4:])
    assert not torch.allclose(y[:, :4], (X @ W.t())[:, :4])


def test_numbers_of_a_reused_bank_are_compiled() -> None:
    bank, x, W, _ = full_bank()
    bank.remove("a")
    number = bank.add("c", torch.randn(2, 8), torch.randn(6, 2), 1.0)
    ids = torch.tensor([number, -1, 1])

    def call(ids: Tensor) -> Tensor:
        return functional.multi_lora_linear(x, W, None, bank, ids)

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), call(ids))
    with pytest.raises(ValueError, match="ids"):
        compiled(torch.tensor([0, -1, 1]))


def test_unknown_numbers_become_no_number_without_reading_values() -> None:
    """As on a GPU: by tensor operations alone, into tensors that graphs read."""
    from peftk.models.server import NO_NUMBER, _Slots

    slots = _Slots(3)
    for number in (0, 1):
        slots.take(number)
    ids = torch.tensor([0, 1, 2, -1, 3, 4, 2**31 - 1], dtype=torch.int32)
    read = functools.partial(slots.slots_of, ids)
    assert read().tolist() == [0, 1, NO_NUMBER, -1, NO_NUMBER, NO_NUMBER, NO_NUMBER]
    written = slots._numbers_on(ids.device)
    slots.give_back(0)
    slots.take(3)
    assert read().tolist() == [NO_NUMBER, 1, NO_NUMBER, -1, 0, NO_NUMBER, NO_NUMBER]
    assert slots._numbers_on(ids.device) is written


def test_ids_are_copied_when_the_with_begins(tenants: Tenants) -> None:
    ids = tenants.server.ids(["a", "b"])
    with tenants.server.route(ids):
        ids.fill_(1)
        y = tenants.model(X.expand(2, 8))
    assert [tenants.whose(row[None], X) for row in y] == ["a", "b"]


def test_adapters_are_loaded_and_unloaded_during_forwards_of_other_threads(tmp_path: pathlib.Path) -> None:
    """No forward uses one adapter in its first layer and a different one in its second."""
    tenants = Tenants(two_linears(), tmp_path, "a", "b", max_adapters=3)
    stop, wrong = threading.Event(), []

    def serve() -> None:
        while not stop.is_set():
            with contextlib.suppress(ValueError):  # c is not loaded at the moment
                route = tenants.server.route(["a", "c", "b"])
                with route:
                    y = tenants.model(X.expand(3, 8))
                found = [tenants.whose(row[None], X) for row in y]
                if found != ["a", "c", "b"]:
                    wrong.append(found)

    tenants.load("c")
    threads = [threading.Thread(target=serve) for _ in range(2)]
    with torch.no_grad():
        for thread in threads:
            thread.start()
        for _ in range(30):
            tenants.server.unload("c")
            for _ in range(100):
                with contextlib.suppress(ValueError):  # full, while a forward holds it
                    tenants.server.load("c", tmp_path / "c")
                    break
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_failed_load_uses_up_no_number(tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(peftk.CheckpointError):
        tenants.server.load("x", tenants.folder / "nowhere")
    assert tenants.server.names == ["a", "b"]
    tenants.load("c")
    assert tenants.server.ids(["c"]).tolist() == [2]


# ---------------------------------------------------------------------------------------------------------------------
# A route applies to what runs inside it, and nothing else


def in_thread(call: Callable[[], Any]) -> Any:
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


class Worker(threading.Thread):
    """A subclass of Thread, as Timer is one."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__()
        self.call = call

    def run(self) -> None:
        self.found = self.call()


def in_subclass(call: Callable[[], Any]) -> Any:
    worker = Worker(call)
    worker.start()
    worker.join()
    return worker.found


def in_executor(call: Callable[[], Any]) -> Any:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def in_map(call: Callable[[], Any]) -> Any:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return next(pool.map(lambda _: call(), [0]))


def in_thread_pool(method: str, call: Callable[[], Any]) -> Any:
    with multiprocessing.pool.ThreadPool(1) as pool:
        if method in ("apply", "apply_async"):
            found = getattr(pool, method)(call)
        else:
            items = [(0,)] if "star" in method else [0]
            found = getattr(pool, method)(lambda _: call(), items)
        found = found.get() if "async" in method else found
        return found if method.startswith("apply") else next(iter(found))


def in_to_thread(call: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.to_thread(call))


def in_run_in_executor(call: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, call)

    return asyncio.run(main())


def in_task(call: Callable[[], Any]) -> Any:
    async def one() -> Any:
        return call()

    async def main() -> Any:
        return (await asyncio.gather(asyncio.create_task(one()), one()))[0]

    return asyncio.run(main())


def in_copied_context(call: Callable[[], Any]) -> Any:
    context = contextvars.copy_context()
    return in_outside_thread(lambda: context.run(call))


def in_outside_thread(call: Callable[[], Any]) -> Any:
    """Calls in a thread that was started before, and works on a queue."""
    todo: queue.Queue[Any] = queue.Queue()
    QUEUES.put((call, todo))
    return todo.get()


QUEUES: queue.Queue[Any] = queue.Queue()


def serve_queue() -> None:
    while True:
        call, answer = QUEUES.get()
        answer.put(call())


threading.Thread(target=serve_queue, daemon=True).start()

POOL_METHODS = ("apply", "apply_async", "map", "map_async", "starmap", "starmap_async", "imap", "imap_unordered")
ELSEWHERE = {
    "thread": in_thread,
    "subclass": in_subclass,
    "executor": in_executor,
    "executor.map": in_map,
    **{f"ThreadPool.{method}": functools.partial(in_thread_pool, method) for method in POOL_METHODS},
    "to_thread": in_to_thread,
    "run_in_executor": in_run_in_executor,
    "task": in_task,
    "thread in thread": lambda call: in_thread(lambda: in_thread(call)),
    "executor in thread": lambda call: in_thread(lambda: in_executor(call)),
    "copied context": in_copied_context,
    "carried": lambda call: in_outside_thread(peftk.carry_route(call)),
    "partial": lambda call: in_outside_thread(peftk.carry_route(functools.partial(call))),
}
elsewhere = pytest.mark.parametrize("run", ELSEWHERE.values(), ids=ELSEWHERE.keys())


@elsewhere
def test_a_route_reaches(tenants: Tenants, run: Callable[..., Any]) -> None:
    call = functools.partial(tenants.answers, X)
    assert run(call) is None
    with tenants.server.route(["a"]):
        assert run(call) == "a"
        with tenants.server.route(["b"]):
            assert run(call) == "b"
        assert run(call) == "a"
    assert run(call) is None


@elsewhere
def test_the_route_of_a_generator_reaches(tenants: Tenants, run: Callable[..., Any]) -> None:
    call = functools.partial(tenants.answers, X)

    def stream(name: str) -> Iterator[Any]:
        with tenants.server.route([name]):
            for _ in range(2):
                yield run(call)

    one, two = stream("a"), stream("b")
    found = [next(one), run(call), next(two), next(one), run(call), next(two)]
    assert found == ["a", None, "b", "a", None, "b"]
    with tenants.server.route(["b"]):
        found = [next(stream("a")), run(call)]
    assert found == ["a", "b"]


def test_a_thread_keeps_its_route_after_the_with_of_its_starter_has_ended(tenants: Tenants) -> None:
    """As when generate() runs in a thread while its tokens are streamed."""
    go, found = threading.Event(), []

    def work() -> None:
        go.wait()
        found.append(tenants.answers(X))

    with tenants.server.route(["a"]):
        thread = threading.Thread(target=work)
        thread.start()
    tenants.server.unload("a")
    tenants.load("c")
    assert tenants.answers(X) is None
    go.set()
    thread.join()
    assert found == ["a"]
    tenants.load("d")
    assert tenants.server.ids(["d"]).tolist() == [3]


@pytest.mark.parametrize("kind", ["executor", "pool"])
def test_a_pools_threads_keep_no_route(tenants: Tenants, kind: str) -> None:
    """They are started by the first submission, and work for all callers."""
    call = functools.partial(tenants.answers, X)
    with tenants.server.route(["a"]):
        pool: Any = (
            concurrent.futures.ThreadPoolExecutor(1) if kind == "executor" else multiprocessing.pool.ThreadPool(1)
        )
        hand_in = pool.submit if kind == "executor" else pool.apply_async
        first = hand_in(call)
    with tenants.server.route(["b"]):
        second = hand_in(call)
    third = hand_in(call)
    found = [future.result() if kind == "executor" else future.get() for future in (first, second, third)]
    assert found == ["a", "b", None]
    del first, second, third
    tenants.server.unload("a")
    assert [n for n in tenants.server._slots.numbers if n != -1] == [1]
    pool.shutdown() if kind == "executor" else pool.terminate()


def test_what_is_carried_from_outside_is_outside(tenants: Tenants) -> None:
    call = peftk.carry_route(functools.partial(tenants.answers, X))
    with tenants.server.route(["a"]):
        assert call() is None
        assert in_thread(call) is None
        assert tenants.answers(X) == "a"


def test_generators_and_coroutines_are_carried(tenants: Tenants) -> None:
    def stream() -> Iterator[str | None]:
        yield tenants.answers(X)
        yield tenants.answers(X)

    async def one() -> str | None:
        await asyncio.sleep(0)
        return tenants.answers(X)

    async def each() -> AsyncIterator[str | None]:
        yield tenants.answers(X)
        await asyncio.sleep(0)
        yield tenants.answers(X)

    async def all_of(items: Any) -> list[str | None]:
        return [item async for item in items]

    for wrap in (peftk.carry_route, None):
        with tenants.server.route(["a"]):
            wrapped = [(wrap or tenants.server.route(["a"]))(function) for function in (stream, one, each)]
        assert list(wrapped[0]()) == ["a", "a"]
        first = wrapped[0]()
        assert [next(first), tenants.answers(X), next(first)] == ["a", None, "a"]
        assert asyncio.run(wrapped[1]()) == "a"
        assert asyncio.run(all_of(wrapped[2]())) == ["a", "a"]
    with pytest.raises(TypeError, match="function: expected a callable, got int"):
        peftk.carry_route(3)  # type: ignore[type-var]


def test_a_route_is_a_decorator(tenants: Tenants) -> None:
    @tenants.server.route(["a"])
    def call() -> str | None:
        return tenants.answers(X)

    assert [call(), tenants.answers(X), call()] == ["a", None, "a"]
    assert call.__name__ == "call"


def test_routes_that_end_in_another_order(tenants: Tenants) -> None:
    one, two = tenants.server.route(["a"]), tenants.server.route(["b"])
    one.__enter__()
    two.__enter__()
    assert tenants.answers(X) == "b"
    one.__exit__(None, None, None)
    assert tenants.answers(X) == "b"
    two.__exit__(None, None, None)
    assert tenants.answers(X) is None
    assert carry._current.get() is None
    with one:
        assert tenants.answers(X) == "a"
        with pytest.raises(RuntimeError, match="expected a new one for each `with`"):
            one.__enter__()


def test_a_route_entered_by_a_user_defined_manager_applies_to_the_with_that_uses_it(tenants: Tenants) -> None:
    @contextlib.contextmanager
    def tenant(name: str) -> Iterator[None]:
        with tenants.server.route([name]):
            yield

    class Tenant:
        def __init__(self, name: str) -> None:
            self.route = tenants.server.route([name])

        def __enter__(self) -> None:
            self.route.__enter__()

        def __exit__(self, *error: object) -> None:
            self.route.__exit__(*error)

    def stack(name: str) -> contextlib.ExitStack:
        made = contextlib.ExitStack()
        made.enter_context(tenant(name))
        return made

    @contextlib.contextmanager
    def nested(name: str) -> Iterator[None]:
        with tenant("b"), Tenant(name):
            yield

    def stream(manager: Any) -> Iterator[str | None]:
        with manager:
            for _ in range(2):
                yield tenants.answers(X)

    for manager in (tenant, Tenant, stack, nested):
        with manager("a"):
            assert tenants.answers(X) == "a"
            with manager("b"):
                assert tenants.answers(X) == "b"
            assert tenants.answers(X) == "a"
        assert tenants.answers(X) is None
        if manager is stack:  # enters the route before the generator runs
            continue
        one, two = stream(manager("a")), stream(manager("b"))
        found = [next(one), tenants.answers(X), next(two), next(one), tenants.answers(X), next(two)]
        assert found == ["a", None, "b", "a", None, "b"]
        del one, two
        assert tenants.answers(X) is None
    assert not carry._generator_routes


@pytest.fixture
def routed(tenants: Tenants) -> Iterator[Tenants]:
    with tenants.server.route(["a"]):
        yield tenants


def test_a_route_in_a_fixture_that_yields_applies_to_the_test(routed: Tenants) -> None:
    assert routed.answers(X) == "a"


def test_a_generator_within_a_generator(tenants: Tenants) -> None:
    def inner() -> Iterator[str | None]:
        yield tenants.answers(X)
        with tenants.server.route(["b"]):
            yield tenants.answers(X)
        yield tenants.answers(X)

    def outer() -> Iterator[str | None]:
        with tenants.server.route(["a"]):
            yield from inner()
            yield tenants.answers(X)

    assert list(outer()) == ["a", "b", "a", "a"]
    assert list(inner()) == [None, "b", None]


def test_a_function_in_a_generator_enters_a_route_of_its_own(tenants: Tenants) -> None:
    def helper() -> list[str | None]:
        with tenants.server.route(["b"]):
            found = [tenants.answers(X), in_thread(lambda: tenants.answers(X))]
        return [*found, tenants.answers(X)]

    def stream() -> Iterator[list[str | None]]:
        with tenants.server.route(["a"]):
            yield helper()
            yield helper()

    with tenants.server.route([None]):
        assert list(stream()) == [["b", "b", "a"]] * 2


def test_generators_may_be_stepped_in_any_context(tenants: Tenants) -> None:
    """A web server runs every step in another thread, in a copy of the request's context."""

    def stream(name: str) -> Iterator[str | None]:
        with tenants.server.route([name]):
            for _ in range(3):
                yield tenants.answers(X)

    one, two = stream("a"), stream("b")
    context = contextvars.copy_context()
    found = [in_thread(functools.partial(context.copy().run, next, each)) for each in (one, two, one, two)]
    assert found == ["a", "b", "a", "b"]
    assert tenants.answers(X) is None
    in_outside_thread(one.close)
    with tenants.server.route(["b"]):
        assert [next(two), tenants.answers(X)] == ["b", "b"]
    del two
    gc.collect()
    assert not carry._generator_routes


def test_asynchronous_generators_interleave(tenants: Tenants) -> None:
    def answer() -> str | None:
        return tenants.answers(X)

    async def task() -> str | None:
        await asyncio.sleep(0)
        return answer()

    async def stream(name: str) -> AsyncIterator[list[str | None]]:
        with tenants.server.route([name]):
            for _ in range(2):
                await asyncio.sleep(0)
                found = [
                    answer(),
                    await task(),
                    await asyncio.create_task(task()),
                    *await asyncio.gather(task(), task()),
                ]
                found.append(await asyncio.to_thread(answer))
                found.append(await asyncio.get_running_loop().run_in_executor(None, answer))
                yield found

    async def main() -> None:
        one, two = stream("a"), stream("b")
        for each, name in ((one, "a"), (two, "b"), (one, "a"), (two, "b")):
            assert await anext(each) == [name] * 7
            assert answer() is None
            assert await asyncio.create_task(task()) is None
            assert await asyncio.to_thread(answer) is None

    asyncio.run(main())
    gc.collect()
    assert not carry._generator_routes


def test_tasks_do_not_see_each_others_routes(tenants: Tenants) -> None:
    async def serve(name: str | None) -> bool:
        with tenants.server.route([name]):
            for _ in range(5):
                await asyncio.sleep(0)
                if tenants.answers(X) != name:
                    return False
        return tenants.answers(X) is None

    async def main() -> list[bool]:
        return await asyncio.gather(*(serve(name) for name in ("a", "b", None, "a")))

    assert all(asyncio.run(main()))


def test_a_task_keeps_the_route_in_which_it_was_created(tenants: Tenants) -> None:
    async def later() -> str | None:
        await asyncio.sleep(0)
        return tenants.answers(X)

    async def main() -> str | None:
        with tenants.server.route(["a"]):
            task = asyncio.create_task(later())
        tenants.server.unload("a")
        tenants.load("c")
        return await task

    assert asyncio.run(main()) == "a"


def test_a_route_applies_only_to_its_servers_layers(tmp_path: pathlib.Path) -> None:
    one = Tenants(two_linears(), tmp_path / "one", "a", "b")
    two = Tenants(two_linears(), tmp_path / "two", "c", "d")
    with one.server.route(["b"]):
        assert two.answers(X) is None
        with two.server.route(["c"]):
            assert (one.answers(X), two.answers(X)) == ("b", "c")
            assert in_thread(lambda: (one.answers(X), two.answers(X))) == ("b", "c")
        assert (one.answers(X), two.answers(X)) == ("b", None)
    both = nn.ModuleList([one.model, two.model])
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()

    def run(x: Tensor) -> Tensor:
        return both[1](both[0](x))

    with one.server.route(["a"]), two.server.route(["d"]):
        found = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False).square().sum()
    found.backward()
    two.alone["d"](one.alone["a"](y)).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_copies(tenants: Tenants) -> None:
    """A copy of a server has routes of its own; a copy of only its model has none, and raises."""
    copies = [copy.deepcopy(tenants.server), pickle.loads(pickle.dumps(tenants.server))]
    with tenants.server.route(["a"]):
        copies.append(copy.deepcopy(tenants.server))
    for server in copies:
        server.unload("a")
        tenants.load(name := next(name for name in "cde" if name not in tenants.alone))
        server.load("d", tenants.folder / name)
        with server.route(["b", "d"]):
            y = server.model(X.expand(2, 8))
        assert [tenants.whose(row[None], X) for row in y] == ["b", name]
        with tenants.server.route(["a"]), pytest.raises(ValueError, match="got a copy of it"):
            server.model(X)
        with server.route([None]), pytest.raises(ValueError, match="got a copy of it"):
            tenants.model(X)
    for model in (copy.deepcopy(tenants.model), pickle.loads(pickle.dumps(tenants.model))):
        assert tenants.whose(model(X), X) is None
        with tenants.server.route(["a"]), pytest.raises(ValueError, match=r"copy the server \(copy.deepcopy"):
            model(X)


def test_routes_apply_to_replicas(tenants: Tenants) -> None:
    """Replicas as DataParallel makes them, which it runs in threads."""
    replica = tenants.model._replicate_for_data_parallel()
    with tenants.server.route(["a"]):
        assert in_thread(lambda: tenants.whose(replica(X), X)) == "a"


@pytest.mark.parametrize("part", ["model", "first layer"])
def test_compiled_models_follow_the_route(tenants: Tenants, part: str) -> None:
    model: Any = copy.copy(tenants.model)
    if part == "model":
        model = torch.compile(tenants.model, backend="eager")
    else:
        tenants.model[0].compile(backend="eager")

    def stream(name: str) -> Iterator[str | None]:
        with tenants.server.route([name]):
            for _ in range(2):
                yield tenants.whose(model(X), X)

    for name in ("a", None, "b", "a"):
        with tenants.server.route([name]):
            assert tenants.whose(model(X), X) == name
    assert tenants.whose(model(X), X) is None
    one, two = stream("a"), stream("b")
    assert [next(one), next(two), next(one), next(two)] == ["a", "b", "a", "b"]
    with tenants.server.route(["a", "b"]):
        for x in (X.expand(2, 8), X.expand(2, 3, 8)):
            torch.testing.assert_close(model(x), tenants.model(x))
        with pytest.raises(ValueError, match="route: expected x"):
            model(X.expand(4, 8))
        model(X.expand(2, 3, 8))
        with pytest.raises(ValueError, match="route: expected x"):  # the model has returned: its shape counts no more
            tenants.model[0](X.expand(6, 8))


def test_the_route_of_a_compiled_model_is_found_outside_of_graphs(tenants: Tenants) -> None:
    """Graphs break where we say so, not where torch's compiler fails to trace a context variable."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model = torch.compile(tenants.model, backend="eager")
    with tenants.server.route(["a", "b"]):
        model(X.expand(2, 3, 8))
    breaks = list(counters["graph_break"])
    assert breaks
    assert all("torch.compiler.disable" in reason for reason in breaks), breaks


def test_an_interrupted_forward_leaves_nothing(tenants: Tenants) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = tenants.model[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), tenants.server.route(["a", "b"]):
        tenants.model(X.expand(2, 8))
    handle.remove()
    assert not torch.overrides._get_current_function_mode()
    assert tenants.answers(X) is None
    with tenants.server.route(["a"]):
        assert tenants.answers(X) == "a"

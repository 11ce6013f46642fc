"""Gradients: the reference against torch.autograd, every backend against the reference, within the error bounds."""

from __future__ import annotations

import pytest
import torch

import peftk
from peftk import functional
from peftk.adapters import activations, table
from peftk.adapters.adapter import Adapter, Wanted
from peftk.adapters.flat import pack, unpack
from peftk.backends import cpu
from peftk.nn import MultiLoRALinear
from peftk.ops import custom_ops
from tests.support.cases import random_case
from tests.support.gradients import check_gradients
from tests.support.tiers import spread

F64 = {"dtype": torch.float64}


def leaf(*shape: int, **kwargs: object) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True, **kwargs)


@pytest.mark.parametrize("activation", activations.CODES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck_one_adapter(activation: str, dropout_p: float) -> None:
    weight = torch.randn(5, 7, **F64)
    seed = torch.tensor([11])

    def call(x, bias, A, B, a, b):  # type: ignore[no-untyped-def]
        return functional.lora_linear(
            x, weight, bias, A, B, 0.7, activation=activation, bias_A=a, bias_B=b, dropout_p=dropout_p, seed=seed
        )

    tensors = (
        leaf(2, 3, 7, **F64),
        leaf(5, **F64),
        leaf(3, 7, **F64),
        leaf(5, 3, **F64),
        leaf(3, **F64),
        leaf(5, **F64),
    )
    assert torch.autograd.gradcheck(call, tensors)


def test_gradcheck_many_adapters() -> None:
    layer = MultiLoRALinear.from_linear(torch.nn.Linear(7, 5).double(), max_adapters=6)
    for number, r in enumerate((3, 17, 40)):
        A, B, bias = torch.randn(r, 7, **F64), torch.randn(5, r, **F64), torch.randn(5, **F64)
        layer.add_adapter(f"a{number}", A, B, 1.3, trainable=number != 1, activation="silu", bias=bias)
    layer.add_adapter("bias only", None, None, 1.0, bias=torch.randn(5, **F64), trainable=True)
    ids = torch.tensor([[0, 2, -1], [3, 1, 1]])
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert len(parameters) == 7
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, ids), (leaf(2, 3, 7, **F64), *parameters))


def test_only_the_layers_parts_that_ask_get_gradients() -> None:
    x, weight, A, B = torch.randn(4, 8), torch.randn(6, 8), leaf(2, 8), torch.randn(6, 2)
    functional.lora_linear(x, weight, None, A, B).sum().backward()
    assert A.grad is not None
    assert weight.grad is None
    assert x.grad is None
    assert B.grad is None


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("chunk", spread(range(8), default=5))
def test_random_gradients(backend: str, chunk: int) -> None:
    for number in range(chunk * 25, (chunk + 1) * 25):
        case = random_case(10_000 + number, max_rows=40, max_width=150)
        dropout_p = 0.25 if number % 4 == 0 else 0.0
        seed = torch.tensor([number * 7919]) if dropout_p else None
        dy = torch.randn(case.x.shape[0], case.weight.shape[0]).to(case.x.dtype)
        try:
            check_gradients(case, dy, backend, dropout_p, seed)
        except AssertionError as error:
            raise AssertionError(f"case {number}: dropout {dropout_p}: {case}: {error}") from error


def test_opcheck_one_adapter() -> None:
    factors, biases = (leaf(4, 7), torch.randn(5, 7), leaf(5), leaf(3, 7), leaf(5, 3)), (None, leaf(5))
    torch.library.opcheck(custom_ops.lora_linear, (*factors, 0.5, "gelu", *biases, 0.0, None, None))
    dropout = (0.25, torch.tensor([3]))
    torch.library.opcheck(custom_ops.lora_linear, (*factors, 0.5, "relu", *biases, *dropout, "reference"))
    base = (leaf(4, 7), torch.randn(5, 7), None, None, None)
    torch.library.opcheck(custom_ops.lora_linear, (*base, 1.0, "identity", None, None, 0.0, None, None))


def test_opcheck_many_adapters() -> None:
    adapters = (
        Adapter((leaf(3, 7),), (leaf(5, 3),), 0.5, "silu", leaf(3), None),
        None,
        Adapter((leaf(20, 7),), (leaf(5, 20),), 0.5),
        Adapter((), (), 1.0, "identity", None, leaf(5)),
    )
    tensors, layout, scalings = pack(adapters)
    ids = torch.tensor([0, -1, 2, 3], dtype=torch.int32)
    arguments = (leaf(4, 7), torch.randn(5, 7), leaf(5), tensors, layout, scalings, (), ids, 0.0, None, None)
    torch.library.opcheck(custom_ops.multi_lora_linear, arguments)


def test_no_output_of_a_recorded_backward_shares_memory() -> None:
    """The gradients of an adapter's pages are pieces of one tensor, but each gets its own memory."""
    pages = ((torch.randn(16, 7), torch.randn(4, 7)), (torch.randn(5, 16), torch.randn(5, 4)))
    tensors, layout, scalings = pack((Adapter(*pages, 0.5),))
    x, weight, dy, ids = torch.randn(4, 7), torch.randn(5, 7), torch.randn(4, 5), torch.zeros(4, dtype=torch.int32)
    packed = (tensors, layout, scalings, (), ids)
    _, z = custom_ops.multi_lora_linear(x, weight, None, *packed, 0.0, None, None)
    needs = [True] * (1 + len(tensors))
    grads = custom_ops.multi_lora_linear_backward(dy, x, weight, *packed, z, 0.0, None, None, needs)
    assert [grad.shape for grad in grads] == [x.shape, *(t.shape for t in tensors)]
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == len(grads)


def test_compiled_without_any_adapter() -> None:
    torch._dynamo.reset()
    weight = torch.randn(5, 7)
    none, ids = table.build((), dtype=torch.float32, device=torch.device("cpu")), torch.tensor([-1, -1])
    run = torch.compile(lambda x: functional.multi_lora_linear(x, weight, None, none, ids), backend="aot_eager")
    x, dy = leaf(2, 7), torch.randn(2, 5)
    run(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ weight)


def test_packing_keeps_every_adapter() -> None:
    adapters = (
        None,
        Adapter((torch.randn(16, 4), torch.randn(2, 4)), (torch.randn(3, 16), torch.randn(3, 2)), 2.0, "relu"),
    )
    unpacked = unpack(*pack(adapters))
    assert unpacked[0] is None
    assert unpacked[1].rank == 18
    assert unpacked[1].activation == "relu"
    assert unpacked[1].scaling == 2.0
    assert table.build(unpacked, dtype=torch.float32, device=torch.device("cpu"))


SUBSETS = [("x",), ("lora_A",), ("lora_B",), ("lora_A", "lora_B"), ("bias_A", "bias_B"), ("x", "bias_B"), ("bias",)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("needed", SUBSETS, ids="+".join)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_only_the_gradients_that_are_needed(backend: str, needed: tuple[str, ...], dropout_p: float) -> None:
    """The requested gradients equal those of a full backward; the others are not computed."""
    torch.manual_seed(0)
    M, K, N, r = 20, 24, 18, 5
    shapes = {"x": (M, K), "bias": (N,), "lora_A": (r, K), "lora_B": (N, r), "bias_A": (r,), "bias_B": (N,)}
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    weight, dy, seed = torch.randn(N, K), torch.randn(M, N), torch.tensor([5])

    def gradients(names: tuple[str, ...]) -> list[torch.Tensor | None]:
        leaves = {name: value.clone().requires_grad_(name in names) for name, value in values.items()}
        y = peftk.functional.lora_linear(
            weight=weight, activation="silu", scaling=0.5, dropout_p=dropout_p, seed=seed, backend=backend, **leaves
        )
        y.backward(dy)
        assert all(leaf.grad is None for name, leaf in leaves.items() if name not in names)
        return [leaves[name].grad for name in needed]

    for got, wanted in zip(gradients(needed), gradients(tuple(shapes)), strict=True):
        assert torch.equal(got, wanted)


def test_a_first_layer_computes_no_gradient_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    backward = cpu.lora_linear_backward

    def spy(*args: object, **kwargs: object) -> object:
        calls.append((kwargs["need_dx"], kwargs["wanted"]))
        return backward(*args, **kwargs)

    monkeypatch.setattr(cpu, "lora_linear_backward", spy)
    layer = peftk.LoRALinear.from_linear(torch.nn.Linear(8, 8), r=2)
    layer.lora_A.requires_grad_(False)
    layer(torch.randn(3, 8)).sum().backward()
    assert calls == [(False, Wanted(False, True, False, False))]


@pytest.mark.parametrize("compiles", [False, True])
def test_a_batch_with_served_and_trained_adapters_needs_the_trained_ones(compiles: bool) -> None:
    torch._dynamo.reset()
    layer = peftk.MultiLoRALinear.from_linear(torch.nn.Linear(12, 10), max_adapters=3)
    layer.add_adapter("served", torch.randn(4, 12), torch.randn(10, 4))
    layer.add_adapter("trained", torch.randn(20, 12), torch.randn(10, 20), trainable=True, bias=torch.randn(10))
    ids, x, dy = torch.tensor([0, 1, -1, 1]), torch.randn(4, 12), torch.randn(4, 10)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiles else layer
    run(x, ids).backward(dy)
    A, B, beta = layer.trained.slot1.lora_A, layer.trained.slot1.lora_B, layer.trained.slot1.bias_B
    rows = ids == 1
    torch.testing.assert_close(A.grad, (dy[rows] @ B.detach()).t() @ x[rows])
    torch.testing.assert_close(B.grad, dy[rows].t() @ (x[rows] @ A.detach().t()))
    torch.testing.assert_close(beta.grad, dy[rows].sum(0))


# Adapters that change between the forward and the backward


def one_and_many() -> list[tuple[str, torch.nn.Module, tuple[torch.Tensor, ...]]]:
    """A LoRALinear, a MultiLoRALinear with adapters that train, and one with adapters that do not: name, layer, ids."""
    lora = peftk.LoRALinear.from_linear(torch.nn.Linear(8, 6), r=3)
    torch.nn.init.normal_(lora.lora_B)
    ids = torch.tensor([0, 1, -1, 0])
    layers = []
    for trainable in (True, False):
        layer = MultiLoRALinear.from_linear(torch.nn.Linear(8, 6), max_adapters=4)
        for name in ("a", "b", "c"):
            layer.add_adapter(name, torch.randn(3, 8), torch.randn(6, 3), trainable=trainable)
        layers.append(layer)
    return [("one", lora, ()), ("trained", layers[0], (ids,)), ("served", layers[1], (ids,))]


def adapter_of(layer: torch.nn.Module, number: int = 0) -> Adapter:
    if isinstance(layer, MultiLoRALinear):
        return layer.bank.adapters[number]
    return Adapter((layer.lora_A,), (layer.lora_B,), layer.scaling)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("which", ["pages_A", "pages_B"])
def test_an_adapter_changed_in_place_before_the_backward_is_noticed(which: str, compiles: bool) -> None:
    """By every Function, through the saved version counter. x needs a gradient, as behind another layer."""
    for _, layer, rest in one_and_many():
        torch._dynamo.reset()
        run = torch.compile(layer, backend="aot_eager") if compiles else layer
        y = run(torch.randn(4, 8, requires_grad=True), *rest)
        with torch.no_grad():
            getattr(adapter_of(layer), which)[0].mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("which", ["pages_A", "pages_B"])
def test_an_adapter_changed_behind_an_input_without_a_gradient_is_noticed(which: str) -> None:
    for _, layer, rest in one_and_many()[:2]:
        y = layer(torch.randn(4, 8), *rest)
        with torch.no_grad():
            getattr(adapter_of(layer), which)[0].mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_other_pages_of_the_pool_may_change() -> None:
    """Adapters may be added and removed between a forward and its backward."""
    _, layer, (ids,) = one_and_many()[2]
    x, dy = torch.randn(4, 8, requires_grad=True), torch.randn(4, 6)
    layer(x, ids).backward(dy)
    expected, x.grad = x.grad, None
    y = layer(x, ids)
    layer.remove_adapter("c")
    layer.add_adapter("d", torch.randn(3, 8), torch.randn(6, 3))
    layer.add_adapter("e", torch.randn(40, 8), torch.randn(6, 40))
    y.backward(dy)
    assert torch.equal(x.grad, expected)


def test_biases_may_change_before_the_backward() -> None:
    """No gradient reads a bias, as with nn.Linear."""
    layer = peftk.nn.ParallelAdapterLinear.from_linear(torch.nn.Linear(8, 6), bottleneck=3)
    y = layer(torch.randn(4, 8, requires_grad=True))
    with torch.no_grad():
        for bias in (layer.bias, layer.bias_A, layer.bias_B):
            bias.add_(1.0)
    y.sum().backward()


def test_parameters_may_come_back_to_other_memory_before_the_backward() -> None:
    """As offloading does: the table has the addresses of the forward, and the old memory has been reused since."""
    for name, layer, rest in one_and_many()[:2]:
        x, dy = torch.randn(4, 8, requires_grad=True), torch.randn(4, 6)
        trained = [p for p in layer.parameters() if p.requires_grad]
        layer(x, *rest).backward(dy)
        expected = [x.grad.clone(), *(p.grad if p.grad is None else p.grad.clone() for p in trained)]
        x.grad = None
        layer.zero_grad()
        y = layer(x, *rest)
        for p in trained:
            old, p.data = p.data, p.data.clone()
            old.fill_(float("nan"))
        y.backward(dy)
        for got, wanted in zip([x.grad, *(p.grad for p in trained)], expected, strict=True):
            assert (got is None) == (wanted is None), name
            assert got is None or torch.equal(got, wanted), name


@pytest.mark.parametrize("ranks", [2, 5, 20])
def test_another_rank_before_the_backward_is_refused(ranks: int) -> None:
    """Kernels read z [M, R] of the forward: with a different R they would read past its end."""
    for _, layer, rest in one_and_many()[:2]:
        y = layer(torch.randn(4, 8, requires_grad=True), *rest)
        adapter = adapter_of(layer)
        adapter.pages_A[0].data, adapter.pages_B[0].data = torch.randn(ranks, 8), torch.randn(6, ranks)
        with pytest.raises(RuntimeError, match=r"expected .* in the forward|invalid gradient"):
            y.sum().backward()

"""What a compiled model runs where nothing needs a gradient: ops that go to a kernel as directly as eager calls do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftk
from peftk.nn import MultiLoRALinear
from peftk.ops import custom_ops, dispatch

WITHOUT_GRADIENTS = ("lora_linear_forward", "bank_lora_linear", "slots_of")


@pytest.fixture(autouse=True)
def _forget_other_graphs() -> None:
    torch._dynamo.reset()


def adapted(rank: int = 3) -> peftk.LoRALinear:
    layer = peftk.LoRALinear.from_linear(nn.Linear(8, 6), r=rank, lora_alpha=4)
    nn.init.normal_(layer.lora_B)
    return layer


def ops_of(call: Callable[..., Any], *inputs: Tensor) -> list[Any]:
    """The ops of the graph that torch.compile makes of a call."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compile(call, fullgraph=True, backend=keep)(*inputs)
    [graph] = graphs
    return [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_computes_y_alone(mode: Any) -> None:
    layer, x = adapted(), torch.randn(4, 8)
    with mode():
        assert ops_of(layer, x) == [custom_ops.lora_linear_forward]
    assert ops_of(layer, x) == [torch.ops.peftk.lora_linear.default]
    frozen = adapted().requires_grad_(False)
    assert ops_of(frozen, x) == [custom_ops.lora_linear_forward]
    assert ops_of(frozen, torch.randn(4, 8, requires_grad=True)) == [torch.ops.peftk.lora_linear.default]


def test_a_graph_for_inference_is_not_used_in_training() -> None:
    layer, x = adapted().requires_grad_(False), torch.randn(4, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    layer.lora_A.requires_grad_()
    expected = torch.autograd.grad(layer(x).sum(), layer.lora_A)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), layer.lora_A), expected)


def test_an_exported_program_can_still_be_trained() -> None:
    layer, x = adapted(), torch.randn(4, 8)
    with torch.no_grad():
        program = torch.export.export(layer, (x,)).module()
    program(x).sum().backward()
    assert program.lora_A.grad.abs().max() > 0


@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
def test_these_ops_have_no_python_function_for_autograd(name: str) -> None:
    """It would cost more than a small layer, in every call."""
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"peftk::{name}", "Autograd")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("peftk::lora_linear", "Autograd")


def test_the_direct_way_to_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = adapted(), torch.randn(4, 8)
    many = MultiLoRALinear.from_linear(nn.Linear(8, 6), max_adapters=2)
    many.add_adapter("a", torch.randn(3, 8), torch.randn(6, 3))
    ids = torch.tensor([0, -1, 0, 0])
    calls: tuple[tuple[Any, ...], ...] = ((layer, x), (many, x, ids))
    for call, *inputs in calls:
        with torch.no_grad():
            expected = call(*inputs)
        with monkeypatch.context() as patch, torch.no_grad():
            for other in ("lora_linear", "multi_lora_linear"):
                patch.delattr(dispatch, other)  # the ordinary way
            assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), expected)


def test_what_the_direct_way_does_not_take() -> None:
    factors = (torch.randn(4, 8), torch.randn(6, 8), torch.randn(6), torch.randn(3, 8), torch.randn(6, 3))
    seed = torch.tensor([5])
    for p_and_seed, backend in (((0.5, seed), None), ((0.0, None), "reference"), ((0.5, seed), "reference")):
        arguments = (*factors, 2.0, "identity", None, None, *p_and_seed, backend)
        expected, _ = custom_ops.lora_linear(*arguments)
        torch.testing.assert_close(custom_ops.lora_linear_forward(*arguments), expected)
    x64 = [tensor.double() for tensor in factors]
    arguments = (*x64, 2.0, "gelu", torch.randn(3).double(), torch.randn(6).double(), 0.0, None, None)
    torch.testing.assert_close(custom_ops.lora_linear_forward(*arguments), custom_ops.lora_linear(*arguments)[0])


def test_dropout_without_gradients() -> None:
    """In training mode under no_grad, as for a validation loss by mistake or on purpose."""
    layer = peftk.LoRALinear.from_linear(nn.Linear(8, 6), r=3, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 8)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert not torch.equal(compiled(x), compiled(x))
        layer.eval()
        assert torch.equal(compiled(x), layer(x))


def test_opcheck() -> None:
    factors = (torch.randn(4, 8), torch.randn(6, 8), torch.randn(6), torch.randn(3, 8), torch.randn(6, 3))
    biases, dropout = (torch.randn(3), torch.randn(6)), (0.25, torch.tensor([3]))
    torch.library.opcheck(custom_ops.lora_linear_forward, (*factors, 0.5, "gelu", *biases, 0.0, None, None))
    torch.library.opcheck(custom_ops.lora_linear_forward, (*factors, 0.5, "gelu", *biases, *dropout, None))
    block = (torch.randn(2, 4, 8), None, None, torch.randn(3, 8), torch.randn(8, 3))
    torch.library.opcheck(custom_ops.lora_linear_forward, (*block, 0.5, "relu", None, None, 0.0, None, None))

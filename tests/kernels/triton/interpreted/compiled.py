"""Autograd and torch.compile with the Triton backend in the interpreter, and the number of launches."""

from __future__ import annotations

import collections
import copy
import itertools
import pathlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import peftk
from peftk import functional
from peftk.adapters.flat import pack
from peftk.ops import custom_ops, dispatch
from peftk.tools.selftest import launches
from peftk.tools.selftest.work import Work, build_case
from tests.support.served_model import two_adapters
from tests.support.tiers import spread

RANKS = [1, 8, 17]
ONE, WGRAD, SORT = "lora_linear_kernel", "wgrad_kernel", "segments_kernel"


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTK_BACKEND", "triton")
    torch._dynamo.reset()


def counted(run: Callable[[], object]) -> dict[str, int]:
    return dict(collections.Counter(launches.interpreted_kernels(run)))


def make_work(ranks: tuple[int | None, ...], many: bool, dropout_p: float = 0.0, need_dx: bool = True) -> Work:
    case = build_case((19, 37, 24), ranks, torch.float32, "cpu", many=many, activation="gelu", biases=True)
    return Work(case, "triton", dropout_p=dropout_p, need_dx=need_dx)


@pytest.mark.parametrize(
    ("many", "rank", "dropout_p"),
    spread([(m, *rd) for m in (True, False) for rd in ((17, 0.25), (8, 0.0), (1, 0.0))], default=2),
)
def test_compiled_and_eager_give_the_same_bits(many: bool, rank: int, dropout_p: float) -> None:
    """The custom op saves z [M, R], the eager call a view of [M, z_width]."""
    given = make_work((rank, 3, None) if many else (rank,), many, dropout_p)
    case = given.case
    tensors, layout, scalings = pack(case.adapters)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x: Tensor, tensors: list[Tensor]) -> Tensor:
        rest = (dropout_p, given.seed, "triton")
        if case.ids is not None:
            args = (x, case.weight, case.bias, tensors, layout, scalings, [], case.ids, *rest)
            return custom_ops.multi_lora_linear(*args)[0]
        A, B, a, b = tensors
        return functional.lora_linear(
            x, case.weight, case.bias, A, B, scalings[0],
            activation="gelu", bias_A=a, bias_B=b, dropout_p=dropout_p, seed=given.seed,
        )  # fmt: skip

    eager = given.run()
    y = call(case.x, tensors)
    found = [y.detach(), *torch.autograd.grad(y, given.leaves, given.dy)]
    for name, one, other in zip(given.names(), found, eager, strict=True):
        assert torch.equal(one, other), name
    given.error(found)


@pytest.mark.parametrize("rank", RANKS)
def test_z_may_be_a_view_or_not(rank: int) -> None:
    given = make_work((rank,), False)
    case, adapter = given.case, given.case.adapters[0]
    assert adapter is not None
    with torch.no_grad():
        _, z = dispatch.lora_linear(case.x, case.weight, case.bias, adapter, backend="triton", save_z=True)
        assert z is not None
        assert z.shape == (19, rank)
        assert z.stride(0) == (16 if rank <= 16 else 32)
        dx, grads = dispatch.lora_linear_backward(given.dy, case.x, case.weight, adapter, z, backend="triton")
        for other in (z.contiguous(), torch.cat([z, z], 1)[:, :rank]):
            dx_too, grads_too = dispatch.lora_linear_backward(
                given.dy, case.x, case.weight, adapter, other, backend="triton"
            )
            assert torch.equal(dx, dx_too)
            assert all(torch.equal(one, too) for one, too in zip(grads, grads_too, strict=True))


@pytest.mark.full
@pytest.mark.parametrize("many", [False, True])
def test_inductor(many: bool) -> None:
    """With inductor, the default compiler."""
    layer, *inputs = tiny(many)
    y = torch.compile(layer, fullgraph=True)(*inputs)
    assert torch.equal(y, layer(*inputs))


def tiny(many: bool) -> tuple[nn.Module, Tensor] | tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 20), torch.randn(2, 5, 24)
    if not many:
        return peftk.LoRALinear.from_linear(linear, r=3), x
    layer = peftk.MultiLoRALinear.from_linear(linear, max_adapters=4)
    layer.add_adapter("served", torch.randn(17, 24), torch.randn(20, 17))
    layer.add_adapter("trained", torch.randn(3, 24), torch.randn(20, 3), trainable=True)
    return layer, x, torch.tensor([1, 0])


@pytest.mark.parametrize(("need_dx", "many"), spread(itertools.product((True, False), (True, False)), default=2))
def test_one_launch_forward_and_two_backward(need_dx: bool, many: bool) -> None:
    """ids without a route are sorted in each call."""
    given = make_work((17, 1, 0, None) if many else (17,), many, need_dx=need_dx)
    sort = {SORT: 1} if many else {}
    assert counted(given.forward) == {ONE: 1, **sort}
    y = given.forward()
    backward = lambda: torch.autograd.grad(y, given.leaves, given.dy)  # noqa: E731
    assert counted(backward) == {ONE: 1, WGRAD: 1, **sort}


def test_the_base_layer_alone_is_one_launch() -> None:
    given = make_work((None,), False)
    assert counted(given.forward) == {ONE: 1}
    y = given.forward()
    assert counted(lambda: torch.autograd.grad(y, given.leaves, given.dy)) == {ONE: 1}


def test_a_bias_alone() -> None:
    given = make_work((0,), False)
    assert counted(given.forward) == {ONE: 1}
    y = given.forward()
    assert counted(lambda: torch.autograd.grad(y, given.leaves, given.dy)) == {ONE: 1, WGRAD: 1}


def test_nothing_is_launched_for_what_is_not_needed() -> None:
    given = make_work((0,), False, need_dx=False)
    y = given.forward()
    assert counted(lambda: torch.autograd.grad(y, given.leaves, given.dy)) == {WGRAD: 1}
    assert counted(lambda: make_work((17,), True).forward().detach()) == {ONE: 1, SORT: 1}


def train_copy(backend: str, model: nn.Module, step: Callable[[nn.Module], Tensor], steps: int = 3) -> nn.Module:
    """A copy of the model after some steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTK_BACKEND", backend)
        model = copy.deepcopy(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            step(model).backward()
            optimizer.step()
    return model


def assert_same_training(model: nn.Module, step: Callable[[nn.Module], Tensor]) -> None:
    ours, theirs = (train_copy(backend, model, step) for backend in ("triton", "reference"))
    for (name, one), other, before in zip(
        ours.named_parameters(), theirs.parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert torch.equal(one, before) != one.requires_grad, name


def test_training_a_model_of_lora_layers() -> None:
    """Two layers: 2 launches forward, 4 backward, whatever the step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8))
    peftk.inject(model, peftk.LoraConfig(r=3, lora_dropout=0.1))
    for _, layer in peftk.methods.inject.lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(2, 9, 24)

    def step(model: nn.Module) -> Tensor:
        torch.manual_seed(1)  # of dropout
        return model(x).square().mean()

    assert_same_training(model, step)
    assert counted(lambda: step(model).backward()) == {ONE: 4, WGRAD: 2}


def test_training_a_layer_of_many_adapters() -> None:
    """Several of one batch are trained, one is served, one is not in the batch."""
    torch.manual_seed(0)
    layer = peftk.MultiLoRALinear.from_linear(nn.Linear(24, 20), max_adapters=5)
    layer.add_adapter("served", torch.randn(17, 24), torch.randn(20, 17))
    for r in (1, 8, 19):
        layer.add_adapter(
            f"r{r}", torch.randn(r, 24) * 0.2, torch.randn(20, r) * 0.2, trainable=True, activation="silu"
        )
    x, ids = torch.randn(3, 7, 24), torch.tensor([layer.adapter_id("r8"), -1, layer.adapter_id("served")])
    per_token = ids[:, None].expand(3, 7).clone()
    per_token[0, 3:] = layer.adapter_id("r19")

    def step(layer: nn.Module) -> Tensor:
        return layer(x, per_token).square().mean()

    ours, theirs = (train_copy(backend, layer, step) for backend in ("triton", "reference"))
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert not torch.equal(ours.trained.slot3.lora_A, layer.trained.slot3.lora_A)
    assert torch.equal(ours.trained.slot1.lora_A, layer.trained.slot1.lora_A)  # rank 1: no row
    assert counted(lambda: step(layer).backward()) == {ONE: 2, WGRAD: 1, SORT: 2}


def test_training_through_a_model_that_serves_many(tmp_path: pathlib.Path) -> None:
    """Only layers before the adapted ones are trained, so the backward computes dX and nothing else."""
    model, server = two_adapters(tmp_path)
    served = len(server._layers)
    prompt = torch.randn(3, 16, requires_grad=True)

    def step(backend: str) -> tuple[Tensor, Tensor]:
        with pytest.MonkeyPatch.context() as patch, server.route(["bob", None, "alice"]):
            patch.setenv("PEFTK_BACKEND", backend)
            y = model(prompt)
            return y.detach(), *torch.autograd.grad(y.square().sum(), prompt)

    for one, other in zip(step("triton"), step("reference"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    found = counted(lambda: step("triton"))
    assert served > 1
    assert found[SORT] == 1  # once for all layers, forward and backward
    assert found[ONE] == sum(isinstance(m, (peftk.MultiLoRALinear, peftk.LoRALinear)) for m in model.modules()) * 2
    assert WGRAD not in found

"""Forward-mode AD, torch.func transforms, vmap and second derivatives of every layer: correct, or an error."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

import peftk
from peftk.nn import BitFitLinear, LlamaAdapter, ParallelAdapter, ParallelAdapterLinear, SeriesAdapter
from peftk.nn.llama_adapter import Projections
from tests.support.tiers import spread

K = 6
WIDE = torch.float64


class Many(nn.Module):
    """A layer with two adapters, one of which trains, on three rows: one per adapter, and one for the base layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = peftk.MultiLoRALinear.from_linear(nn.Linear(K, K, dtype=WIDE), max_adapters=4)
        for name in ("one", "two"):
            A, B = torch.randn(2, K, dtype=WIDE), torch.randn(K, 2, dtype=WIDE)
            self.layer.add_adapter(name, A, B, 0.5, trainable=name == "two", activation="silu", bias=B[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, torch.tensor([1, 0, -1]))


class Prompted(nn.Module):
    """The LLaMA-Adapter module alone, for queries [3, K] of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = LlamaAdapter(K, 1, Projections("q", "k", "v", "o"), adapter_len=2, dtype=WIDE)

    def forward(self, x: Tensor) -> Tensor:
        prompt = self.adapter.prompt[None]
        return self.adapter(x[None, None], prompt, prompt, 0.5)[0, 0]


def accelerated() -> nn.Module:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["0"], lora_bias=True)
    return peftk.accelerate(peft.get_peft_model(nn.Sequential(nn.Linear(K, K)), config).double())


def merged() -> nn.Module:
    layer = peftk.LoRALinear.from_linear(nn.Linear(K, K, dtype=WIDE), r=2)
    layer.merge()
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lora": lambda: peftk.LoRALinear.from_linear(nn.Linear(K, K, dtype=WIDE), r=2, lora_bias=True),
    "merged": merged,
    "bitfit": lambda: BitFitLinear.from_linear(nn.Linear(K, K, dtype=WIDE)),
    "series": lambda: SeriesAdapter(K, 2, activation="gelu", dtype=WIDE),
    "parallel": lambda: ParallelAdapter(K, 2, activation="silu", dtype=WIDE),
    "parallel linear": lambda: ParallelAdapterLinear.from_linear(nn.Linear(K, K, dtype=WIDE), bottleneck=2),
    "many": Many,
    "llama": Prompted,
    "accelerated": accelerated,
}


DERIVED = [name for name in LAYERS if name != "llama"]  # torch has no forward derivative of its attention


def layer(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = LAYERS[name]()
    for parameter in made.parameters():
        nn.init.normal_(parameter.data, std=0.5)
    return made


def direction() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(3, K, dtype=WIDE, generator=draw), torch.randn(3, K, dtype=WIDE, generator=draw)


def along(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    """The derivative of f at x along t, by central differences."""
    with torch.no_grad():
        return (f(x + 1e-6 * t) - f(x - 1e-6 * t)) / 2e-6


def by_dual(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent


def by_dual_in_no_grad(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor | None:
    with torch.no_grad():
        return by_dual(f, x, t)


def by_dual_under_a_mode(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor | None:
    with FlopCounterMode(display=False):
        return by_dual(f, x, t)


def contracted(jacobian: Tensor, t: Tensor) -> Tensor:
    return torch.einsum("ijkl,kl->ij", jacobian, t)


def by_functional(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor, **kwargs: object) -> Tensor:
    return contracted(torch.autograd.functional.jacobian(f, x, **kwargs), t)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor | None]] = {
    "dual": by_dual,
    "dual in no_grad": by_dual_in_no_grad,
    "dual under a mode": by_dual_under_a_mode,
    "jvp": lambda f, x, t: jvp(f, (x,), (t,))[1],
    "jacfwd": lambda f, x, t: contracted(jacfwd(f)(x), t),
    "jacrev": lambda f, x, t: contracted(jacrev(f)(x), t),
    "linearize": lambda f, x, t: linearize(f, x)[1](t),
    "functional.jacobian": by_functional,
    "vectorized": lambda f, x, t: by_functional(f, x, t, vectorize=True),
    "vectorized forwards": lambda f, x, t: by_functional(f, x, t, vectorize=True, strategy="forward-mode"),
    "vmap of jvp": lambda f, x, t: vmap(lambda one: jvp(f, (x,), (one,))[1])(torch.stack([t, -t]))[0],
}


@pytest.mark.parametrize("name", DERIVED)
@pytest.mark.parametrize("frozen", [False, True])
def test_derivatives_in_the_input(name, frozen):
    module = layer(name).requires_grad_(False) if frozen else layer(name)
    x, t = direction()
    expected = along(module, x, t)
    for transform, derivative in TRANSFORMS.items():
        if name == "accelerated" and transform == "linearize":
            continue  # PEFT's code branches on values
        got = derivative(module, x, t)
        assert got is not None, transform
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6, msg=lambda text, of=transform: f"{of}: {text}")


@pytest.mark.parametrize("name", DERIVED)
def test_gradients_and_maps(name):
    module = layer(name)
    x, t = direction()
    y, pull = vjp(module, x)
    torch.testing.assert_close(y, module(x))
    torch.testing.assert_close((pull(t)[0] * t).sum(), (along(module, x, t) * t).sum(), atol=1e-6, rtol=1e-6)
    both = torch.stack([x, x + t])
    torch.testing.assert_close(vmap(module)(both), torch.stack([module(one) for one in both]))
    second = hessian(lambda one: module(one).square().sum())(x)
    first = grad(lambda one: module(one).square().sum())
    torch.testing.assert_close(contracted(second, t), along(first, x, t), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in DERIVED if name != "merged"])  # its adapter is merged into W
def test_derivatives_in_the_parameters(name):
    """Tangents and vmap in each trainable Parameter separately; per-row gradients, as for differential privacy."""
    module = layer(name)
    x, _ = direction()
    values = {key: p.detach() for key, p in module.named_parameters() if p.requires_grad}
    for key, value in values.items():
        tangent = torch.randn_like(value)

        def f(one: Tensor, key: str = key) -> Tensor:
            return functional_call(module, {key: one}, (x,))

        expected = along(f, value, tangent)
        for of in ("dual", "dual in no_grad", "jvp"):
            got = TRANSFORMS[of](f, value, tangent)
            assert got is not None, (of, key)
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
        mapped = vmap(f)(torch.stack([value, value + tangent]))
        torch.testing.assert_close(mapped, torch.stack([f(value), f(value + tangent)]))

        def of_row(one: Tensor, row: Tensor, f: Callable[[Tensor], Tensor] = f) -> Tensor:
            return (f(one) * row[:, None]).sum()

        each = vmap(grad(of_row), (None, 0))(value, torch.eye(3, dtype=WIDE))
        torch.testing.assert_close(each.sum(0), grad(lambda one, f=f: f(one).sum())(value))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "accelerated"])
def test_tangents_in_inference_mode_are_not_lost_in_silence(name):
    module = layer(name)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(*direction())
        with (
            torch.inference_mode(),
            pytest.raises(RuntimeError, match="expected tensors without tangents in inference"),
        ):
            module(x)
        with torch.inference_mode():
            module(direction()[0])  # an input without a tangent


def test_an_accelerated_model_in_fp32():
    """fp32 uses our kernels; fp64 uses PEFT's own code."""
    model = accelerated().float()
    for parameter in model.parameters():
        nn.init.normal_(parameter.data, std=0.5)
    x, t = (tensor.float() for tensor in direction())
    expected = jvp(copy.deepcopy(model).double(), (x.double(),), (t.double(),))[1].float()
    for derivative in (by_dual, by_dual_in_no_grad, TRANSFORMS["jvp"]):
        torch.testing.assert_close(derivative(model, x, t), expected, atol=1e-4, rtol=1e-4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        with (
            torch.inference_mode(),
            pytest.raises(RuntimeError, match="expected tensors without tangents in inference"),
        ):
            model(dual)
        names = ["default", "__base__", "default"]
        tangent = forward_ad.unpack_dual(model.eval()(dual, adapter_names=names)).tangent
    torch.testing.assert_close(tangent[::2], expected[::2], atol=1e-4, rtol=1e-4)


def test_a_llama_adapter_raises_where_torch_has_no_derivative():
    with pytest.raises(NotImplementedError, match="forward AD"):
        by_dual(layer("llama"), *direction())


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("parallel", "llama", "accelerated")])
def test_second_derivatives_raise_where_there_are_none(name):
    """Even with functions that allow unused tensors, which would otherwise return zeros."""
    module = layer(name)
    x, t = direction()
    functional = torch.autograd.functional
    for attempt in (
        lambda: functional.hvp(lambda one: module(one).square().sum(), x, t),
        lambda: functional.jvp(module, x, t),
        lambda: functional.hessian(lambda one: module(one).square().sum(), x),
    ):
        with pytest.raises(RuntimeError, match="backward: expected no second derivative"):
            attempt()
    given = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(module(given).sum(), given, create_graph=True)  # create_graph=True alone is allowed
    assert first.shape == x.shape


def test_second_derivatives_in_what_was_not_saved():
    """Only lora_B trains, so x is not saved, but the gradient of lora_B still depends on x."""
    module = layer("lora")
    module.lora_A.requires_grad_(False)
    given = direction()[0].requires_grad_()
    with pytest.raises(RuntimeError, match="backward: expected no second derivative"):
        torch.autograd.grad(module(given).sum(), module.lora_B, create_graph=True)


def test_ids_may_be_mapped():
    module = Many()
    x, _ = direction()
    ids = torch.tensor([[1, 0, -1], [0, 0, 1]])
    torch.testing.assert_close(
        vmap(lambda one: module.layer(x, one))(ids), torch.stack([module.layer(x, one) for one in ids])
    )


def test_an_adapter_of_inf_stays_in_its_rows():
    """Also in plain torch, in values and in gradients."""
    module = Many()
    module.layer.trained["slot1"].lora_B.data.fill_(torch.inf)
    x, t = direction()
    y, tangent = jvp(module, (x,), (t,))
    assert y[1:].isfinite().all()
    assert tangent[1:].isfinite().all()
    assert vjp(module, x)[1](t)[0][1:].isfinite().all()


@pytest.mark.parametrize("backend", spread(["eager", "aot_eager"], default=1))
def test_compiled_calls_do_not_lose_tangents(backend):
    module = layer("lora").requires_grad_(False)
    x, t = direction()
    compiled = torch.compile(copy.deepcopy(module), backend=backend)
    torch.testing.assert_close(compiled(x), module(x))
    for derivative in (by_dual, by_dual_in_no_grad, TRANSFORMS["jvp"]):
        torch.testing.assert_close(derivative(compiled, x, t), along(module, x, t), atol=1e-6, rtol=1e-6)


def test_a_compiled_graph_that_is_given_tangents_says_so():
    """A graph recorded without tangents, for example an exported one."""
    x, t = direction()
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match="compiled call drops"):
        torch.ops.peftk.lora_linear(
            forward_ad.make_dual(x, t), x, None, None, None, 1.0, "identity", None, None, 0.0, None, None
        )

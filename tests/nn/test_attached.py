"""Tests of SeriesAdapter, ParallelAdapter, LlamaAdapter, ParallelAdapterLinear and BitFitLinear, each by itself."""

from __future__ import annotations

import collections
import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftk.adapters import activations
from peftk.adapters.adapter import Adapter
from peftk.nn import (
    BitFitLinear,
    LlamaAdapter,
    LoRALinear,
    ParallelAdapter,
    ParallelAdapterLinear,
    Projections,
    SeriesAdapter,
)
from tests.support import numerics
from tests.support.cases import Case, expected
from tests.support.small_models import randomised

pytestmark = pytest.mark.usefixtures("one_thread")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Pair = collections.namedtuple("Pair", ["states", "rest"])


def normal(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)


class Block(nn.Module):
    """Two modules with an activation between them, as in BERT's feed-forward block."""

    def __init__(self, dtype: torch.dtype = F32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down = nn.Linear(12, 20, dtype=dtype), nn.Linear(20, 12, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def adapter_of(module: Any) -> Adapter:
    return Adapter((module.lora_A,), (module.lora_B,), module.scaling, module.activation, module.bias_A, module.bias_B)


# Series


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32), (F16, F16)])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_series_adapter(dtype: torch.dtype, adapter_dtype: torch.dtype, activation: str) -> None:
    adapter = SeriesAdapter(24, 5, activation=activation, scaling=1.5, dtype=adapter_dtype)
    h = normal(3, 4, 24, dtype=dtype)
    assert torch.equal(adapter(h), h)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 24 * 5 + 5 + 24
    randomised(adapter)
    y = adapter(h)
    assert y.dtype == dtype
    numerics.check(y.flatten(0, 1), *expected(Case(h.flatten(0, 1), None, None, (adapter_of(adapter),), None)))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: (t, "rest"),
        lambda t: [t, "rest"],
        lambda t: Pair(t, "rest"),
        lambda t: {"states": t, "rest": "rest"},
    ],
)
def test_series_adapter_behind_any_output(wrap: Any) -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return wrap(2 * x)

    module, adapter, x = Module(), randomised(SeriesAdapter(8, 3)), normal(2, 8)
    adapter.attach(module)
    output, wanted = module(x), wrap(adapter(2 * x))
    assert type(output) is type(wanted)
    flat = (lambda o: list(o.values()) if isinstance(o, dict) else list(o)) if not isinstance(output, Tensor) else list
    assert all(
        torch.equal(one, other) if isinstance(one, Tensor) else one == other
        for one, other in zip(flat(output), flat(wanted), strict=True)
    )


def test_series_adapter_behind_a_model_output() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    class Module(nn.Module):
        def forward(self, x: Tensor) -> BaseModelOutput:
            return BaseModelOutput(last_hidden_state=x, hidden_states=(x,))

    module, adapter, x = Module(), randomised(SeriesAdapter(8, 3)), normal(2, 8)
    adapter.attach(module)
    output = module(x)
    assert isinstance(output, BaseModelOutput)
    assert torch.equal(output.last_hidden_state, adapter(x))
    assert torch.equal(output[0], adapter(x))
    assert torch.equal(output.hidden_states[0], x)


# Parallel


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32), (F16, F16)])
@pytest.mark.parametrize(("source", "sink"), [("", ""), ("up", "down")])
def test_parallel_adapter(dtype: torch.dtype, adapter_dtype: torch.dtype, source: str, sink: str) -> None:
    block, x = Block(dtype), normal(6, 12, dtype=dtype)
    with torch.no_grad():
        before = block(x)
        # with the adapter inside of the block, the block's own sum rounds once more
        within = block.down(torch.tanh(block.up(x))) if sink else before
    adapter = ParallelAdapter(12, 5, activation="silu", dtype=adapter_dtype, source=source, sink=sink)
    adapter.attach(block)
    assert torch.equal(block(x), before)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 12 * 5 + 5 + 12
    randomised(adapter)
    seen: list[Tensor] = []
    block.get_submodule(sink).register_forward_hook(lambda module, args, output: seen.append(output))
    y = block(x)
    assert y.dtype == dtype
    if sink:
        assert torch.equal(y, x + seen[0])
    A, B, a, beta, x64 = (t.double() for t in (adapter.lora_A, adapter.lora_B, adapter.bias_A, adapter.bias_B, x))
    z, s = x64 @ A.T + a, adapter.scaling
    added = s * activations.apply("silu", z) @ B.T + beta
    terms = within.double().abs() + s * ((x64.abs() @ A.abs().T + a.abs()) @ B.abs().T) + beta.abs()
    # 16-bit adapters run in 16 bits: x Aᵀ + a, the activation, the product with Bᵀ, s times it and β round, each by u
    u = numerics.UNIT[adapter_dtype] if adapter_dtype != F32 else 0.0
    numerics.check(seen[0], within.double() + added, terms * (1 + 5 * u * 2**24 / (2 * 17**0.5)), 17)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32), (F16, F16)])
@pytest.mark.parametrize("conv", [False, True])
def test_parallel_adapter_linear(dtype: torch.dtype, adapter_dtype: torch.dtype, conv: bool) -> None:
    linear = make_linear(conv).to(dtype)
    x = normal(6, 16, dtype=dtype)
    layer = ParallelAdapterLinear.from_linear(linear, bottleneck=5, activation="gelu", adapter_dtype=adapter_dtype)
    assert layer.weight is linear.weight
    case = Case(x, layer.matrix, layer.bias, (adapter_of(layer),), None)
    numerics.check(layer(x), *expected(case))
    names = ("lora_A", "lora_B", "bias_A", "bias_B")
    assert tuple(n for n, p in layer.named_parameters() if p.requires_grad) == names
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 5 * (16 + 24) + 5 + 24
    randomised(layer)
    numerics.check(layer(x), *expected(case))
    layer(x).sum().backward()
    assert all(layer.get_parameter(name).grad.abs().sum() > 0 for name in names)


def make_linear(conv: bool) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(2)
    made = Conv1D(24, 16) if conv else nn.Linear(16, 24)
    nn.init.normal_(made.bias)
    return made


# BitFit


@pytest.mark.parametrize("conv", [False, True])
def test_bitfit_linear(conv: bool) -> None:
    linear, x, dy = make_linear(conv), normal(6, 16), normal(6, 24)
    before = linear(x)
    keys, bias = list(linear.state_dict()), linear.bias
    layer = BitFitLinear.from_linear(linear)
    numerics.check(layer(x), *expected(Case(x, layer.matrix, layer.bias, (None,), None)))
    torch.testing.assert_close(layer(x), before)
    assert list(layer.state_dict()) == keys
    assert layer.bias is bias
    layer(x).backward(dy)
    assert layer.weight.grad is None
    numerics.check(bias.grad, dy.double().sum(0), dy.double().abs().sum(0), 6)
    # it can be replaced as the linear can
    lora = LoRALinear.from_linear(layer, r=2)
    assert lora.fan_in_fan_out == conv
    torch.testing.assert_close(lora(x), before)


# LLaMA-Adapter


class Attention(nn.Module):
    """Grouped queries; no rotation."""

    def __init__(self, dtype: torch.dtype = F32, packed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        if packed:
            self.qkv = nn.Linear(16, 24 + 2 * 12, dtype=dtype)
        else:
            self.q, self.k, self.v = (nn.Linear(16, n, dtype=dtype) for n in (24, 12, 12))
        self.o = nn.Linear(24, 16, dtype=dtype)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        qkv = self.qkv(x).split([24, 12, 12], -1) if hasattr(self, "qkv") else (self.q(x), self.k(x), self.v(x))
        return tuple(t.unflatten(-1, (-1, 6)).transpose(1, 2) for t in qkv)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        return self.o((torch.softmax(q @ k.mT / 6**0.5, -1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scaling", [None, 1.0])
def test_llama_adapter(packed: bool, scaling: float | None) -> None:
    layer, x = Attention(torch.float64, packed), normal(2, 5, 16, dtype=torch.float64)
    before, names = layer(x), ("qkv",) * 3 if packed else ("q", "k", "v")
    adapter = LlamaAdapter(16, 4, Projections(*names, "o"), adapter_len=3, scaling=scaling, dtype=torch.float64)
    adapter.attach(layer)
    assert torch.equal(layer(x), before)
    assert sum(p.numel() for p in adapter.parameters()) == 3 * 16 + 4
    randomised(adapter)
    y = layer(x)
    adapter.detach(layer)
    q, k, v = layer.project(x)
    _, pk, pv = layer.project(adapter.prompt[None])
    k, v, pk, pv = (t.repeat_interleave(2, dim=1) for t in (k, v, pk, pv))
    heads = torch.softmax(q @ k.mT / 6**0.5, -1) @ v
    c = 6**-0.5 if scaling is None else scaling
    heads = heads + torch.tanh(adapter.gate)[:, None, None] * (torch.softmax(c * q @ pk.mT, -1) @ pv)
    wanted = layer.o(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, wanted)
    dy = normal(2, 5, 16, dtype=torch.float64)
    for got, want in zip(*(torch.autograd.grad(t, list(adapter.parameters()), dy) for t in (y, wanted)), strict=True):
        torch.testing.assert_close(got, want)


# Attaching and detaching

ADAPTERS = {
    "series": lambda: SeriesAdapter(12, 3),
    "parallel": lambda: ParallelAdapter(12, 3),
    "parallel within": lambda: ParallelAdapter(12, 3, source="up", sink="down"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_attach_and_detach(kind: str) -> None:
    block, x = Block(), normal(4, 12)
    before, keys = block(x), list(block.state_dict())
    adapter = randomised(ADAPTERS[kind]())
    adapter.attach(block)
    assert type(block) is Block
    assert list(block.state_dict())[: len(keys)] == keys
    assert {k for k in block.state_dict() if k not in keys} == {f"{adapter.name}.{k}" for k in adapter.state_dict()}
    y = block(x)
    assert not torch.equal(y, before)

    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            other.get_submodule(adapter.name).lora_B.zero_()
            other.get_submodule(adapter.name).bias_B.zero_()
        assert torch.equal(other(x), before)  # its hooks use its own adapter
        other.get_submodule(adapter.name).detach(other)
        assert torch.equal(other(x), before)
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in other.modules())
    assert torch.equal(block(x), y)
    adapter.detach(block)
    assert torch.equal(block(x), before)
    assert list(block.state_dict()) == keys
    with pytest.raises(ValueError, match="module: expected one that this adapter is attached to, got Block"):
        adapter.detach(block)


def test_hooks_of_a_new_process_do_not_take_the_place_of_pickled_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = Block(), normal(4, 12)
    randomised(SeriesAdapter(12, 3)).attach(block)
    y, data = block(x), pickle.dumps(block)
    [number] = block._forward_hooks
    monkeypatch.setattr(RemovableHandle, "next_id", number)
    other = pickle.loads(data)
    other.register_forward_hook(lambda module, args, output: None)
    assert len(other._forward_hooks) == 2
    assert torch.equal(other(x), y)


def test_an_adapter_attached_to_a_linear_stays_when_the_linear_is_replaced() -> None:
    block, x = Block(), normal(4, 12)
    adapter = randomised(SeriesAdapter(12, 3))
    adapter.attach(block.down)
    y = block(x)
    block.down = LoRALinear.from_linear(block.down, r=2)
    assert block.down.series_adapter is adapter
    torch.testing.assert_close(block(x), y)
    adapter.detach(block.down)
    torch.testing.assert_close(block(x), Block()(x))


@pytest.mark.parametrize(
    ("adapter", "module", "error", "message"),
    [
        (
            SeriesAdapter(4, 2),
            nn.Sequential(nn.Linear(4, 4)),
            TypeError,
            "isn't a container of modules, got Sequential",
        ),
        (SeriesAdapter(4, 2), "module", TypeError, "module: expected an nn.Module, got str"),
        (ParallelAdapter(12, 2, source="over"), Block(), ValueError, "expected a Block with 'over', got one without"),
        (LlamaAdapter(16, 4, Projections("q", "k", "w", "o")), Attention(), ValueError, "with 'w', got one without"),
    ],
)
def test_what_an_adapter_cannot_attach_to(adapter: Any, module: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        adapter.attach(module)
    if isinstance(module, nn.Module):
        assert not hasattr(module, adapter.name)
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_one_adapter_of_a_kind_per_module() -> None:
    block = Block()
    SeriesAdapter(12, 2).attach(block)
    with pytest.raises(ValueError, match="expected a Block without 'series_adapter', got one that has it"):
        SeriesAdapter(12, 2).attach(block)
    assert len(block._forward_hooks) == 1


def test_errors_at_the_first_call() -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[..., K\] with K = 12, got \[2, 13\]"):
        SeriesAdapter(12, 2)(normal(2, 13))
    with pytest.raises(TypeError, match="x: expected a dtype that mixes with the adapter's"):
        SeriesAdapter(12, 2)(normal(2, 12, dtype=torch.float64))

    class Module(nn.Module):
        def forward(self, x: Any) -> Any:
            return None

    module = Module()
    SeriesAdapter(12, 2).attach(module)
    with pytest.raises(
        TypeError, match="output: expected a tensor, or a tuple or dict that begins with one, got NoneT"
    ):
        module(normal(2, 12))
    block = Block()
    ParallelAdapter(12, 2, source="up", sink="down").attach(block)
    with pytest.raises(RuntimeError, match="expected up to be called first, got no call of it"):
        block.down(normal(2, 20))
    module = Module()
    ParallelAdapter(12, 2).attach(module)
    with pytest.raises(TypeError, match="input: expected a tensor as the module's first argument, got str"):
        module("x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SeriesAdapter(0, 2), "in_features: expected an integer of 1 or more, got 0"),
        (lambda: SeriesAdapter(4, 2.0), "bottleneck: expected an integer of 1 or more, got 2.0"),  # type: ignore[arg-type]
        (lambda: SeriesAdapter(4, 2, activation="tanh"), "activation: expected one of identity, relu"),
        (lambda: ParallelAdapter(4, 2, scaling=float("inf")), "scaling: expected a finite number"),
        (lambda: ParallelAdapterLinear.from_linear(nn.Linear(4, 4), bottleneck=0), "bottleneck: expected an integer"),
        (lambda: BitFitLinear.from_linear(nn.Linear(4, 4, bias=False)), r"bias: expected a tensor \[N\] to train"),
        (lambda: LlamaAdapter(4, 0, Projections("q", "k", "v", "o")), "num_heads: expected an integer of 1 or more"),
        (lambda: LlamaAdapter(4, 1, Projections("q", "k", "v", "o"), adapter_len=0), "adapter_len: expected"),
    ],
)
def test_bad_hyper_parameters(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_failed_replacement_leaves_the_linear_trainable() -> None:
    linear = nn.Linear(4, 4)
    with pytest.raises(TypeError, match="adapter_dtype: expected"):
        ParallelAdapterLinear.from_linear(linear, bottleneck=2, adapter_dtype=torch.float64)
    assert linear.weight.requires_grad


def test_threads_do_not_see_each_others_inputs() -> None:
    block = Block()
    randomised(ParallelAdapter(12, 3, source="up", sink="down")).attach(block)
    meeting = threading.Barrier(2)
    # both threads are between source and sink at once
    block.down.register_forward_pre_hook(lambda module, args: (meeting.wait(timeout=10), None)[1])
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        found[number] = block(normal(4, 12) + number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    alone = copy.deepcopy(block)
    alone.down._forward_pre_hooks.clear()
    for number in range(2):
        assert torch.equal(found[number], alone(normal(4, 12) + number))


def test_torch_compile() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.block = Attention(), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x[..., :12]) + self.attention(x)[..., :12]

    layer, x = Layer(), normal(2, 3, 16)
    LlamaAdapter(16, 4, Projections("q", "k", "v", "o"), adapter_len=2).attach(layer.attention)
    SeriesAdapter(12, 2).attach(layer.block)
    ParallelAdapter(12, 2, source="up", sink="down").attach(layer.block)
    randomised(layer)
    names, parameters = zip(*((n, p) for n, p in layer.named_parameters() if "adapter" in n), strict=True)
    assert len(names) == 10
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = [(f(x), torch.autograd.grad(f(x).sum(), parameters)) for f in (layer, compiled)]
    torch.testing.assert_close(*results)


def test_a_prompt_is_fp32_by_default() -> None:
    adapter = LlamaAdapter(4, 2, Projections("q", "k", "v", "o"))
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}

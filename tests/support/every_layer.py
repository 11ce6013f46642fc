"""A table of all layers, each with what it computes, in plain torch, from the same Parameters.

    for entry in LAYERS:
        made = entry.make()
        torch.testing.assert_close(made.layer(x), made.plain(x))      x: [..., 8] of entry.dims dimensions

Both read the Parameters that the module has when they are called. All values are random and none is zero.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import peftk
from peftk.adapters import activations
from peftk.nn import (
    BitFitLinear,
    LlamaAdapter,
    LoRALinear,
    MultiLoRALinear,
    ParallelAdapter,
    ParallelAdapterLinear,
    Projections,
    SeriesAdapter,
)
from peftk.nn.frozen_linear import FrozenLinear
from peftk.nn.placed_adapters import NormAdapter, StreamAdapter

try:
    import peft
    from transformers.pytorch_utils import Conv1D
except ImportError:
    peft = None

K, N, RANK = 8, 6, 3

Run = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Made:
    """A layer and the same in plain torch. module: has the Parameters of both."""

    layer: Run
    plain: Run
    module: nn.Module

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}


@dataclasses.dataclass(frozen=True)
class Entry:
    """base makes a base module, build a layer from it. dims: numbers of dimensions of its inputs.

    by_linear: the output is that of torch's nn.Linear, which is a view for some inputs.
    """

    name: str
    base: Callable[[], nn.Module]
    build: Callable[[nn.Module], Made]
    dims: Sequence[int] = (1, 2, 3, 4)
    by_linear: bool = False

    def make(self, *, frozen: bool = False, seed: int = 0) -> Made:
        """frozen: no Parameter requires a gradient."""
        torch.manual_seed(seed)
        made = self.build(self.base())
        if frozen:
            made.module.requires_grad_(False)
        return made

    def inputs(self, *, empty: bool = False) -> list[Tensor]:
        """One x [..., K] for each number of dimensions; empty: without a row."""
        generator = torch.Generator().manual_seed(1)
        first = 0 if empty else 4
        return [
            torch.randn((*(first, 3, 2)[: dims - 1], K), generator=generator)
            for dims in self.dims
            if not (empty and dims == 1)
        ]


LAYERS: list[Entry] = []


def by_name(name: str) -> Entry:
    return next(entry for entry in LAYERS if entry.name == name)


def _entry(
    *names: str,
    base: Callable[[], nn.Module] = lambda: nn.Linear(K, N),
    dims: Sequence[int] = (1, 2, 3, 4),
    by_linear: Sequence[str] = (),
) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """Adds a layer to the table. names: variants, passed to `build` as its second argument."""

    def add(build: Callable[..., Made]) -> Callable[..., Made]:
        kind = build.__name__
        for name in names or ("",):
            made = functools.partial(build, variant=name) if name else build
            LAYERS.append(Entry(f"{kind} {name}".strip(), base, made, dims, by_linear=name in by_linear))
        return build

    return add


def _randomize(module: nn.Module) -> None:
    """Draws every trained Parameter at random, so that adapters have an effect, as after training."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.5)


def _adapted(x: Tensor, A: Tensor, B: Tensor, a: Tensor | None, b: Tensor | None, s: float, name: str) -> Tensor:
    """s·act(xAᵀ + a)Bᵀ + β."""
    y = s * linear(activations.apply(name, linear(x, A, a)), B)
    return y if b is None else y + b


def _of(adapter: nn.Module, x: Tensor) -> Tensor:
    """What a bottleneck module adds."""
    A, B, a, b = (getattr(adapter, name) for name in ("lora_A", "lora_B", "bias_A", "bias_B"))
    return _adapted(x, A, B, a, b, adapter.scaling, adapter.activation)


def _base(layer: FrozenLinear, x: Tensor) -> Tensor:
    return linear(x, layer.matrix, layer.bias)


# drop-in linears


@_entry()
def frozen(base: nn.Linear) -> Made:
    layer = FrozenLinear(base.weight, base.bias)
    return Made(layer, lambda x: _base(layer, x), layer)


@_entry("plain", "bias", "merged", "merged bias", "frozen A", "frozen B")
def lora(base: nn.Linear, variant: str) -> Made:
    layer = LoRALinear.from_linear(base, r=RANK, lora_alpha=2.0, lora_bias="bias" in variant)
    _randomize(layer)
    if "merged" in variant:
        layer.merge()
    for name in ("A", "B"):
        layer.get_parameter(f"lora_{name}").requires_grad_(f"frozen {name}" not in variant)

    def plain(x: Tensor) -> Tensor:
        y = _base(layer, x)
        if layer.merged:
            return y
        y = y + _adapted(x, layer.lora_A, layer.lora_B, None, None, layer.scaling, "identity")
        return y if layer.lora_bias is None else y + layer.scaling * layer.lora_bias

    return Made(layer, plain, layer)


def _conv1d() -> nn.Module:
    base = Conv1D(N, K)
    nn.init.normal_(base.weight, std=0.3)
    return base


if peft is not None:
    LAYERS.append(Entry("lora Conv1D", _conv1d, functools.partial(lora, variant="plain")))
LAYERS.append(Entry("lora without bias", lambda: nn.Linear(K, N, bias=False), functools.partial(lora, variant="plain")))


@_entry()
def bitfit(base: nn.Linear) -> Made:
    layer = BitFitLinear.from_linear(base)
    return Made(layer, lambda x: _base(layer, x), layer)


@_entry("identity", "relu", "silu")
def parallel_linear(base: nn.Linear, variant: str) -> Made:
    layer = ParallelAdapterLinear.from_linear(base, bottleneck=RANK, activation=variant, scaling=0.5)
    _randomize(layer)
    return Made(layer, lambda x: _base(layer, x) + _of(layer, x), layer)


# many adapters


def ids_for(x: Tensor, count: int) -> Tensor:
    """-1, 0, 1, … in turn, one per row of x [..., K]."""
    return (torch.arange(x[..., 0].numel()) % (count + 1) - 1).reshape(x.shape[:-1])


def _by_row(layer: MultiLoRALinear, x: Tensor, ids: Tensor) -> Tensor:
    """Every row with its own adapter."""
    y = _base(layer, x)
    for number, adapter in enumerate(layer.bank.adapters):
        if adapter is None:
            continue
        added = torch.zeros(()) if adapter.bias_B is None else adapter.bias_B
        if adapter.pages_A:
            A, B, s = torch.cat(adapter.pages_A), torch.cat(adapter.pages_B, dim=1), adapter.scaling
            added = _adapted(x, A, B, adapter.bias_A, adapter.bias_B, s, adapter.activation)
        y = y + (ids == number)[..., None] * added
    return y


@_entry("trained", "served", "trained and served", "activations", "biases only", "base rows only", "without ids")
def multi(base: nn.Linear, variant: str) -> Made:
    layer = MultiLoRALinear.from_linear(base, max_adapters=3, adapter_dtype=torch.float32)
    for number in range(2):
        rank = RANK + 15 * number
        A, B, a, b = torch.randn(rank, K), torch.randn(N, rank), torch.randn(rank), torch.randn(N)
        trains = variant != "served" and (variant != "trained and served" or number == 0)
        if variant == "biases only":
            layer.add_adapter(f"a{number}", None, None, bias=b, trainable=trains)
        elif variant == "activations":
            name = ("silu", "identity")[number]
            layer.add_adapter(f"a{number}", A, B, 0.5, activation=name, bias_A=a, bias=b, trainable=trains)
        else:
            layer.add_adapter(f"a{number}", A, B, 0.5, trainable=trains)
    if variant == "without ids":
        return Made(layer, lambda x: _base(layer, x), layer)
    count = 0 if variant == "base rows only" else 2

    def ids(x: Tensor) -> Tensor:
        return ids_for(x, count)

    return Made(lambda x: layer(x, ids(x)), lambda x: _by_row(layer, x, ids(x)), layer)


# behind and beside a module


@_entry("identity", "gelu")
def series(base: nn.Linear, variant: str) -> Made:
    adapter = SeriesAdapter(N, RANK, activation=variant, scaling=0.5)
    base.requires_grad_(False)
    adapter.attach(base)
    _randomize(adapter)

    def plain(x: Tensor) -> Tensor:
        h = linear(x, base.weight, base.bias)
        return h + _of(base.series_adapter, h)

    return Made(base, plain, base)


@_entry(base=nn.Identity)
def series_alone(base: nn.Module) -> Made:
    """Behind a module that returns its input."""
    adapter = SeriesAdapter(K, RANK, activation="relu")
    adapter.attach(base)
    _randomize(adapter)
    return Made(base, lambda x: x + _of(base.series_adapter, x), base)


@_entry()
def parallel(base: nn.Linear) -> Made:
    adapter = ParallelAdapter(K, RANK, N)
    base.requires_grad_(False)
    adapter.attach(base)
    _randomize(adapter)
    return Made(base, lambda x: linear(x, base.weight, base.bias) + _of(base.parallel_adapter, x), base)


@_entry(base=lambda: nn.LayerNorm(K))
def norm(base: nn.LayerNorm) -> Made:
    adapter = NormAdapter(K, RANK)
    base.requires_grad_(False)
    adapter.attach(base)
    _randomize(adapter)

    def normed(x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (K,), base.weight, base.bias)

    return Made(base, lambda x: normed(x + _of(base.parallel_adapter, normed(x))), base)


class _Block(nn.Module):
    """A block whose skip connection is outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(K), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x))


@_entry(base=_Block)
def stream(base: _Block) -> Made:
    adapter = StreamAdapter(K, RANK, source="norm", sink="fc")
    base.requires_grad_(False)
    adapter.attach(base)
    _randomize(adapter)

    def plain(x: Tensor) -> Tensor:
        h = linear(nn.functional.layer_norm(x, (K,), base.norm.weight, base.norm.bias), base.fc.weight, base.fc.bias)
        return h + _of(base.parallel_adapter, x + h)

    return Made(base, plain, base)


HEADS = 2


class _Attention(nn.Module):
    """Self-attention of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(K, K) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.heads(self.q(x), self.k(x), self.v(x)))

    def heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@_entry(base=_Attention, dims=(3,), by_linear=("",))
def llama(base: _Attention) -> Made:
    adapter = LlamaAdapter(K, HEADS, Projections("q", "k", "v", "o"), adapter_len=5)
    base.requires_grad_(False)
    adapter.attach(base)
    _randomize(adapter)

    def plain(x: Tensor) -> Tensor:
        def by(part: nn.Linear, x: Tensor) -> Tensor:
            return linear(x, part.weight, part.bias)

        q, prompt = by(base.q, x), base.llama_adapter.prompt.expand(len(x), -1, -1)
        found = base.heads(q, by(base.k, prompt), by(base.v, prompt)).unflatten(-1, (HEADS, -1))
        gate = base.llama_adapter.gate.tanh()[:, None]
        return by(base.o, base.heads(q, by(base.k, x), by(base.v, x)) + (gate * found).flatten(2))

    return Made(base, plain, base)


# the bare operations


class _Tensors(nn.Module):
    """Parameters for the functional operations."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(K, K)
        self.linear.weight.requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(RANK, K)), nn.Parameter(torch.randn(K, RANK))
        self.a, self.b = nn.Parameter(torch.randn(RANK)), nn.Parameter(torch.randn(K))


@_entry("lora_linear", "lora_linear bias alone", "adapter_block", "adapter_block bias alone", base=_Tensors)
def functional(base: _Tensors, variant: str) -> Made:
    alone = "alone" in variant
    if alone:
        base.A.requires_grad_(False), base.B.requires_grad_(False), base.a.requires_grad_(False)

    def layer(x: Tensor) -> Tensor:
        factors = (None, None, 0.5) if alone else (base.A, base.B, 0.5)
        rest = {"activation": "relu", "bias_A": None if alone else base.a, "bias_B": base.b}
        if "block" in variant:
            return peftk.functional.adapter_block(x, *factors, **rest)
        return peftk.functional.lora_linear(x, base.linear.weight, base.linear.bias, *factors, **rest)

    def plain(x: Tensor) -> Tensor:
        y = x if "block" in variant else linear(x, base.linear.weight, base.linear.bias)
        return y + (base.b if alone else _adapted(x, base.A, base.B, base.a, base.b, 0.5, "relu"))

    return Made(layer, plain, base)


# PEFT's layers, accelerated


def _accelerated(base: nn.Linear, **config: object) -> tuple[nn.Module, nn.Module]:
    """A PEFT model around the linear, with adapters "default" and "other", and the layer in it."""
    config = {"r": RANK, "lora_alpha": 2, "target_modules": ["0"], "init_lora_weights": False, **config}
    model = peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(**config))
    model.add_adapter("other", peft.LoraConfig(**{**config, "r": RANK + 2}))
    model = peftk.accelerate(model)
    for parameter in model.base_model.model[0].parameters():
        parameter.requires_grad_(True)
    base.requires_grad_(False)
    return model, model.base_model.model[0]


if peft is not None:

    @_entry("one", "one with bias", "several", "merged", "disabled", by_linear=("disabled",))
    def accelerated(base: nn.Linear, variant: str) -> Made:
        model, layer = _accelerated(base, lora_bias="bias" in variant)
        if variant == "several":
            model.base_model.set_adapter(["default", "other"])
        if variant == "merged":
            layer.merge(adapter_names=["default"])
        layer.enable_adapters(variant != "disabled")
        return Made(layer, lambda x: peft.tuners.lora.Linear.forward(layer, x), layer)

    @_entry("plain", "bias", dims=(2, 3, 4))
    def accelerated_mixed(base: nn.Linear, variant: str) -> Made:
        _, layer = _accelerated(base, lora_bias=variant == "bias")

        def names(x: Tensor) -> list[str]:
            return [("__base__", "default", "other")[number % 3] for number in range(len(x))]

        def plain(x: Tensor) -> Tensor:
            parts = []
            for number, name in enumerate(names(x)):
                row = x[number]
                y = linear(row, layer.base_layer.weight, layer.base_layer.bias)
                if name != "__base__":
                    down, up = layer.lora_A[name], layer.lora_B[name]
                    y = y + layer.scaling[name] * linear(linear(row, down.weight), up.weight, up.bias)
                parts.append(y)
            return torch.stack(parts) if parts else linear(x, layer.base_layer.weight, layer.base_layer.bias)

        return Made(lambda x: layer(x, adapter_names=names(x)), plain, layer)


def gradients(run: Callable[[Tensor], Tensor], made: Made, x: Tensor) -> dict[str, Tensor | None]:
    """Gradients of a weighted sum of run(x), by name: of x if it requires one, and of every trained Parameter."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    made.module.zero_grad()
    y = run(x)
    if y.requires_grad:
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    return {name: leaf.grad for name, leaf in {"x": x, **made.trained}.items()}


def agree(ours: dict[str, Tensor | None], plain: dict[str, Tensor | None]) -> None:
    assert ours.keys() == plain.keys()
    for name, wanted in plain.items():
        got = ours[name]
        if wanted is None or got is None:  # an adapter that no row uses
            assert all(grad is None or not grad.any() for grad in (wanted, got)), name
        else:
            torch.testing.assert_close(got, wanted, msg=lambda text, name=name: f"{name}: {text}")

"""`peftk.quantize` on models, and adapters on what it makes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import peftk
from peftk.nn.quantized_linear import QuantizedLinear
from peftk.quantized.weight import QuantizedWeight
from tests.support.quantized_cases import QUANTIZED


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.relu(self.up(x))))


def model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


@pytest.mark.parametrize(("format", "group"), QUANTIZED)
def test_quantize(format: str, group: int | None):
    if group == 128:
        return  # wider than a layer
    plain = model()
    quantized = copy.deepcopy(plain)
    report = peftk.quantize(quantized, format, group=group, target_modules=["up", "down"])
    assert [layer.name for layer in report] == ["up", "down"]
    x = torch.randn(5, 64)
    for layer in report:
        module = quantized.get_submodule(layer.name)
        assert isinstance(module, QuantizedLinear)
        W = plain.get_submodule(layer.name).weight
        error = (module.weight.dequantize() - W).norm() / W.norm()
        assert layer.error == pytest.approx(float(error.detach()), rel=1e-4)
        assert layer.bytes_before == W.numel() * 4
        assert layer.bytes_after == module.weight.stored_bytes < layer.bytes_before / 3
        assert layer.name in str(layer)
    assert type(quantized.head) is nn.Linear
    replaced = copy.deepcopy(plain)
    for name in ("up", "down"):
        replaced.get_submodule(name).weight.data = quantized.get_submodule(name).weight.dequantize()
    torch.testing.assert_close(quantized(x), replaced(x))


@pytest.mark.parametrize("format", ["int8", "int4", "nf4"])
def test_lora_trains_on_it(format: str):
    """Adapters on a packed base train as on the dequantized one; the base does not change."""
    packed = model()
    peftk.quantize(packed, format)
    unpacked = copy.deepcopy(packed)
    for name in ("up", "down"):
        layer = unpacked.get_submodule(name)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight.data = layer.weight.dequantize()
        if layer.bias is not None:
            plain.bias.data = layer.bias.data.clone()
        setattr(unpacked, name, plain)
    before = packed.up.weight.packed.clone()
    losses = []
    for trained in (packed, unpacked):
        torch.manual_seed(1)
        peftk.inject(trained, peftk.LoraConfig(r=4, target_modules=["up", "down"]))
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
        torch.manual_seed(2)
        x, target, found = torch.randn(16, 64), torch.randn(16, 10), []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (trained(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    assert torch.equal(packed.up.weight.packed, before)
    assert isinstance(packed.up.weight, QuantizedWeight)
    with pytest.raises(TypeError, match="weight: expected a dense tensor, got a QuantizedWeight"):
        packed.up.merge()
    assert not packed.up.merged


def test_explain_knows_it():
    packed = model()
    peftk.quantize(packed, "nf4", target_modules=["up"])
    layer = peftk.LoRALinear.from_linear(packed.up, r=4)
    found = peftk.explain(layer, torch.randn(1, 64))
    assert found.backend == "cpu"
    assert "nf4 decoded in it" in found.kernel


def test_many_adapters_on_it():
    packed = model()
    peftk.quantize(packed, "nf4")
    layer = peftk.MultiLoRALinear.from_linear(packed.up, max_adapters=4)
    A, B = torch.randn(3, 64), torch.randn(128, 3)
    number = layer.add_adapter("a", A, B, 0.5)
    x, W = torch.randn(4, 64), packed.up.weight.dequantize()
    y = layer(x, torch.tensor([number, -1, number, -1]))
    expected = x @ W.t() + packed.up.bias
    expected[::2] += 0.5 * (x[::2] @ A.t()) @ B.t()
    torch.testing.assert_close(y, expected)


def test_what_it_refuses_leaves_the_model_as_it_was():
    tied = model()
    tied.other = nn.Embedding(64, 128)
    tied.other.weight = tied.down.weight
    with pytest.raises(ValueError, match="down: expected a weight of its own, got one shared with other"):
        peftk.quantize(tied, "int8", target_modules=["up", "down"])
    odd = model()
    odd.down = nn.Linear(100, 64)
    with pytest.raises(ValueError, match="down: group: expected"):
        peftk.quantize(odd, "int4", target_modules=["up", "down"])
    for kept in (tied, odd):
        assert type(kept.up) is nn.Linear
        assert type(kept.down) is nn.Linear
    with pytest.raises(ValueError, match="format: expected one of"):
        peftk.quantize(model(), "int3", target_modules=["up"])
    twice = model()
    peftk.quantize(twice, "int8", target_modules=["up"])
    with pytest.raises(TypeError, match="up: linear: expected a plain weight, got one packed as int8"):
        peftk.quantize(twice, "int8", target_modules=["up"])


def test_a_conv1d():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    conv = transformers.Conv1D(128, 64)
    layer = QuantizedLinear.from_linear(conv, "int8")
    assert tuple(layer.weight.shape) == (128, 64)
    torch.testing.assert_close(layer(torch.eye(64)), layer.weight.dequantize().t() + conv.bias)

"""What tensor parallelism promises, checked on every rank against one process (`tests.support.ranks` runs it)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import peftk
from peftk.distributed import ColwiseParallel, RowwiseParallel
from peftk.nn.bitfit import BitFitLinear
from peftk.nn.frozen_linear import FrozenLinear
from peftk.nn.parallel_adapter import ParallelAdapterLinear
from peftk.reference import bounds
from peftk.system.sharded import whole

K, N, R, M = 24, 40, 3, 6
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    """|actual − expected| relative to the largest element of expected. The bounds of kernels are checked elsewhere."""
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)}, expected {list(expected.shape)}"
    error = float((actual.detach().double() - expected.detach().double()).abs().max())
    allowed = CLOSE[expected.dtype] * max(float(expected.detach().abs().max()), 1e-3)
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def randomise(module: nn.Module) -> None:
    """Values for adapters that begin as zero."""
    for name, parameter in module.named_parameters():
        if any(part in name for part in ("lora_", "bias_A", "bias_B")):
            nn.init.normal_(parameter, std=0.3)


def compare(
    layer: nn.Module, style: Any, mesh: DeviceMesh, *, call: Callable[[nn.Module, Tensor], Tensor] | None = None
) -> tuple[nn.Module, nn.Module]:
    """y, dx and the gradients of all Parameters, of the layer on all ranks and in one process."""
    call = call or (lambda module, x: module(x))
    sharded = parallelize_module(copy.deepcopy(layer), mesh, style)
    dtype = next(layer.parameters()).dtype
    x, dy = torch.randn(2, M, K, dtype=dtype), torch.randn(2, M, N, dtype=dtype)
    rowwise = isinstance(style, RowwiseParallel)
    x_alone = x.clone().requires_grad_()
    torch.manual_seed(7)
    y = call(layer, x_alone)
    y.backward(dy)
    x_rank = (part(x, 2, mesh) if rowwise else x).clone().requires_grad_()
    torch.manual_seed(7)
    y_rank = call(sharded, x_rank)
    y_rank.backward(dy if rowwise else part(dy, 2, mesh))
    close(y_rank, y if rowwise else part(y, 2, mesh), "y")
    assert x_alone.grad is not None
    assert x_rank.grad is not None
    close(x_rank.grad, part(x_alone.grad, 2, mesh) if rowwise else x_alone.grad, "dx")
    same_gradients(sharded, layer)
    with torch.no_grad():
        layer.eval(), sharded.eval()
        inference = call(sharded, x_rank.detach())
        close(inference, call(layer, x) if rowwise else part(call(layer, x), 2, mesh), "y in inference")
    return sharded, layer


def same_gradients(sharded: nn.Module, alone: nn.Module) -> None:
    expected = dict(alone.named_parameters())
    for name, parameter in sharded.named_parameters():
        grad = expected[name].grad
        assert (parameter.grad is None) == (grad is None), f"{name}: {parameter.grad}"
        if grad is not None and parameter.grad is not None:
            close(whole(parameter.grad), grad, f"the gradient of {name}")


def part(tensor: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    return tensor.chunk(mesh.size(), dim)[mesh.get_local_rank()]


def linear(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias, dtype=dtype)


def lora(dtype: torch.dtype = torch.float64, **options: Any) -> peftk.LoRALinear:
    layer = peftk.LoRALinear.from_linear(linear(dtype), r=R, lora_alpha=5, **options)
    randomise(layer)
    return layer


BOTH = (ColwiseParallel, RowwiseParallel)


def check_lora_linear(mesh: DeviceMesh) -> None:
    for style in BOTH:
        for dtype in (torch.float64, torch.float32):
            sharded, _ = compare(lora(dtype), style(), mesh)
            assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
        compare(lora(lora_bias=True), style(), mesh)


def check_placements(mesh: DeviceMesh) -> None:
    expected: dict[Any, dict[str, Any]] = {
        ColwiseParallel: {
            "weight": Shard(0), "bias": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0), "lora_bias": Shard(0),
        },
        RowwiseParallel: {
            "weight": Shard(1), "bias": Replicate(), "lora_A": Shard(1), "lora_B": Replicate(),
            "lora_bias": Replicate(),
        },
    }  # fmt: skip
    for style in BOTH:
        layer = parallelize_module(lora(lora_bias=True), mesh, style())
        found = {name: parameter.placements[0] for name, parameter in layer.named_parameters()}
        assert found == expected[style]


def check_bounds(mesh: DeviceMesh) -> None:
    """bf16 and fp32 against fp64, within the bounds of one process and a rounding for each rank's part of a sum."""
    for dtype in (torch.float32, torch.bfloat16):
        for style in BOTH:
            layer = lora(dtype)
            torch.manual_seed(2)
            x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
            A, B, s = layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), layer.scaling
            W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
            rowwise = style is RowwiseParallel
            sharded = parallelize_module(layer, mesh, style())
            x_rank = (part(x, 1, mesh) if rowwise else x).clone().requires_grad_()
            y = sharded(x_rank)
            y.backward(dy if rowwise else part(dy, 1, mesh))
            expected = bounds.forward(x, W, b, A, B, s)
            y_whole = y if rowwise else torch.cat(gathered(y, mesh), dim=1)
            more = (mesh.size() + 1) * bounds.UNIT[dtype] * expected.magnitude if rowwise else 0.0
            assert bounds.error(y_whole, expected, fused=True, more=more) <= 1.0
            gradients = bounds.backward(dy, x, W, A, B, s)
            dx = torch.cat(gathered(x_rank.grad, mesh), dim=1) if rowwise else x_rank.grad
            for name, grad in {"x": dx, "lora_A": layer.lora_A.grad, "lora_B": layer.lora_B.grad}.items():
                roundings = (mesh.size() + 1) * bounds.UNIT[grad.dtype] * gradients[name].magnitude
                assert bounds.error(whole(grad), gradients[name], fused=True, more=roundings) <= 1.0, name


def gathered(tensor: Any, mesh: DeviceMesh) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(mesh.size())]
    torch.distributed.all_gather(found, tensor.detach().contiguous(), group=mesh.get_group())
    return found


def check_other_layers(mesh: DeviceMesh) -> None:
    for style in BOTH:
        for activation in ("identity", "gelu"):
            layer: nn.Module = ParallelAdapterLinear.from_linear(linear(), bottleneck=R, activation=activation)
            randomise(layer)
            compare(layer, style(), mesh)
        compare(BitFitLinear.from_linear(linear()), style(), mesh)
        base = linear(bias=False)
        compare(FrozenLinear(base.weight, base.bias), style(), mesh)


def check_conv1d(mesh: DeviceMesh) -> None:
    from transformers.pytorch_utils import Conv1D

    for style in BOTH:
        torch.manual_seed(0)
        layer = peftk.LoRALinear.from_linear(Conv1D(N, K).double(), r=R)
        randomise(layer)
        compare(layer, style(), mesh)


def check_dropout(mesh: DeviceMesh) -> None:
    """The mask is that of one process, also where a rank sees a part of x, and although the ranks' seeds differ."""
    for style in BOTH:
        compare(lora(torch.float32, lora_dropout=0.4), style(), mesh)
        x = torch.randn(M, K, dtype=torch.float64)
        alone, sharded = lora(lora_dropout=0.4), parallelize_module(lora(lora_dropout=0.4), mesh, style())
        torch.manual_seed(0)
        alone(x).sum().backward()
        torch.manual_seed(mesh.get_local_rank())
        sharded(part(x, 1, mesh) if style is RowwiseParallel else x).sum().backward()
        same_gradients(sharded, alone)


def check_uneven(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    base = nn.Linear(K - 1, N - 1, dtype=torch.float64)
    alone = peftk.LoRALinear.from_linear(base, r=R)
    randomise(alone)
    x = torch.randn(M, K - 1, dtype=torch.float64)
    plan = {"0": ColwiseParallel(output_layouts=Replicate())}
    wide = parallelize_module(nn.Sequential(copy.deepcopy(alone)), mesh, plan)
    close(wide(x), alone(x), "uneven columns")
    deep = parallelize_module(nn.Sequential(copy.deepcopy(alone)), mesh, {"0": RowwiseParallel()})
    close(deep(part(x, 1, mesh)), alone(x), "uneven rows")


def check_layouts(mesh: DeviceMesh) -> None:
    """Inputs and outputs as torch's styles offer them: whole, split by rows of the batch, DTensors."""
    alone = lora()
    x = torch.randn(4 * mesh.size(), K, dtype=torch.float64)
    y = alone(x)
    cases = [
        (ColwiseParallel(output_layouts=Replicate()), x, y),
        (ColwiseParallel(input_layouts=Shard(0)), part(x, 0, mesh), part(y, 1, mesh)),
        (RowwiseParallel(input_layouts=Replicate()), x, y),
        (RowwiseParallel(output_layouts=Shard(0)), part(x, 1, mesh), part(y, 0, mesh)),
    ]
    for style, given, expected in cases:
        close(parallelize_module(copy.deepcopy(alone), mesh, style)(given), expected, repr(style))
    for style in (ColwiseParallel(use_local_output=False), RowwiseParallel(use_local_output=False)):
        for placement in (Replicate(), Shard(1)):
            found = parallelize_module(copy.deepcopy(alone), mesh, style)(distribute_tensor(x, mesh, [placement]))
            assert isinstance(found, DTensor)
            close(found.full_tensor(), y, repr(style))


def check_gradients_of_split_rows(mesh: DeviceMesh) -> None:
    """Outputs and inputs split by rows of the batch, as in sequence parallelism: a bias has a sum for a gradient."""
    x, dy = torch.randn(4 * mesh.size(), K, dtype=torch.float64), torch.randn(4 * mesh.size(), N, dtype=torch.float64)
    for make in (lambda: BitFitLinear.from_linear(linear()), lambda: lora(lora_bias=True)):
        for style in (RowwiseParallel(output_layouts=Shard(0)), ColwiseParallel(input_layouts=Shard(0))):
            alone, sharded = make(), parallelize_module(make(), mesh, style)
            rowwise = isinstance(style, RowwiseParallel)
            xs = [x.clone().requires_grad_(), part(x, 1 if rowwise else 0, mesh).clone().requires_grad_()]
            alone(xs[0]).backward(dy)
            sharded(xs[1]).backward(part(dy, 0 if rowwise else 1, mesh))
            same_gradients(sharded, alone)
            close(xs[1].grad, part(xs[0].grad, 1 if rowwise else 0, mesh), "dx")  # type: ignore[arg-type]


def check_mlp(mesh: DeviceMesh) -> None:
    """Colwise, then rowwise: nothing is exchanged between them."""
    torch.manual_seed(0)
    alone = nn.Sequential(
        peftk.LoRALinear.from_linear(nn.Linear(K, 16, dtype=torch.float64), r=R),
        nn.GELU(),
        peftk.LoRALinear.from_linear(nn.Linear(16, K, dtype=torch.float64), r=R),
    )
    randomise(alone)
    sharded = parallelize_module(copy.deepcopy(alone), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    xs = [torch.randn(M, K, dtype=torch.float64).requires_grad_()]
    xs.append(xs[0].detach().clone().requires_grad_())
    ys = [module(x) for module, x in zip((alone, sharded), xs, strict=True)]
    for y in ys:
        y.square().sum().backward()
    close(ys[1], ys[0], "y")
    close(xs[1].grad, xs[0].grad, "dx")  # type: ignore[arg-type]
    same_gradients(sharded, alone)


def check_collectives(mesh: DeviceMesh) -> None:
    """What is sent: nothing in a colwise forward, one sum in a rowwise one."""
    from torch.distributed.tensor.debug import CommDebugMode

    x = torch.randn(M, K, dtype=torch.float64)
    for style, sums in ((ColwiseParallel(), 0), (RowwiseParallel(), 1)):
        layer = parallelize_module(lora(), mesh, style)
        with CommDebugMode() as counted:
            layer(x if sums == 0 else part(x, 1, mesh))
        assert counted.get_total_counts() == sums, counted.get_comm_counts()


def multi(**options: Any) -> tuple[peftk.MultiLoRALinear, Tensor]:
    layer = peftk.MultiLoRALinear.from_linear(linear(torch.float32), max_adapters=5, **options)
    for name, rank in (("a", 2), ("gone", 3), ("b", 20)):
        layer.add_adapter(name, torch.randn(rank, K) / 5, torch.randn(N, rank), 0.7, bias=torch.randn(N))
    layer.remove_adapter("gone")
    layer.add_adapter("bias", None, None, bias=torch.randn(N))
    return layer, torch.tensor([layer.adapter_id("b"), -1, layer.adapter_id("a"), layer.adapter_id("bias")])


def same_outputs(sharded: Any, alone: Any, x: Tensor, ids: Tensor, mesh: DeviceMesh, *, rowwise: bool) -> None:
    y, found = alone(x, ids), sharded(part(x, 2, mesh) if rowwise else x, ids)
    close(found, y if rowwise else part(y, 2, mesh), "y")


def check_multi_lora_linear(mesh: DeviceMesh) -> None:
    """A mixed batch, adapters that are added before and after, and removed."""
    for style in BOTH:
        torch.manual_seed(0)
        alone, ids = multi()
        sharded = parallelize_module(copy.deepcopy(alone), mesh, style())
        rowwise = style is RowwiseParallel
        x = torch.randn(4, 3, K)

        same_outputs(sharded, alone, x, ids, mesh, rowwise=rowwise)
        A, B = torch.randn(7, K), torch.randn(N, 7)
        for layer in (alone, sharded):
            layer.remove_adapter("a")
            layer.add_adapter("new", A, B, 0.1)
        ids[2] = alone.adapter_id("new")
        assert sharded.adapter_id("new") == alone.adapter_id("new")
        same_outputs(sharded, alone, x, ids, mesh, rowwise=rowwise)


def check_trained_adapters(mesh: DeviceMesh) -> None:
    """Trainable adapters of one batch, added before and after the layer was sharded."""
    torch.manual_seed(0)
    tensors = [(torch.randn(r, K) / 5, torch.randn(N, r), torch.randn(N)) for r in (2, 5)]
    for style in BOTH:
        alone = peftk.MultiLoRALinear.from_linear(linear(torch.float32), max_adapters=3)
        layers = [alone, peftk.MultiLoRALinear.from_linear(linear(torch.float32), max_adapters=3)]
        for layer in layers:
            layer.add_adapter("before", *tensors[0][:2], 0.5, bias=tensors[0][2], trainable=True)
        parallelize_module(layers[1], mesh, style())
        for layer in layers:
            layer.add_adapter("after", *tensors[1][:2], 0.5, bias=tensors[1][2], trainable=True)
        torch.manual_seed(3)
        ids, x, dy = torch.tensor([1, -1, 0, 1]), torch.randn(4, 3, K), torch.randn(4, 3, N)
        rowwise = style is RowwiseParallel
        for _ in range(2):
            y = layers[0](x, ids)
            y.backward(dy)
            found = layers[1](part(x, 2, mesh) if rowwise else x, ids)
            found.backward(dy if rowwise else part(dy, 2, mesh))
            close(found, y if rowwise else part(y, 2, mesh), "y")
        same_gradients(layers[1], layers[0])


def check_mixed_activations(mesh: DeviceMesh) -> None:
    """LoRA, parallel adapters and a bias in one batch, stored and trainable ones, split both ways."""
    torch.manual_seed(0)
    tensors = [(torch.randn(r, K) / 5, torch.randn(N, r), torch.randn(r), torch.randn(N)) for r in (2, 5, 20, 3)]
    for style in BOTH:
        layers = [peftk.MultiLoRALinear.from_linear(linear(torch.float32), max_adapters=5) for _ in range(2)]
        for layer in layers:
            for name, activation in (("a", "gelu"), ("b", "identity")):
                A, B, a, beta = tensors[len(layer.bank.names)]
                layer.add_adapter(name, A, B, 0.5, activation=activation, bias_A=a, bias=beta)
        parallelize_module(layers[1], mesh, style())
        for layer in layers:
            for name, activation, trainable in (("c", "relu", False), ("d", "silu", True)):
                A, B, a, beta = tensors[len(layer.bank.names)]
                layer.add_adapter(name, A, B, 0.5, activation=activation, bias_A=a, bias=beta, trainable=trainable)
        torch.manual_seed(3)
        rowwise = style is RowwiseParallel
        for ids in (torch.tensor([3, 0, -1, 2, 1, 3]), torch.randint(-1, 4, (6, 3)), torch.full((6,), 1)):
            x, dy = torch.randn(6, 3, K), torch.randn(6, 3, N)
            xs = [x.clone().requires_grad_(), (part(x, 2, mesh) if rowwise else x).clone().requires_grad_()]
            y, found = layers[0](xs[0], ids), layers[1](xs[1], ids)
            close(found, y if rowwise else part(y, 2, mesh), "y")
            y.backward(dy)
            found.backward(dy if rowwise else part(dy, 2, mesh))
            close(xs[1].grad, part(xs[0].grad, 2, mesh) if rowwise else xs[0].grad, "dx")  # type: ignore[arg-type]
            same_gradients(layers[1], layers[0])


def check_refused(mesh: DeviceMesh) -> None:
    def refused(layer: nn.Module, style: Any, error: type[Exception], words: str) -> None:
        before = {name: id(parameter) for name, parameter in layer.named_parameters()}
        with pytest.raises(error, match=words):
            parallelize_module(layer, mesh, style)
        assert {name: id(parameter) for name, parameter in layer.named_parameters()} == before

    merged = lora()
    merged.merge()
    refused(merged, ColwiseParallel(), ValueError, "unmerged")
    sharded = parallelize_module(lora(), mesh, ColwiseParallel())
    refused(sharded, RowwiseParallel(), ValueError, "not sharded")
    tiny = peftk.LoRALinear.from_linear(nn.Linear(1, 1), r=1)
    refused(tiny, ColwiseParallel(), ValueError, "out_features")
    refused(tiny, RowwiseParallel(), ValueError, "in_features")
    many = peftk.MultiLoRALinear.from_linear(linear(torch.float32), max_adapters=2)
    A, B = torch.randn(R, K), torch.randn(N, R)
    parallelize_module(many, mesh, RowwiseParallel(output_layouts=Shard(0)))
    many.add_adapter("a", A, B, activation="relu")
    with pytest.raises(ValueError, match="lora_A"):
        many.add_adapter("c", A[:, :-1], B)
    assert list(many.bank.names) == ["a"]
    with pytest.raises(NotImplementedError, match="activation"):
        many(part(torch.randn(4, K), 1, mesh), torch.tensor([0, -1, 0, 0]))
    with pytest.raises(TypeError, match="weight: expected a dense tensor, got a DTensor"):
        sharded.merge()
    with pytest.raises(ValueError, match="x: expected shape"):
        sharded(torch.randn(M, K + 1))
    with pytest.raises(TypeError, match="x: expected a tensor"):
        sharded("x")

"""Tensors without plain dense storage: recognised before any address is taken; computed by torch, or refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import peftk
from peftk import _cpu, functional
from peftk.adapters import checks, table
from peftk.adapters.adapter import Adapter
from peftk.nn import ParallelAdapterLinear
from peftk.ops import composed, dispatch
from peftk.system import storage
from tests.support import storage_fuzz
from tests.support.paths import ROOT
from tests.support.storage_kinds import KINDS, Negated, OnlyLinear, Scaled
from tests.support.tiers import GOLDEN_RATIO, spread

READ = [
    "plain", "Parameter", "Buffer", "Parameter of a class of its own", "subclass without meaning", "inference", "apart",
    "transposed", "expanded", "overlapping", "mapped", "empty", "scalar", "half", "fp64", "int", "bool", "complex",
]  # fmt: skip
COMPUTED = {
    "quantizing subclass": "Scaled",
    "quantizing Parameter": "Scaled",
    "subclass of products": "OnlyLinear",
    "subclass by function": "Negated",
    "masked": "MaskedTensor",
    "fake": "FakeTensor",
    "negated view": "negated",
    "imaginary part": "negated",
    "zero tensor": "zero tensor",
    "meta": "meta",
    "functional": "functional",
    "leaked from grad": "torch.func",
}
REFUSED = {
    "leaked from vmap": "left its vmap",
    "coo": "torch.sparse_coo",
    "csr": "torch.sparse_csr",
    "csc": "torch.sparse_csc",
    "MKL-DNN": "_mkldnn",
    "nested": "nested",
    "jagged": "NestedTensor",
    "qint8": "qint8",
    "qint8 by channel": "qint8",
    "freed": "0 of 96 bytes",
    "freed, a view": "0 of 80000096 bytes",
    "freed in part": "4 of 96 bytes",
    "lazy": "UninitializedParameter",
    "list": "list",
}


def tensor_of_kind(kind: str) -> Tensor:
    unusual, _ = KINDS[kind](torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    return unusual


@pytest.mark.parametrize("kind", READ)
def test_kernels_read_what_is_dense(kind):
    assert storage.reason(tensor_of_kind(kind)) is None
    assert storage.dense(tensor_of_kind(kind))
    checks.dense("x", tensor_of_kind(kind))


@pytest.mark.parametrize("kind", [*COMPUTED, *REFUSED])
def test_other_kinds_are_named_and_computed_or_refused(kind):
    unusual = tensor_of_kind(kind)
    assert {**COMPUTED, **REFUSED}[kind] in storage.reason(unusual)
    assert not storage.dense(unusual)
    assert not storage.dense(torch.zeros(2), None, unusual)
    assert not _cpu.dense(unusual)
    assert storage.by_torch(unusual) is (kind in COMPUTED)
    with pytest.raises(TypeError, match=r"^x: expected a (dense )?tensor"):
        checks.dense("x", unusual)


def test_no_kind_is_forgotten():
    shapes_and_types = {"empty at the end", "one more dimension", "longer", "fp8", "bits", "array", "None", "text"}
    assert set(KINDS) == {*READ, *COMPUTED, *REFUSED, *shapes_and_types, "dual, ended", "DTensor"}


def test_cpp_and_python_checks_agree(monkeypatch):
    """The C++ module recognises only exact types, and leaves subclasses to Python."""
    for kind in [*READ, *COMPUTED, *REFUSED]:
        unusual = tensor_of_kind(kind)
        quick = _cpu.dense(unusual)
        assert quick is (storage.reason(unusual) is None and type(unusual) in (Tensor, nn.Parameter)), kind
    monkeypatch.setattr(storage, "_cpu", None)
    assert all(storage.dense(tensor_of_kind(kind)) for kind in READ)
    assert not any(storage.dense(tensor_of_kind(kind)) for kind in [*COMPUTED, *REFUSED])


def test_all_on_one_device():
    assert not storage.dense(torch.zeros(2), torch.zeros(2, device="meta"))
    assert storage.dense(None)
    assert storage.dense()


def test_memory_that_ends_within_the_last_row():
    storage_tensor = torch.zeros(20)
    whole, later, sparse, repeated = (
        ((3, 4), (4, 1), 0, 48),
        ((3, 4), (4, 1), 5, 68),
        ((3,), (7,), 2, 68),
        ((2, 2), (0, 1), 0, 8),
    )
    for shape, strides, offset, bytes_ in (whole, later, sparse, repeated):
        view = storage_tensor.clone().as_strided(shape, strides, offset)
        assert storage.dense(view)
        view.untyped_storage().resize_(bytes_)
        assert storage.dense(view), "exactly as much memory as it needs"
        view.untyped_storage().resize_(bytes_ - 1)
        assert not storage.dense(view)
        assert not _cpu.dense(view)


# ---- entry points, in a child process -------------------------------------------------------------------------------

DRAWN = sorted(range(len(storage_fuzz.CASES)), key=lambda number: number * GOLDEN_RATIO % 1)
CHUNKS = [DRAWN[:80], *(DRAWN[first : first + 1500] for first in range(80, len(DRAWN), 1500))]


@pytest.mark.parametrize("numbers", spread([(chunk,) for chunk in CHUNKS], default=1, full=0))
def test_no_tensor_is_read_wrongly_or_kills_the_process(numbers):
    """Kinds × entry points × arguments: the values of plain torch, or an error that says what was expected."""
    wrong, remaining = [], list(numbers)
    while remaining and len(wrong) < 20:
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.storage_fuzz", *map(str, remaining)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        lines = [line.partition(" ") for line in done.stdout.splitlines()]
        outcomes = {int(number): what for number, _, what in lines if number.isdigit()}
        last = max(outcomes, key=remaining.index, default=remaining[0])
        if done.returncode != 0:
            outcomes[last] = f"the process ended with {done.returncode}: {done.stderr[-500:]}"
        wrong += [f"{storage_fuzz.CASES[n]}: {what}" for n, what in outcomes.items() if what not in FINE]
        remaining = remaining[remaining.index(last) + 1 :]
    assert not wrong, "\n".join(wrong)
    assert not remaining


FINE = ("right", "refused", "unmade")


# ---- layers over weights of a subclass ------------------------------------------------------------------------------


def quantized(kind: type[Scaled] = Scaled, K: int = 16, N: int = 24) -> tuple[nn.Linear, nn.Linear]:
    """A linear layer whose weight is a tensor subclass, and a plain one with the same values."""
    torch.manual_seed(0)
    plain = nn.Linear(K, N).requires_grad_(False)
    scale = plain.weight.abs().max() / 127
    q = (plain.weight / scale).round().to(torch.int8)
    plain.weight.copy_(q * scale)
    linear = copy.deepcopy(plain)
    linear.weight = nn.Parameter(kind(q, scale), requires_grad=False)
    return linear, plain


@pytest.mark.parametrize("kind", [Scaled, OnlyLinear])
def test_a_model_over_quantized_weights_trains_as_over_plain_ones(kind):
    linear, plain = quantized(kind)
    config = peftk.LoraConfig(r=4, target_modules=["0"])
    models = [nn.Sequential(linear), nn.Sequential(plain)]
    x, grads = torch.randn(5, 16), []
    for model in models:
        peftk.inject(model, config)
        torch.manual_seed(1)
        nn.init.normal_(model[0].lora_A)
        nn.init.normal_(model[0].lora_B)
        inputs = x.clone().requires_grad_()
        model(inputs).square().sum().backward()
        grads.append((model(x), inputs.grad, model[0].lora_A.grad, model[0].lora_B.grad))
        with torch.no_grad():
            torch.testing.assert_close(model(x), grads[-1][0])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert isinstance(models[0][0].weight.data, kind)
    with pytest.raises(TypeError, match=f"weight: expected a dense tensor, got a {kind.__name__}"):
        peftk.merge_adapter(models[0])


def test_many_adapters_over_a_quantized_weight(tmp_path):
    linear, plain = quantized()
    model, reference = nn.Sequential(linear), nn.Sequential(plain)
    peftk.inject(reference, peftk.LoraConfig(r=4, target_modules=["0"]))
    nn.init.normal_(reference[0].lora_B)
    peftk.save_adapter(reference, tmp_path)
    server = peftk.MultiAdapter(model, max_adapters=4)
    server.load("alice", tmp_path)
    x = torch.randn(3, 2, 16)
    base = plain(x)
    with torch.no_grad(), server.route([None, "alice", None]):
        y = model(x)
    torch.testing.assert_close(y, torch.stack([base[0], reference(x)[1].detach(), base[2]]), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"ids\[1\]: expected -1 or an adapter's number"):
        model[0](torch.randn(2, 16), torch.tensor([-1, 3]))


def test_a_weight_that_is_quantized_under_a_layer():
    """The direct call notices it too, and nothing cached earlier is used."""
    linear, plain = quantized()
    layer = peftk.LoRALinear.from_linear(plain, r=4)
    x = torch.randn(5, 16)
    with torch.no_grad():
        before = layer(x)
        layer.weight = linear.weight
        torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-5)
        layer.to("meta")
        assert layer(x.to("meta")).is_meta
        with pytest.raises(ValueError, match="x: expected on meta"):
            layer(x)
        layer.to_empty(device="cpu").load_state_dict(peftk.LoRALinear.from_linear(plain, r=4).state_dict())
        layer.lora_B.zero_()
        torch.testing.assert_close(layer(x), plain(x))


def test_a_forced_backend_does_not_give_way():
    linear, _ = quantized()
    with pytest.raises(peftk.BackendError, match="'cpu' was forced and cannot run lora_linear: it got a Scaled"):
        functional.lora_linear(torch.randn(2, 16), linear.weight, backend="cpu")
    y = functional.lora_linear(torch.randn(2, 16), linear.weight, backend="reference")
    assert y.shape == (2, 24)


def test_errors_of_torch_name_the_kind_of_tensor():
    weight = torch.randn(4, 6).to("meta")
    with pytest.raises(ValueError, match="x: expected on meta"):
        functional.lora_linear(torch.randn(2, 6), weight)
    masked = torch.masked.masked_tensor(torch.randn(4, 6), torch.ones(4, 6, dtype=torch.bool))
    with pytest.raises((TypeError, RuntimeError), match=r"lora_linear: expected dense .* got a MaskedTensor"):
        functional.lora_linear(torch.randn(2, 6), torch.randn(4, 6), None, masked, torch.randn(4, 4))


def test_a_subclass_with_torch_function_only():
    weight = torch.randn(4, 6)
    y = functional.lora_linear(x := torch.randn(2, 6), weight.neg().as_subclass(Negated))
    torch.testing.assert_close(torch.Tensor(y), x @ weight.t())


# ---- memory that goes away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "bias", "lora_A", "lora_B"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_layer_whose_memory_was_freed(name, grad):
    layer = peftk.LoRALinear.from_linear(nn.Linear(8, 8), r=2)
    x = torch.randn(3, 8)
    with torch.set_grad_enabled(grad):
        layer(x)
        getattr(layer, name).untyped_storage().resize_(0)
        with pytest.raises(TypeError, match=f"{name}: expected a dense tensor, got one whose memory has 0 of"):
            layer(x)


def test_memory_that_is_freed_between_forward_and_backward():
    layer = peftk.LoRALinear.from_linear(nn.Linear(8, 8), r=2)
    x = torch.randn(3, 8, requires_grad=True)
    y = layer(x)
    storage_tensor = layer.weight.untyped_storage()
    size, kept = storage_tensor.nbytes(), layer.weight.detach().clone()
    storage_tensor.resize_(0)
    with pytest.raises(RuntimeError, match="backward: expected a saved tensor to be dense, got one whose memory"):
        y.sum().backward(retain_graph=True)
    storage_tensor.resize_(size)
    layer.weight.data.copy_(kept)  # as FSDP does when it gathers it again
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept.sum(0).expand(3, 8) + layer.lora_B.sum(0) @ layer.lora_A)


def test_a_weight_that_is_freed_where_no_gradient_reads_it():
    """FSDP frees it after the forward. The first layer of a model needs no gradient of its input."""
    layer = peftk.LoRALinear.from_linear(nn.Linear(8, 8), r=2)
    y = layer(x := torch.randn(3, 8))
    layer.weight.untyped_storage().resize_(0)
    y.sum().backward()
    torch.testing.assert_close(layer.lora_B.grad, (x @ layer.lora_A.detach().t()).sum(0).expand(8, 2))


def test_many_adapters_of_which_one_was_freed():
    layer = peftk.MultiLoRALinear.from_linear(nn.Linear(8, 8), max_adapters=2)
    layer.add_adapter("one", torch.randn(2, 8), torch.randn(8, 2), trainable=True)
    x, ids = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64)
    y = layer(x, ids)
    layer.trained["slot0"].lora_A.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="lora_A: expected a dense tensor, got one whose memory"):
        layer(x, ids)
    with pytest.raises((TypeError, RuntimeError), match="expected"):
        y.sum().backward()


def test_a_users_table_whose_parameters_have_moved():
    A, B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))
    adapters = table.build((Adapter((A,), (B,), 1.0),), dtype=torch.float32, device=torch.device("cpu"))
    x, weight, ids = torch.randn(3, 8), torch.randn(8, 8), torch.zeros(3, dtype=torch.int64)
    A.data = torch.randn(2, 8)
    with torch.no_grad():
        y = functional.multi_lora_linear(x, weight, None, adapters, ids)
        torch.testing.assert_close(y, x @ weight.t() + x @ A.t() @ B.t(), atol=1e-5, rtol=1e-5)
        A.untyped_storage().resize_(0)
        with pytest.raises(TypeError, match=r"adapters\[0\]: expected dense tensors, got one whose memory"):
            functional.multi_lora_linear(x, weight, None, adapters, ids)
    with pytest.raises(TypeError, match="expected dense tensors, got a negated"):
        table.build((Adapter((torch._neg_view(B.t()),), (B,), 1.0),), dtype=torch.float32, device=torch.device("cpu"))


def test_a_bank_that_is_elsewhere():
    """A model moved to meta whose weights were loaded again, but not its bank."""
    layer = peftk.MultiLoRALinear.from_linear(nn.Linear(8, 8), max_adapters=2)
    layer.add_adapter("one", torch.randn(2, 8), torch.randn(8, 2))
    weights = copy.deepcopy(layer.state_dict())
    layer.to("meta").load_state_dict(weights, assign=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="bank: expected on cpu like x, got meta"):
            layer(torch.randn(3, 8), torch.zeros(3, dtype=torch.int64))


# ---- tensors replaced after a layer was made ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("weight", torch.randn(8, 5), "x: expected shape"),
        ("weight", torch.randn(5, 8), "expected lora_A"),
        ("weight", torch.randn(8, 8).int(), "weight: expected dtype"),
        ("bias", torch.randn(7), "bias: expected shape"),
        ("bias", torch.randn(8).int(), "bias: expected dtype"),
        ("lora_A", torch.randn(2, 9), "expected lora_A"),
        ("lora_A", torch.randn(8), "expected lora_A"),
        ("lora_A", torch.tensor(1.0), "expected lora_A"),
        ("lora_A", torch.randn(3, 8), "expected lora_A"),
        ("lora_A", None, "lora_A: expected a tensor"),
        ("lora_B", None, "lora_B: expected a tensor"),
        ("lora_A", torch.randn(2, 8).half(), "of one dtype"),
        ("bias_A", torch.randn(3), "bias_A"),
        ("bias_B", torch.randn(9), "bias_B"),
    ],
)
def test_a_replaced_tensor_that_does_not_fit(name, value, says):
    layer = ParallelAdapterLinear.from_linear(nn.Linear(8, 8), bottleneck=2)
    layer._parameters[name] = value
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises((TypeError, ValueError), match=says):
            layer(torch.randn(3, 8))


def test_a_replaced_tensor_with_strides():
    layer = ParallelAdapterLinear.from_linear(nn.Linear(8, 8), bottleneck=2, activation="gelu").requires_grad_(False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 8)
    expected = layer(x)
    for name, parameter in list(layer._parameters.items()):
        storage_tensor = torch.full([2 * size for size in parameter.shape], torch.nan)
        layer._parameters[name] = storage_tensor[tuple(slice(None, None, 2) for _ in parameter.shape)].copy_(parameter)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer(x), expected)


def test_rank_0_is_no_adapter():
    layer = peftk.LoRALinear.from_linear(nn.Linear(8, 8), r=2)
    layer.lora_A, layer.lora_B = nn.Parameter(torch.zeros(0, 8)), nn.Parameter(torch.zeros(8, 0))
    x = torch.randn(3, 8)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


def test_rows_with_huge_strides():
    """Tests the address arithmetic; pages that are not touched take no memory."""
    storage_tensor = torch.empty(2**30 + 8)
    x = storage_tensor.as_strided((2, 8), (2**30, 1))
    x.copy_(torch.randn(2, 8))
    layer = peftk.LoRALinear.from_linear(nn.Linear(8, 4), r=2)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x), expected)


def test_the_direct_call_takes_only_dense_tensors():
    weight, bias, A, B = torch.randn(4, 6), torch.randn(4), torch.randn(2, 6), torch.randn(4, 2)
    inputs = {"x": torch.randn(3, 6), "weight": weight, "bias": bias, "lora_A": A, "lora_B": B}
    with torch.no_grad():
        assert dispatch.direct_lora_linear(**inputs, scaling=1.0) is not None
        for name, kind in ((name, kind) for name in inputs for kind in (*COMPUTED, *REFUSED)):
            try:
                unusual, _ = KINDS[kind](inputs[name])
            except (RuntimeError, TypeError):
                continue
            if isinstance(unusual, Tensor):
                assert dispatch.direct_lora_linear(**{**inputs, name: unusual}, scaling=1.0) is None, (name, kind)


def test_torch_computes_only_what_kernels_cannot():
    x, weight = torch.randn(3, 8), torch.randn(8, 8)
    assert not composed.should_run(False, x, weight, None)
    assert composed.should_run(False, torch._neg_view(x), weight)
    assert not composed.should_run(True, torch._neg_view(x), weight), "a custom op gets a resolved tensor"


def test_a_table_without_any_adapter_where_torch_computes() -> None:
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    none = table.build((), dtype=torch.float32, device=torch.device("cpu"))
    y = functional.multi_lora_linear(torch._neg_view(x), weight, None, none, torch.tensor([-1, -1, -1]))
    torch.testing.assert_close(y, -x @ weight.t())
    with pytest.raises(ValueError, match="ids"):
        functional.multi_lora_linear(torch._neg_view(x), weight, None, none, torch.tensor([-1, 0, -1]))

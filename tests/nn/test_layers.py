"""Tests of LoRALinear and MultiLoRALinear as drop-in replacements for nn.Linear."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import peftk
from peftk import LoRALinear, MultiLoRALinear
from tests.support.tiers import FULL


def trained(linear: nn.Linear, **kwargs: object) -> LoRALinear:
    layer = LoRALinear.from_linear(linear, **{"r": 4, "lora_alpha": 8, **kwargs})
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identity_at_initialisation(dtype: torch.dtype) -> None:
    linear = nn.Linear(37, 19, dtype=dtype)
    x = torch.randn(5, 37, dtype=dtype)
    layer = LoRALinear.from_linear(linear, r=4)
    assert torch.equal(layer(x), peftk.functional.lora_linear(x, linear.weight.detach(), linear.bias.detach()))
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.weight is linear.weight
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_it_trains() -> None:
    torch.manual_seed(0)
    layer = LoRALinear.from_linear(nn.Linear(16, 16), r=4, lora_dropout=0.1)
    weight = layer.weight.clone()
    x, target = torch.randn(64, 16), torch.randn(64, 16)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(layer.weight, weight)


def test_dropout_only_in_training() -> None:
    layer, x = trained(nn.Linear(8, 8), lora_dropout=0.5), torch.randn(4, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_and_unmerging_many_times(dtype: torch.dtype) -> None:
    layer = trained(nn.Linear(67, 43, dtype=dtype)).eval()
    before, x = layer.weight.clone(), torch.randn(3, 67, dtype=dtype)
    y = layer(x)
    for _ in range(30):
        layer.merge()
        layer.merge()  # a second one changes nothing
        assert layer.merged
        assert not torch.equal(layer.weight, before)
        torch.testing.assert_close(layer(x), y, atol=0.1, rtol=0.05)
        with torch.no_grad():
            layer.lora_A.add_(0.01)  # the receipt does not depend on it
        layer.unmerge()
        layer.unmerge()
        assert torch.equal(layer.weight, before)
        with torch.no_grad():
            layer.lora_A.sub_(0.01)
    torch.testing.assert_close(layer(x), y)


def test_a_merge_that_would_not_be_finite_changes_nothing() -> None:
    layer = trained(nn.Linear(8, 8, dtype=torch.float16))
    nn.init.constant_(layer.lora_B, 1e5)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=r"expected W \+ s·BA to be finite"):
        layer.merge()
    assert torch.equal(layer.weight, before)
    assert not layer.merged


def test_unmerge_refuses_a_weight_that_changed() -> None:
    layer = trained(nn.Linear(8, 8))
    layer.merge()
    with torch.no_grad():
        layer.weight[3, 4] += 1.0
    changed = layer.weight.clone()
    with pytest.raises(ValueError, match="weight: expected the bits that the merge left"):
        layer.unmerge()
    assert torch.equal(layer.weight, changed)
    assert layer.merged


def test_receipts_belong_to_one_weight() -> None:
    A, B = torch.randn(2, 8), torch.randn(8, 2)
    weight = torch.randn(8, 8)
    receipt = peftk.functional.merge_(weight, A, B, 1.0)
    for other, message in [
        (torch.randn(8, 9), "shape"),
        (torch.randn(8, 8).half(), "dtype"),
        (torch.randn(8, 8), "the bits that the merge left"),
    ]:
        with pytest.raises(ValueError, match=message):
            peftk.functional.unmerge_(other, receipt)
    with pytest.raises(TypeError, match="receipt: expected the MergeReceipt"):
        peftk.functional.unmerge_(weight, "receipt")
    swapped = weight[[1, 0, *range(2, 8)]]
    with pytest.raises(ValueError, match="the bits that the merge left"):
        peftk.functional.unmerge_(swapped, receipt)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"r": 0}, ValueError, "r: expected an integer of 1 or more, got 0"),
        ({"r": -2}, ValueError, "r: expected"),
        ({"r": 1.5}, ValueError, "r: expected"),
        ({"r": 2, "lora_alpha": float("nan")}, ValueError, "lora_alpha: expected a finite number"),
        ({"r": 2, "lora_dropout": 1.0}, ValueError, "dropout_p: expected"),
    ],
)
def test_bad_hyper_parameters(arguments: dict, error: type[Exception], message: str) -> None:  # type: ignore[type-arg]
    linear = nn.Linear(4, 4)
    with pytest.raises(error, match=message):
        LoRALinear.from_linear(linear, **arguments)
    assert linear.weight.requires_grad


def test_only_linears_are_replaced() -> None:
    for cls in (LoRALinear, MultiLoRALinear):
        with pytest.raises(TypeError, match=r"linear: expected an nn.Linear or a Conv1D, got Conv1d"):
            cls.from_linear(nn.Conv1d(2, 2, 1))


def test_rslora_scaling() -> None:
    assert trained(nn.Linear(4, 4), r=16, lora_alpha=8, use_rslora=True).scaling == 2.0
    assert trained(nn.Linear(4, 4), r=16, lora_alpha=8).scaling == 0.5


@pytest.mark.parametrize(
    ("backend", "train"),
    [
        *itertools.product(["eager", "aot_eager"], [False, True]),
        ("inductor", True),
        pytest.param("inductor", False, marks=pytest.mark.full),
    ],
)
@torch._inductor.config.patch(force_disable_caches=True)  # an older peftk may have left entries there
def test_compile_without_graph_breaks(backend: str, train: bool) -> None:
    torch._dynamo.reset()
    lora = trained(nn.Linear(16, 24)).train(train)
    multi = mixed_layer(16, 24)
    ids = torch.tensor([0, -1, 2, 1])
    x = torch.randn(4, 16, requires_grad=train)
    for layer, arguments in ((lora, ()), (multi, (ids,))):
        eager = layer(x, *arguments)
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x, *arguments), eager)
        if train:
            parameters = [x, *(p for p in layer.parameters() if p.requires_grad)]
            dy = torch.randn_like(eager)
            expected = torch.autograd.grad(eager, parameters, dy, retain_graph=True)
            for actual, wanted in zip(
                torch.autograd.grad(compiled(x, *arguments), parameters, dy), expected, strict=True
            ):
                torch.testing.assert_close(actual, wanted)


def mixed_layer(K: int, N: int) -> MultiLoRALinear:
    layer = MultiLoRALinear.from_linear(nn.Linear(K, N), max_adapters=5)
    layer.add_adapter("a", torch.randn(3, K), torch.randn(N, 3), 2.0)
    layer.add_adapter("b", torch.randn(40, K), torch.randn(N, 40), 0.5, trainable=True, bias=torch.randn(N))
    layer.add_adapter("c", None, None, bias=torch.randn(N))
    return layer


def test_mixed_batch_equals_each_adapter_alone() -> None:
    layer, x = mixed_layer(24, 20), torch.randn(9, 24)
    ids = torch.tensor([2, 0, -1, 1, 1, 0, -1, 2, 1])
    mixed = layer(x, ids)
    for number in (-1, 0, 1, 2):
        alone = layer(x, torch.full((9,), number))
        assert torch.equal(mixed[ids == number], alone[ids == number])
    assert torch.equal(layer(x), layer(x, torch.full((9,), -1)))


def test_a_mixed_batch_trains_only_the_adapters_in_it() -> None:
    layer = MultiLoRALinear.from_linear(nn.Linear(8, 8), max_adapters=3)
    for name in "abc":
        layer.add_adapter(name, torch.randn(4, 8), torch.zeros(8, 4), 1.0, trainable=True)
    ids = torch.tensor([layer.adapter_id("a"), layer.adapter_id("c"), -1])
    layer(torch.randn(3, 8), ids).square().sum().backward()
    grads = {name: layer.trained[f"slot{layer.adapter_id(name)}"].lora_B.grad.abs().sum() for name in "abc"}
    assert grads["a"] > 0
    assert grads["c"] > 0
    assert grads["b"] == 0


def test_names_slots_and_removal() -> None:
    layer = mixed_layer(8, 8)
    assert [layer.adapter_id(n) for n in "abc"] == [0, 1, 2]
    with pytest.raises(ValueError, match="name: expected a new one, got 'b'"):
        layer.add_adapter("b", torch.randn(2, 8), torch.randn(8, 2), trainable=True)
    layer.remove_adapter("b")
    assert not layer.trained
    with pytest.raises(ValueError, match="name: expected a loaded adapter"):
        layer.adapter_id("b")
    with pytest.raises(ValueError, match=r"ids\[0\]: .* got 1, an empty slot"):
        layer(torch.randn(1, 8), torch.tensor([1]))
    assert layer.add_adapter("d", torch.randn(2, 8), torch.randn(8, 2)) == 3


def test_an_optimizer_step_and_a_move_are_seen() -> None:
    layer, x = mixed_layer(8, 8), torch.randn(2, 8)
    ids = torch.tensor([1, 0])
    before = layer(x, ids)
    with torch.no_grad():
        layer.trained.slot1.lora_B.add_(1.0)
    assert not torch.equal(layer(x, ids)[0], before[0])
    layer.double()
    assert layer(x.double(), ids).dtype == torch.float64
    torch.testing.assert_close(layer.float()(x, ids)[1], before[1])


def test_copies_and_pickles_work_without_the_original() -> None:
    ids, x = torch.tensor([1, 0]), torch.randn(2, 8)
    layer = mixed_layer(8, 8)
    y = layer(x, ids)
    copied, loaded = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    del layer
    assert torch.equal(copied(x, ids), y)
    assert torch.equal(loaded(x, ids), y)
    lora = trained(nn.Linear(8, 8))
    lora.merge()
    other = copy.deepcopy(lora)
    other.unmerge()
    assert lora.merged
    assert not other.merged


def test_state_dict_round_trip() -> None:
    layer, other = trained(nn.Linear(8, 8)), trained(nn.Linear(8, 8))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8)
    assert torch.equal(layer(x), other(x))
    assert sorted(layer.state_dict()) == ["bias", "lora_A", "lora_B", "weight"]


def test_tensors_that_no_longer_fit_are_refused() -> None:
    layer, x = trained(nn.Linear(8, 8)), torch.randn(2, 8)
    for name, wrong in [
        ("lora_B", torch.ones(3, 4)),
        ("lora_A", torch.ones(4, 7)),
        ("lora_A", torch.ones(4, 8).half()),
        ("bias", torch.ones(5)),
    ]:
        good = getattr(layer, name)
        setattr(layer, name, nn.Parameter(wrong, requires_grad=False))
        with pytest.raises(ValueError, match="expected"):
            layer(x)
        setattr(layer, name, good)
    layer.requires_grad_(True)
    with pytest.raises(ValueError, match="weight: expected a frozen weight"):
        layer(x)
    multi = mixed_layer(8, 8)
    multi.bias = nn.Parameter(torch.ones(5), requires_grad=False)
    for ids in (None, torch.tensor([0, -1])):
        with pytest.raises(ValueError, match=r"bias: expected shape \[8\], got \[5\]"):
            multi(x, ids)


def test_a_weight_of_another_shape_than_the_adapters_is_refused() -> None:
    layer = MultiLoRALinear.from_linear(nn.Linear(30, 20, bias=False))
    layer.add_adapter("a", torch.randn(2, 30), torch.randn(20, 2))
    layer.weight.data = torch.randn(160, 30)
    ids = torch.zeros(3, dtype=torch.int64)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"weight: expected \[20, 30\]"):
            layer(torch.randn(3, 30), ids)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_defaults_of_torch_do_not_matter(device: str, dtype: torch.dtype) -> None:
    """torch.set_default_device and set_default_dtype: kernels write by address."""
    single = LoRALinear.from_linear(nn.Linear(30, 20), r=20, lora_dropout=0.3)
    several = MultiLoRALinear.from_linear(nn.Linear(30, 20))
    several.add_adapter("a", torch.randn(20, 30), torch.randn(20, 20), trainable=True)
    nn.init.normal_(single.lora_B)
    x, ids = torch.randn(40, 30), torch.zeros(40, dtype=torch.int64)
    base = single.weight.clone()

    def results() -> list[torch.Tensor]:
        torch.manual_seed(0)  # for dropout
        several.bank._cached_table = None  # rebuild the table too
        own = x.clone().requires_grad_()
        outputs = [single(own), several(own, ids)]
        trained = [own, *(p for layer in (single, several) for p in layer.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(outputs, trained, [torch.ones_like(y) for y in outputs])
        single.merge()
        merged = single.weight.clone()
        single.unmerge()
        return [y.detach() for y in outputs] + [*gradients, merged]

    expected = results()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            got = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(single.weight, base)


def test_a_trained_adapter_that_changes_in_place_is_seen() -> None:
    """Fewer ranks at the same address, another scaling."""
    layer = MultiLoRALinear.from_linear(nn.Linear(30, 20, bias=False))
    layer.add_adapter("a", torch.randn(20, 30), torch.randn(20, 20), trainable=True)
    adapter, x, ids = layer.trained["slot0"], torch.randn(3, 30), torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        layer(x, ids)
        adapter.lora_A.data, adapter.lora_B.data = adapter.lora_A[:5], adapter.lora_B[:, :5]
        for adapter.scaling in (1.0, 0.5):
            expected = nn.functional.linear(x, layer.weight + adapter.scaling * adapter.lora_B @ adapter.lora_A)
            torch.testing.assert_close(layer(x, ids), expected, rtol=1e-4, atol=1e-4)


def test_trained_adapters_are_read_where_they_are_now() -> None:
    layer, x, ids = mixed_layer(8, 8), torch.randn(2, 8), torch.tensor([1, 1])
    base = layer(x, torch.tensor([-1, -1]))
    state = {key: torch.zeros_like(value) if "trained" in key else value for key, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    torch.testing.assert_close(layer(x, ids), base)
    trained_adapter = layer.trained.slot1.requires_grad_(False)
    trained_adapter.lora_A.data, trained_adapter.lora_B.data = torch.ones(40, 8), torch.ones(8, 40)
    torch.testing.assert_close(layer(x, ids), base + 0.5 * 40 * x.sum(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_conversion_before_and_after_adapters_come(dtype: torch.dtype) -> None:
    for before in (True, False):
        layer = MultiLoRALinear.from_linear(nn.Linear(8, 8), max_adapters=3)
        if before:
            layer.to(dtype)
        layer.add_adapter("a", torch.ones(2, 8), torch.ones(8, 2), trainable=True)
        layer.add_adapter("b", torch.ones(2, 8), torch.ones(8, 2))
        layer.to(dtype)
        x = torch.ones(3, 8, dtype=dtype)
        y = layer(x, torch.tensor([0, 1, -1]))
        torch.testing.assert_close(y[0] - y[2], torch.full((8,), 16.0, dtype=dtype), atol=0.05, rtol=0.01)
        torch.testing.assert_close(y[1], y[0])
    meta = MultiLoRALinear.from_linear(nn.Linear(8, 8)).to("meta")
    assert meta.bank.device.type == "meta"


@pytest.mark.parametrize("slot", [-1, 99, True, "x"])
def test_bad_slots(slot: object) -> None:
    with pytest.raises(ValueError, match="slot: expected a number below 5"):
        mixed_layer(8, 8).add_adapter("x", torch.ones(2, 8), torch.ones(8, 2), slot=slot)


def test_a_bad_adapter_dtype_leaves_the_linear_as_it_was() -> None:
    linear = nn.Linear(4, 4)
    for cls in (LoRALinear, MultiLoRALinear):
        for dtype in (torch.int8, torch.float64, "float32"):
            with pytest.raises(TypeError, match="adapter_dtype: expected"):
                cls.from_linear(linear, adapter_dtype=dtype)
    assert linear.weight.requires_grad


def test_a_merged_layer_refuses_another_state() -> None:
    layer, other = trained(nn.Linear(8, 8)), trained(nn.Linear(8, 8))
    before = layer.weight.clone()
    layer.merge()
    with pytest.raises(RuntimeError, match="expected an unmerged layer, got a merged one"):
        layer.load_state_dict(other.state_dict())
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_overlapping_weights_are_not_merged() -> None:
    A, B = torch.ones(1, 4), torch.ones(4, 1)
    for weight in (torch.ones(1, 4).expand(4, 4), torch.ones(7).as_strided((4, 4), (1, 1))):
        before = weight.clone()
        with pytest.raises(ValueError, match="weight: expected elements that do not overlap"):
            peftk.functional.merge_(weight, A, B)
        assert torch.equal(weight, before)
    transposed = torch.randn(5, 4).t()
    before = transposed.clone()
    peftk.functional.unmerge_(transposed, peftk.functional.merge_(transposed, torch.ones(1, 5), B))
    assert torch.equal(transposed, before)


@pytest.mark.parametrize("mode", [torch.no_grad, pytest.param(torch.inference_mode, marks=FULL)])
def test_compile_without_gradients_has_no_graph_break(mode: type) -> None:
    torch._dynamo.reset()
    one = LoRALinear.from_linear(nn.Linear(8, 6), r=3, lora_alpha=3)
    nn.init.normal_(one.lora_B)
    many, x, ids = mixed_layer(8, 6), torch.randn(2, 8), torch.tensor([0, -1])
    with mode():
        for layer, inputs in ((one, (x,)), (many, (x, ids))):
            assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(*inputs), layer(*inputs))


def test_compile_without_ids_is_the_base_layer() -> None:
    torch._dynamo.reset()
    layer, x = mixed_layer(8, 8), torch.randn(2, 8)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "record", [lambda f, *a: torch.jit.trace(f, a, check_trace=False), lambda f, *a: make_fx(f)(*a)]
)
def test_recorders_of_ops_see_ours(record) -> None:  # type: ignore[no-untyped-def]
    lora, multi = trained(nn.Linear(16, 24)).eval(), mixed_layer(16, 24)
    x, other, ids = torch.randn(4, 16), torch.randn(4, 16), torch.tensor([0, -1, 2, 1])
    with torch.no_grad():
        assert torch.equal(record(lora, x)(other), lora(other))
        assert torch.equal(record(multi, x, ids)(other, ids), multi(other, ids))


@pytest.mark.parametrize("kind", ["LoRALinear", "MultiLoRALinear", "BitFitLinear", "ParallelAdapterLinear"])
def test_hooks_of_the_linear_are_the_layers(kind: str) -> None:
    """Hooks of every kind that torch has."""
    linear, called = nn.Linear(8, 8), []
    linear.register_forward_pre_hook(lambda *_: called.append("forward pre"))
    linear.register_forward_hook(lambda *_: called.append("forward"))
    linear.register_full_backward_pre_hook(lambda *_: called.append("backward pre"))
    linear.register_full_backward_hook(lambda *_: called.append("backward"))
    linear.register_state_dict_pre_hook(lambda *_: called.append("state_dict pre"))
    linear._register_state_dict_hook(lambda *_: called.append("state_dict"))
    linear.register_load_state_dict_pre_hook(lambda *_: called.append("load pre"))
    linear.register_load_state_dict_post_hook(lambda *_: called.append("load"))
    made = peftk.nn.ParallelAdapterLinear.from_linear(linear, bottleneck=2) if "Parallel" in kind else None
    layer = made or getattr(peftk.nn, kind).from_linear(linear)
    layer(torch.randn(2, 8, requires_grad=True)).sum().backward()
    layer.load_state_dict(layer.state_dict())
    forward = ["forward pre", "forward", "backward pre", "backward"]
    assert called == [*forward, "state_dict pre", "state_dict", "load pre", "load"]


def test_the_adapter_is_on_the_weights_device() -> None:
    layer = LoRALinear.from_linear(nn.Linear(4, 3, device="meta"), r=2, lora_bias=True)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}

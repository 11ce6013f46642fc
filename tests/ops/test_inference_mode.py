"""Layers, banks, tables and receipts keep no inference tensors, even if made inside torch.inference_mode()."""

from __future__ import annotations

import copy
import pathlib

import pytest
import torch
from torch import Tensor, nn

import peftk
from peftk import LoRALinear, MultiLoRALinear
from peftk.backends import cpu, gemm, reference
from peftk.backends import segments as sorted_rows
from peftk.launch import workspace
from tests.support.every_layer import LAYERS, Entry, Made, agree, gradients

pytestmark = pytest.mark.usefixtures("one_thread")

OURS = [entry for entry in LAYERS if not entry.name.startswith("accelerated")]


def check_no_inference_tensors(module: nn.Module) -> None:
    """Asserts that no parameter, buffer or tensor of a bank is an inference tensor."""
    tensors = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        if isinstance(part, MultiLoRALinear):
            tensors += [tensor for chunk in part.bank.pool.chunks for tensor in chunk]
            tensors += [tensor for adapter in part.bank.adapters if adapter is not None for tensor in adapter.tensors()]
            table = part.bank.table()
            tensors += [table.pages, table.rows, table.scaling, table.biases]
    assert tensors
    assert not any(tensor.is_inference() for tensor in tensors)


@pytest.mark.parametrize("entry", OURS, ids=lambda entry: entry.name)
def test_a_layer_that_is_made_inside_trains_outside(entry: Entry) -> None:
    torch.manual_seed(0)
    base = entry.base()
    with torch.inference_mode():
        made = entry.build(base)
        for x in entry.inputs():
            made.layer(x)
    check_no_inference_tensors(made.module)
    check_trains(entry, made)


@pytest.mark.parametrize("entry", LAYERS, ids=lambda entry: entry.name)
def test_a_layer_that_ran_inside_trains_outside(entry: Entry) -> None:
    """Nothing that the layer caches from a call inside stops training outside."""
    made = entry.make()
    with torch.inference_mode():
        for x in entry.inputs():
            made.layer(x)
    check_trains(entry, made)


def check_trains(entry: Entry, made: Made) -> None:
    """Asserts gradients like the plain layer's, and that an optimizer can update the parameters."""
    for x in entry.inputs():
        x.requires_grad_()
        agree(gradients(made.layer, made, x), gradients(made.plain, made, x))
    with torch.no_grad():
        for parameter in made.module.parameters():
            parameter.mul_(1.5)  # as an optimizer does


def factors(rank: int, K: int = 16, N: int = 24) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, K), torch.randn(N, rank)


def test_adapters_are_loaded_inside_and_outside_and_served_together() -> None:
    layer = MultiLoRALinear.from_linear(nn.Linear(16, 24), max_adapters=8)
    with torch.inference_mode():
        layer.add_adapter("a", *factors(4), bias=torch.randn(24))
        layer.add_adapter("b", *factors(1100))  # more pages than a chunk has
        layer.add_adapter("c", *factors(3), bias=torch.randn(24), bias_A=torch.randn(3), trainable=True)
        layer.add_adapter("d", nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.randn(24, 2)), trainable=True)
    layer.add_adapter("e", *factors(17))
    check_no_inference_tensors(layer)
    x = torch.randn(6, 16, requires_grad=True)

    def ids() -> Tensor:
        return torch.tensor([-1, *(layer.adapter_id(name) for name in layer.bank.names)])

    layer(x, ids()).sum().backward()
    assert x.grad is not None
    for slot in ("slot2", "slot3"):
        for parameter in layer.trained[slot].parameters():
            assert parameter.grad.abs().sum() > 0
    with torch.inference_mode():
        layer.remove_adapter("b")
        layer.add_adapter("f", *factors(40))
        layer.half().float()
    layer.add_adapter("g", *factors(5))
    assert not layer.bank.pool.chunks[0][0].is_inference()
    x = torch.randn(7, 16, requires_grad=True)
    copy.deepcopy(layer)(x, ids()).sum().backward()
    assert x.grad is not None


def test_ids_that_were_made_inside_train_outside() -> None:
    layer = MultiLoRALinear.from_linear(nn.Linear(16, 24))
    layer.add_adapter("a", *factors(4), trainable=True)
    with torch.inference_mode():
        ids = torch.zeros(3, dtype=torch.int32)
    layer(torch.randn(3, 16), ids).sum().backward()
    assert layer.trained.slot0.lora_A.grad is not None


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("inside", ["merge", "unmerge", "weight", "both"])
def test_merging_and_unmerging_on_either_side(inside: str, strided: bool, backend: str | None) -> None:
    """Unmerging restores every bit, also for a weight made inside."""

    def mode(which: str) -> torch.inference_mode:
        return torch.inference_mode(inside in (which, "both"))

    with mode("weight"):
        weight = torch.randn(16, 24).t() if strided else torch.randn(24, 16)
    before = weight.clone()
    with mode("merge"):
        receipt = peftk.functional.merge_(weight, *factors(4), 0.5, backend=backend)
    assert not receipt.code.is_inference()
    assert not torch.equal(weight, before)
    receipt = copy.deepcopy(receipt)
    with mode("merge"):
        receipt = peftk.functional.remerge_(weight, receipt, *factors(3), 0.5, backend=backend)
    with mode("unmerge"):
        peftk.functional.unmerge_(weight, receipt, backend=backend)
    assert torch.equal(weight, before)


def test_a_model_is_injected_merged_and_switched_inside_and_trains_outside(tmp_path: pathlib.Path) -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(inplace=True), nn.Linear(24, 16))
    config = peftk.LoraConfig(r=4, target_modules=["0", "2"])
    other = copy.deepcopy(model)
    peftk.inject(other, config)
    for layer in (other[0], other[2]):
        nn.init.normal_(layer.lora_B)
    peftk.save_adapter(other, tmp_path)
    before = model[0].weight.clone()
    with torch.inference_mode():
        peftk.inject(model, config)
        peftk.load_adapter(model, tmp_path)
        peftk.merge_adapter(model)
        peftk.switch_adapter(model, tmp_path)
    check_no_inference_tensors(model)
    peftk.unmerge_adapter(model)
    assert torch.equal(model[0].weight, before)
    x = torch.randn(5, 16)
    torch.testing.assert_close(model(x), other(x))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        model[0].lora_A.add_(1.0)
    peftk.load_adapter(model, tmp_path)
    torch.testing.assert_close(model(x), other(x))


def test_a_server_loads_inside_and_outside(tmp_path: pathlib.Path) -> None:
    plain = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
    adapted = copy.deepcopy(plain)
    peftk.inject(adapted, peftk.LoraConfig(r=4, target_modules=["0", "1"]))
    nn.init.normal_(adapted[0].lora_B)
    peftk.save_adapter(adapted, tmp_path)
    server = peftk.MultiAdapter(plain, max_adapters=3)
    with torch.inference_mode():
        server.load("a", tmp_path)
    server.load("b", tmp_path)
    x = torch.randn(3, 16, requires_grad=True)
    for inside in (True, False):  # one route, used in both modes
        with server.route(["a", None, "b"]):
            for mode in (inside, not inside):
                with torch.inference_mode(mode):
                    y = plain(x)
                if not mode:
                    y.sum().backward()
    assert x.grad is not None
    for inside in (True, False, True):  # the slot is reused
        with torch.inference_mode(inside):
            server.unload("a")
            server.load("a", tmp_path)
        with server.route(["a", None, "b"]), torch.inference_mode(not inside):
            torch.testing.assert_close(plain(x)[::2], adapted(x)[::2])
    with torch.inference_mode():
        ids = server.ids(["a", None, "b"])
    with server.route(ids):
        plain(x).sum().backward()


def test_a_receipt_of_peft_is_kept_from_one_side_to_the_other() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(16, 24)),
        peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, lora_bias=True),
    )
    model, layer = peftk.accelerate(model), model.base_model.model[0]
    before = layer.base_layer.weight.clone(), layer.base_layer.bias.clone()
    with torch.inference_mode():
        model.merge_adapter()
    assert not torch.equal(layer.base_layer.weight, before[0])
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before[0])
    assert torch.equal(layer.base_layer.bias, before[1])


def test_workspaces_and_sorted_rows_are_ordinary() -> None:
    device = torch.device("cpu")
    workspace.forget(device)
    with torch.inference_mode(), workspace.counters(device, 8) as counters:
        assert not counters.is_inference()
    with torch.inference_mode():
        found = sorted_rows.of(torch.tensor([0, 1, 0], dtype=torch.int32), 2)
    assert not any(tensor.is_inference() for tensor in found)


@pytest.mark.parametrize("server", [cpu, gemm, reference], ids=lambda server: server.__name__.rpartition(".")[2])
def test_inside_outputs_are_of_that_mode(server: object) -> None:
    """As with nn.Linear, so that torch raises its own errors for them."""
    layer, x = LoRALinear.from_linear(nn.Linear(16, 24), r=2), torch.randn(3, 16)
    with torch.inference_mode():
        y, _ = server.lora_linear(x, layer.weight, layer.bias, None)  # type: ignore[attr-defined]
        assert y.is_inference()
        assert layer(x).is_inference()

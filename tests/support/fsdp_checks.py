"""FSDP2 (`fully_shard`) with adapters, on every rank against one process (`tests.support.ranks` runs it)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import peftk
from peftk.distributed import parallelize
from peftk.system.sharded import whole
from tests.support.parallel_model_checks import _peft_model, injected, llama, shared_folder
from tests.support.small_models import VOCABULARY
from tests.support.tensor_parallel_checks import close, part, randomise

Loss = Callable[[nn.Module, Tensor], Tensor]


def batch(rows: int = 4) -> Tensor:
    torch.manual_seed(4)
    return torch.randint(0, VOCABULARY, (rows, 6))


def shard(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for block in [module for name, module in model.named_modules() if name.endswith(("layers.0", "layers.1"))]:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def causal_loss(model: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, **kwargs).loss
    return loss


def train(model: nn.Module, ids: Tensor, loss_of: Loss = causal_loss, count: int = 3) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()
    return optimizer


def same(sharded: nn.Module, alone: nn.Module) -> None:
    expected = dict(alone.named_parameters())
    moved = 0
    for name, parameter in sharded.named_parameters():
        assert isinstance(parameter, DTensor)
        close(whole(parameter), expected[name], name)
        moved += parameter.requires_grad
    assert moved


def check_fsdp_injected(mesh: DeviceMesh) -> None:
    """Three steps of training equal one process's, with a frozen base, in fp64."""
    alone = injected()
    sharded = shard(copy.deepcopy(alone), mesh)
    train(alone, batch())
    train(sharded, part(batch(), 0, mesh))
    same(sharded, alone)


def check_fsdp_other_methods(mesh: DeviceMesh) -> None:
    for config in (peftk.ParallelAdapterConfig(bottleneck=4), peftk.SeriesAdapterConfig(bottleneck=4)):
        alone = llama()
        peftk.inject(alone, config)
        randomise(alone)
        sharded = shard(copy.deepcopy(alone), mesh)
        train(alone, batch(), count=2)
        train(sharded, part(batch(), 0, mesh), count=2)
        same(sharded, alone)


def check_fsdp_dtypes(mesh: DeviceMesh) -> None:
    """A bf16 base with fp32 adapters in one group: what trains has one dtype, which is all that FSDP2 asks for."""
    alone = injected(torch.bfloat16)
    sharded = shard(copy.deepcopy(alone), mesh)
    assert {parameter.dtype for parameter in sharded.parameters()} == {torch.bfloat16, torch.float32}
    causal_loss(alone, batch()).backward()
    causal_loss(sharded, part(batch(), 0, mesh)).backward()
    for name, parameter in sharded.named_parameters():
        if parameter.requires_grad:
            grad, expected = whole(parameter.grad).double(), alone.get_parameter(name).grad.double()  # type: ignore
            assert (grad - expected).norm() <= 0.05 * expected.norm() + 1e-4, name
    mixed = shard(injected(torch.float32), mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    causal_loss(mixed, part(batch(), 0, mesh)).backward()
    assert all(p.grad.dtype == torch.float32 for p in mixed.parameters() if p.requires_grad)  # type: ignore[union-attr]


def check_fsdp_accelerated(mesh: DeviceMesh) -> None:
    alone = _peft_model()
    sharded = shard(copy.deepcopy(alone), mesh)
    train(alone, batch())
    train(sharded, part(batch(), 0, mesh))
    same(sharded, alone)


def check_fsdp_accelerated_mixed_batch(mesh: DeviceMesh) -> None:
    """Each rank trains other adapters: one may name an adapter that another does not."""
    alone = _peft_model()
    for name, parameter in alone.named_parameters():
        parameter.requires_grad_("lora_" in name)
    sharded = shard(copy.deepcopy(alone), mesh)
    of_rank = (["a", "__base__"], ["b", "b"])
    names = [name for rank in range(mesh.size()) for name in of_rank[rank % 2]]
    mine, ids = of_rank[mesh.get_local_rank() % 2], batch(2 * mesh.size())
    train(alone, ids, functools.partial(causal_loss, adapter_names=names))
    train(sharded, part(ids, 0, mesh), functools.partial(causal_loss, adapter_names=mine))
    same(sharded, alone)


class Many(nn.Module):
    """Two layers with trainable adapters each, one of which a batch need not use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            peftk.MultiLoRALinear.from_linear(nn.Linear(16, 16), max_adapters=4) for _ in range(2)
        )
        for layer in self.layers:
            for name, rank in (("a", 3), ("b", 8)):
                A, B = torch.randn(rank, 16) / 4, torch.randn(16, rank) / 4
                layer.add_adapter(name, A, B, bias=torch.zeros(16), trainable=True)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x, ids))
        return x.square().mean()


def check_fsdp_trained_mixed_batch(mesh: DeviceMesh) -> None:
    """A mixed batch trains its adapters in MultiLoRALinear layers, each rank another mix."""
    alone = Many()
    sharded = copy.deepcopy(alone)
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    torch.manual_seed(1)
    x, ids = torch.randn(8, 5, 16), torch.tensor([0, 1, -1, 1, 0, 0, 1, -1])
    train(alone, x, lambda model, x: model(x, ids))
    train(sharded, part(x, 0, mesh), lambda model, x: model(x, part(ids, 0, mesh)))
    same(sharded, alone)


def check_fsdp_checkpoints(mesh: DeviceMesh) -> None:
    """save_adapter and load_adapter from sharded state, and in a model that is sharded before it has adapters."""
    alone = injected(torch.float32)
    sharded = shard(copy.deepcopy(alone), mesh)
    folder = shared_folder(mesh)
    peftk.save_adapter(sharded, f"{folder}/adapter")
    plain = llama(torch.float32)
    peftk.load_adapter(plain, f"{folder}/adapter")
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, alone.get_parameter(name)), name
    for name, parameter in sharded.named_parameters():
        if "lora_" in name:
            nn.init.zeros_(parameter)
    peftk.load_adapter(sharded, f"{folder}/adapter")
    same(sharded, alone)
    causal_loss(sharded, part(batch(), 0, mesh)).backward()
    # what is damaged leaves the model as it was
    torch.distributed.barrier()
    if mesh.get_local_rank() == 0:
        with open(f"{folder}/adapter/adapter_model.safetensors", "r+b") as file:
            file.truncate(1000)
    torch.distributed.barrier()
    with pytest.raises(peftk.CheckpointError):
        peftk.load_adapter(sharded, f"{folder}/adapter")
    same(sharded, alone)


def check_dcp(mesh: DeviceMesh) -> None:
    """torch.distributed.checkpoint, adapters alone: written by one run, read by another, optimizer included."""
    first = shard(injected(torch.float32), mesh)
    optimizer = train(first, part(batch(), 0, mesh))
    options = StateDictOptions(ignore_frozen_params=True)
    state, optimizers = get_state_dict(first, optimizer, options=options)
    assert set(state) == {name for name, p in first.named_parameters() if p.requires_grad}
    folder = shared_folder(mesh)
    dcp.save({"model": state, "optimizer": optimizers}, checkpoint_id=folder)
    second = shard(injected(torch.float32), mesh)
    again = torch.optim.SGD([p for p in second.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    loss = causal_loss(second, part(batch(), 0, mesh))
    loss.backward()
    again.step()
    again.zero_grad()
    into, optimizers = get_state_dict(second, again, options=options)
    dcp.load({"model": into, "optimizer": optimizers}, checkpoint_id=folder)
    set_state_dict(
        second, again, model_state_dict=into, optim_state_dict=optimizers,
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )  # fmt: skip
    for name, parameter in first.named_parameters():
        assert torch.equal(whole(parameter), whole(second.get_parameter(name))), name
    for model, steps in ((first, optimizer), (second, again)):
        steps.zero_grad()
        causal_loss(model, part(batch(), 0, mesh)).backward()
        steps.step()
    for name, parameter in first.named_parameters():
        assert torch.equal(whole(parameter), whole(second.get_parameter(name))), name


def check_peft_save(mesh: DeviceMesh) -> None:
    """A sharded PEFT model is saved by PEFT from torch's whole state dict."""
    import peft

    alone = _peft_model()
    sharded = shard(copy.deepcopy(alone), mesh)
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    folder = shared_folder(mesh)
    if mesh.get_local_rank() == 0:
        sharded.save_pretrained(folder, state_dict=state, selected_adapters=["a"])
    torch.distributed.barrier()
    again = peft.PeftModel.from_pretrained(llama(torch.float32), f"{folder}/a", adapter_name="a")
    found = {name: value for name, value in again.named_parameters() if ".a." in name}
    assert found
    for name, value in found.items():
        assert torch.equal(value, alone.get_parameter(name)), name
    for parameter in sharded.parameters():
        parameter.requires_grad_(False).zero_()
    set_model_state_dict(sharded, alone.state_dict(), options=StateDictOptions(full_state_dict=True))
    for name, parameter in sharded.named_parameters():
        assert torch.equal(whole(parameter), alone.get_parameter(name)), name


def check_two_dimensions(mesh: DeviceMesh) -> None:
    """Tensor parallelism inside of FSDP2: training, and the checkpoint, on a mesh of 2 × ranks / 2."""
    if mesh.size() < 4:
        return
    both = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("dp", "tp"))
    alone = injected()
    sharded = shard(parallelize(copy.deepcopy(alone), both["tp"]), both["dp"])
    train(alone, batch())
    train(sharded, part(batch(), 0, both["dp"]))
    same(sharded, alone)
    folder = shared_folder(mesh)
    peftk.save_adapter(sharded, f"{folder}/adapter")
    plain = llama()
    peftk.load_adapter(plain, f"{folder}/adapter")
    for name, parameter in plain.named_parameters():
        close(parameter, alone.get_parameter(name), name)

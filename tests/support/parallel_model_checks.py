"""Whole models under tensor parallelism, on every rank against one process (`tests.support.ranks` runs it)."""

from __future__ import annotations

import copy
import os
import tempfile
import unittest.mock
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import peftk
from peftk.distributed import parallelize
from peftk.system.sharded import whole
from tests.support.small_models import VOCABULARY, WIDTH
from tests.support.tensor_parallel_checks import close, randomise, same_gradients

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """Heads for four ranks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, VOCABULARY, (3, 7))


def steps(model: nn.Module, count: int = 3, **kwargs: Any) -> Tensor:
    """Losses of a few steps of AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, ids, losses = torch.optim.AdamW(trained, lr=1e-2), tokens(), []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, **kwargs).loss
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    return torch.stack(losses)


def same_parameters(sharded: nn.Module, alone: nn.Module) -> None:
    expected = dict(alone.named_parameters())
    for name, parameter in sharded.named_parameters():
        close(whole(parameter), expected[name], name)


def injected(dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    model = llama(dtype)
    peftk.inject(model, peftk.LoraConfig(r=4, target_modules=LINEARS, **options))
    randomise(model)
    return model


def check_tp_plan(mesh: DeviceMesh) -> None:
    """An injected Llama by its own plan: logits, gradients of everything that trains, and three steps of AdamW."""
    alone = injected()
    sharded = parallelize(copy.deepcopy(alone), mesh)
    q = sharded.get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert isinstance(q, DTensor)
    assert q.to_local().shape == (WIDTH // mesh.size(), WIDTH)
    with torch.no_grad():
        close(sharded(tokens()).logits, alone(tokens()).logits, "logits")
    for model in (alone, sharded):
        model(tokens(), labels=tokens()).loss.backward()
    same_gradients(sharded, alone)
    close(steps(sharded), steps(alone), "losses")
    same_parameters(sharded, alone)


def check_dropout_in_a_model(mesh: DeviceMesh) -> None:
    alone = injected(lora_dropout=0.3).train()
    sharded = parallelize(copy.deepcopy(alone), mesh)
    losses = []
    for model in (alone, sharded):
        torch.manual_seed(5)
        losses.append(steps(model))
    close(losses[1], losses[0], "losses")


def check_generate(mesh: DeviceMesh) -> None:
    alone = injected(torch.float32).eval()
    sharded = parallelize(copy.deepcopy(alone), mesh)
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = alone.generate(tokens(), **arguments)  # type: ignore[operator]
    assert torch.equal(sharded.generate(tokens(), **arguments), expected)  # type: ignore[operator]


def check_checkpointing(mesh: DeviceMesh) -> None:
    """Activation checkpointing runs a layer's forward again in the backward, sums and masks included."""
    alone = injected(lora_dropout=0.3).train()
    sharded = parallelize(copy.deepcopy(alone), mesh)
    sharded.gradient_checkpointing_enable()  # type: ignore[operator]
    for model in (alone, sharded):
        torch.manual_seed(5)
        model(tokens(), labels=tokens()).loss.backward()
    same_gradients(sharded, alone)


def check_series_adapters(mesh: DeviceMesh) -> None:
    """Adapters behind blocks are whole on every rank, and train alike."""
    alone = llama()
    peftk.inject(alone, peftk.SeriesAdapterConfig(bottleneck=5))
    randomise(alone)
    sharded = parallelize(copy.deepcopy(alone), mesh)
    for model in (alone, sharded):
        model(tokens(), labels=tokens()).loss.backward()
    same_gradients(sharded, alone)


def _peft_model(*, dropout: float = 0.0, accelerated: bool = True) -> Any:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, lora_dropout=dropout, init_lora_weights=False)
    torch.manual_seed(2)
    model = peft.get_peft_model(llama(torch.float32), config, "a")
    torch.manual_seed(3)
    model.add_adapter(
        "b", peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    )
    model.set_adapter("a")
    return peftk.accelerate(model) if accelerated else model


def check_accelerated(mesh: DeviceMesh) -> None:
    """PEFT models, on our kernels and on PEFT's code: one adapter, a mixed batch, none; training."""
    for accelerated in (True, False):
        alone = _peft_model(accelerated=accelerated).eval()
        sharded = parallelize(copy.deepcopy(alone), mesh)
        with torch.no_grad():
            close(sharded(tokens()).logits, alone(tokens()).logits, "logits")
            names = ["a", "__base__", "b"]
            mixed = [model(tokens(), adapter_names=names).logits for model in (sharded, alone)]
            close(mixed[0], mixed[1], "a mixed batch")
            with alone.disable_adapter(), sharded.disable_adapter():
                close(sharded(tokens()).logits, alone(tokens()).logits, "no adapter")
        close(steps(sharded), steps(alone), "losses")
    for model in (alone, sharded):
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
    same_gradients(sharded, alone)


def check_accelerated_mixed_training(mesh: DeviceMesh) -> None:
    models = [_peft_model() for _ in range(2)]
    parallelize(models[1], mesh)
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        model(input_ids=tokens(), labels=tokens(), adapter_names=["b", "a", "__base__"]).loss.backward()
    same_gradients(models[1], models[0])


def check_accelerated_dropout(mesh: DeviceMesh) -> None:
    alone = _peft_model(dropout=0.3).train()
    sharded = parallelize(copy.deepcopy(alone), mesh)
    for model in (alone, sharded):
        torch.manual_seed(5)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    same_gradients(sharded, alone)


def check_accelerated_later(mesh: DeviceMesh) -> None:
    """A PEFT model may be split first and accelerated then, and decelerated; PEFT merges what is split."""
    alone = _peft_model(accelerated=False).eval()
    sharded = parallelize(copy.deepcopy(alone), mesh)
    with torch.no_grad():
        expected = alone(tokens()).logits
        close(peftk.accelerate(sharded)(tokens()).logits, expected, "accelerated")
        sharded.merge_adapter()
        close(sharded(tokens()).logits, expected, "merged")
        sharded.unmerge_adapter()
        close(sharded(tokens()).logits, expected, "unmerged")
        close(peftk.decelerate(sharded)(tokens()).logits, expected, "decelerated")


def check_clipping(mesh: DeviceMesh) -> None:
    """The norm of all gradients counts every shard once."""
    alone = injected()
    sharded = parallelize(copy.deepcopy(alone), mesh)
    norms = []
    for model in (alone, sharded):
        model(tokens(), labels=tokens()).loss.backward()
        norms.append(nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.1))
    close(whole(norms[1]), norms[0], "the norm")
    same_gradients(sharded, alone)


def _checkpoints(folder: str) -> list[str]:
    """Three LoRA checkpoints of different ranks and targets, the same on every rank."""
    names = []
    for number, targets in enumerate((LINEARS, ["q_proj", "down_proj"], ["v_proj", "o_proj"])):
        model = llama(torch.float32)
        torch.manual_seed(10 + number)
        peftk.inject(model, peftk.LoraConfig(r=2 + 5 * number, target_modules=targets))
        randomise(model)
        names.append(os.path.join(folder, str(number)))
        peftk.save_adapter(model, names[-1])
    return names


def check_routes(mesh: DeviceMesh) -> None:
    """A server's mixed batches, with adapters that come and go after the model was sharded."""
    with tempfile.TemporaryDirectory() as folder:
        paths = _checkpoints(folder)
        servers = [peftk.MultiAdapter(llama(torch.float32).eval(), max_adapters=3) for _ in range(2)]
        for server in servers:
            server.load("all", paths[0])
            server.load("first", paths[1])
        parallelize(servers[1].model, mesh)

        def same(names: list[str | None]) -> None:
            logits = []
            for server in servers:
                with torch.no_grad(), server.route(names):
                    logits.append(server.model(tokens()).logits)
            close(logits[1], logits[0], f"{names}")

        same(["first", None, "all"])
        for server in servers:
            server.unload("first")
            server.load("second", paths[2])
            server.load("first", paths[1])
        same(["second", "all", "first"])
        same([None, None, None])
        fewer = peftk.MultiAdapter(llama(torch.float32).eval(), max_adapters=3)
        fewer.load("first", paths[1])
        parallelize(fewer.model, mesh)
        with pytest.raises((TypeError, peftk.CheckpointError), match="DTensor"):
            fewer.load("all", paths[0])
        assert fewer.names == ["first"]
        for server in servers:
            with torch.no_grad(), server.route(["all", "second", None]):
                server.tokens = server.model.generate(  # type: ignore[attr-defined,operator]
                    tokens(), max_new_tokens=5, do_sample=False, pad_token_id=0
                )
        assert torch.equal(servers[0].tokens, servers[1].tokens)  # type: ignore[attr-defined]


def shared_folder(mesh: DeviceMesh) -> str:
    found = [tempfile.mkdtemp() if mesh.get_local_rank() == 0 else ""]
    torch.distributed.broadcast_object_list(found, 0)
    return found[0]


def check_save_and_load(mesh: DeviceMesh) -> None:
    """A sharded model writes what one process writes, and reads it again."""
    alone = injected(torch.float32)
    sharded = parallelize(copy.deepcopy(alone), mesh)
    folder = shared_folder(mesh)
    with unittest.mock.patch("safetensors.torch.save_file", wraps=safetensors.torch.save_file) as saved:
        peftk.save_adapter(sharded, f"{folder}/sharded")
    assert saved.call_count == (mesh.get_local_rank() == 0)
    assert sorted(os.listdir(f"{folder}/sharded")) == ["adapter_config.json", "adapter_model.safetensors"]
    plain = llama(torch.float32)
    peftk.load_adapter(plain, f"{folder}/sharded")
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, alone.get_parameter(name)), name
    for name, parameter in sharded.named_parameters():
        if "lora" in name:
            nn.init.zeros_(parameter)
    peftk.load_adapter(sharded, f"{folder}/sharded")
    for name, parameter in sharded.named_parameters():
        assert torch.equal(whole(parameter), alone.get_parameter(name)), name
    torch.distributed.barrier()
    # a path that cannot be written: every rank gets an error, and none waits
    if mesh.get_local_rank() == 0:
        open(f"{folder}/file", "w").close()
    torch.distributed.barrier()
    with pytest.raises((ValueError, RuntimeError), match="path"):
        peftk.save_adapter(sharded, f"{folder}/file")


def check_state_dict(mesh: DeviceMesh) -> None:
    """torch's own state dicts, whole and sharded, of a model under tensor parallelism."""
    alone = injected(torch.float32)
    sharded = parallelize(copy.deepcopy(alone), mesh)
    found = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    for name, value in alone.state_dict().items():
        assert torch.equal(found[name], value), name
    other = parallelize(injected(torch.float32), mesh)
    for parameter in other.parameters():
        parameter.requires_grad_(False).zero_()
    set_model_state_dict(other, found, options=StateDictOptions(full_state_dict=True))
    for name, parameter in other.named_parameters():
        assert torch.equal(whole(parameter), alone.get_parameter(name)), name


def check_refused_models(mesh: DeviceMesh) -> None:
    def refused(model: Any, words: str, plan: Any = None) -> None:
        before = {name: id(parameter) for name, parameter in model.named_parameters()}
        with pytest.raises((TypeError, ValueError, NotImplementedError), match=words):
            parallelize(model, mesh, plan)
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == before

    refused(llama(), "packed_colwise", {"lm_head": "packed_colwise"})
    refused(llama(), "names of modules", {"nothing": "colwise"})
    refused(llama(), "Parameter", {"lm_head.weight": "colwise"})
    refused(llama(), "torch", {"lm_head": torch.distributed.tensor.parallel.ColwiseParallel()})
    refused(nn.Sequential(nn.Linear(4, 4)), "tp_plan")
    prompted = llama()
    peftk.inject(prompted, peftk.LlamaAdapterConfig())
    refused(prompted, "LlamaAdapter")
    attached = llama()
    peftk.inject(attached, peftk.LoraConfig(target_modules=["q_proj"]))
    peftk.inject(attached, peftk.SeriesAdapterConfig(bottleneck=4, where=["q_proj"]))
    refused(attached, "attached")
    tied = llama(tie_word_embeddings=True)
    refused(tied, "no other module trains")
    tied.lm_head.weight.requires_grad_(False)
    whole_logits = tied(tokens()).logits
    close(parallelize(tied, mesh)(tokens()).logits, whole_logits, "tied and frozen")
    odd = llama()
    odd.model.layers[0].self_attn.head_dim = 3 * WIDTH
    refused(odd, "heads")
    sharded = parallelize(llama(), mesh)
    with pytest.raises(TypeError, match="DTensor"):
        peftk.inject(sharded, peftk.LoraConfig(target_modules=["q_proj"]))

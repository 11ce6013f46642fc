"""Tensor parallelism with LoRA: a small random Llama is trained on two ranks, then serves two adapters in one batch.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

It runs on CPUs over gloo, in seconds. On GPUs give `init_device_mesh` "cuda" instead; the rest stays as it is.
"""

from __future__ import annotations

import copy
import os
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import peftk
from peftk.distributed import parallelize


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
            vocab_size=100, max_position_embeddings=64,
        )
    )  # fmt: skip


def train(model: torch.nn.Module, tokens: torch.Tensor) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mesh = init_device_mesh("cpu", (world,))

    # 1. Training. The adapters are injected first, then the model is split by its own tp_plan.
    model = small_llama()
    peftk.inject(model, peftk.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]))
    alone = copy.deepcopy(model)
    parallelize(model, mesh)
    tokens = torch.randint(0, 100, (4, 16))
    losses, expected = train(model, tokens), train(alone, tokens)
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    if rank == 0:
        print(f"down_proj: weight {tuple(layer.weight.to_local().shape)} of {tuple(layer.weight.shape)} on each rank")
        print("loss on", world, "ranks:", " ".join(f"{loss:.5f}" for loss in losses))
        print("loss in one process:", " ".join(f"{loss:.5f}" for loss in expected))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-5)

    # 2. A checkpoint: every rank calls save_adapter, the first one writes.
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, 0)
    peftk.save_adapter(model, f"{folder[0]}/trained")

    # 3. Serving: each sequence of a batch has an adapter of its own, or none.
    server = peftk.MultiAdapter(small_llama().eval(), max_adapters=4)
    server.load("trained", f"{folder[0]}/trained")
    parallelize(server.model, mesh)
    server.load("again", f"{folder[0]}/trained")  # adapters come and go afterwards too
    with torch.no_grad(), server.route(["trained", None, "again", None]):
        logits = server.model(tokens).logits
    torch.testing.assert_close(logits[0], alone.eval()(tokens[:1]).logits[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits[1], small_llama()(tokens[1:2]).logits[0], rtol=1e-3, atol=1e-4)
    if rank == 0:
        print("a mixed batch on", world, "ranks gives each sequence what its adapter gives alone")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

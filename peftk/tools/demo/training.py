"""Step 5: one LoRA trained for a short while on real sentences."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftk
from peftk.tools.demo.stage import Stage, sparkline
from peftk.tools.minilm import MiniLM, embed
from peftk.tools.sentences import KINDS, Sentence, split

TEMPERATURE = 0.1
BATCH = 24


def train(stage: Stage, minilm: MiniLM) -> nn.Module:
    """Returns the model with its trained LoRA."""
    stage.step(5, "Training a LoRA")
    steps = 10 if stage.quick else 30
    seen, held_out = split()
    model = minilm.copy()
    torch.manual_seed(0)
    peftk.inject(model, peftk.LoraConfig(r=8, lora_alpha=16))
    stage.say(
        f"MiniLM groups sentences by topic. {steps} steps on {len(seen)} sentences teach a rank-8 LoRA\n"
        f"to group them by what they do: {', '.join(KINDS[:-1])} or {KINDS[-1]}. {len(held_out)} other\n"
        "sentences are held out; only the LoRA is trained, there is no head."
    )
    before = accuracy(minilm, model, seen, held_out)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    started = time.perf_counter()
    for step in range(steps):
        with stage.busy(f"step {step + 1} of {steps}"):
            chosen = [seen[i] for i in torch.randperm(len(seen), generator=generator)[:BATCH].tolist()]
            loss = _loss(embed(model, minilm.tokenize([s.text for s in chosen])), _labels(chosen))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    seconds = time.perf_counter() - started
    after = accuracy(minilm, model, seen, held_out)
    last = sum(losses[-5:]) / 5
    stage.say(
        f"loss  {losses[0]:.2f} [cyan]{sparkline(losses)}[/] {last:.2f}    {1000 * seconds / steps:.0f} ms per step\n"
        f"held-out sentences grouped right: {before:.0%} before, [bold]{after:.0%}[/] after"
    )
    stage.check("loss fell: last five steps over the first", last / losses[0], 0.5)
    stage.figures["training"] = {
        "steps": steps,
        "losses": losses,
        "ms_per_step": 1000 * seconds / steps,
        "accuracy_before": before,
        "accuracy_after": after,
    }
    return model


def accuracy(minilm: MiniLM, model: nn.Module, seen: list[Sentence], held_out: list[Sentence]) -> float:
    """The share of held-out sentences that lie nearest to the mean of their own kind among the seen ones."""
    with torch.inference_mode():
        known = embed(model, minilm.tokenize([s.text for s in seen]))
        asked = embed(model, minilm.tokenize([s.text for s in held_out]))
        means = F.normalize(_one_hot(_labels(seen)).T @ known, dim=-1)
        return ((asked @ means.T).argmax(-1) == _labels(held_out)).float().mean().item()


def _loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sentence's cosine to the mean of every kind in the batch, itself left out of its own."""
    one_hot = _one_hot(labels)
    sums = one_hot.T @ embeddings
    means = F.normalize(sums - one_hot.unsqueeze(-1) * embeddings.unsqueeze(1), dim=-1)
    return F.cross_entropy((means * embeddings.unsqueeze(1)).sum(-1) / TEMPERATURE, labels)


def _labels(sentences: list[Sentence]) -> Tensor:
    return torch.tensor([KINDS.index(sentence.kind) for sentence in sentences])


def _one_hot(labels: Tensor) -> Tensor:
    return F.one_hot(labels, len(KINDS)).float()

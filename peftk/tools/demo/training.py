"""Step 5: trains one LoRA briefly on real sentences."""

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
    train_sentences, held_out = split()
    model = minilm.copy()
    torch.manual_seed(0)
    peftk.inject(model, peftk.LoraConfig(r=8, lora_alpha=16))
    stage.say(
        f"MiniLM groups sentences by topic. {steps} steps on {len(train_sentences)} sentences teach a rank-8 LoRA\n"
        f"to group them by what they do: {', '.join(KINDS[:-1])} or {KINDS[-1]}. {len(held_out)} other\n"
        "sentences are held out. Only the LoRA is trained; there is no head."
    )
    before = accuracy(minilm, model, train_sentences, held_out)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    started = time.perf_counter()
    for step in range(steps):
        with stage.busy(f"step {step + 1} of {steps}"):
            chosen = [
                train_sentences[i] for i in torch.randperm(len(train_sentences), generator=generator)[:BATCH].tolist()
            ]
            loss = _loss(embed(model, minilm.tokenize([s.text for s in chosen])), _labels(chosen))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    seconds = time.perf_counter() - started
    after = accuracy(minilm, model, train_sentences, held_out)
    last = sum(losses[-5:]) / 5
    stage.say(
        f"loss  {losses[0]:.2f} [cyan]{sparkline(losses)}[/] {last:.2f}    {1000 * seconds / steps:.0f} ms per step\n"
        f"held-out sentences grouped correctly: {before:.0%} before, [bold]{after:.0%}[/] after"
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


def accuracy(minilm: MiniLM, model: nn.Module, train_sentences: list[Sentence], held_out: list[Sentence]) -> float:
    """The share of held-out sentences that are nearest to the mean of the training sentences of their own kind."""
    with torch.inference_mode():
        examples = embed(model, minilm.tokenize([s.text for s in train_sentences]))
        queries = embed(model, minilm.tokenize([s.text for s in held_out]))
        means = F.normalize(_one_hot(_labels(train_sentences)).T @ examples, dim=-1)
        return ((queries @ means.T).argmax(-1) == _labels(held_out)).float().mean().item()


def _loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the cosines of each sentence to the mean of every kind in the batch, itself excluded."""
    one_hot = _one_hot(labels)
    sums = one_hot.T @ embeddings
    means = F.normalize(sums - one_hot.unsqueeze(-1) * embeddings.unsqueeze(1), dim=-1)
    return F.cross_entropy((means * embeddings.unsqueeze(1)).sum(-1) / TEMPERATURE, labels)


def _labels(sentences: list[Sentence]) -> Tensor:
    return torch.tensor([KINDS.index(sentence.kind) for sentence in sentences])


def _one_hot(labels: Tensor) -> Tensor:
    return F.one_hot(labels, len(KINDS)).float()

"""MiniLM with a classification head; from a layer on, if what lies below is frozen and its outputs are kept."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from peftk.tools.study.encoded import Encoded

FEATURE_BATCH = 32


class Classifier(nn.Module):
    """logits [B, classes] of the mean over a sentence's tokens. There is no dropout. classes 1: a regression."""

    base_model_prefix = "bert"  # so that peftk knows that the rest is the head

    def __init__(self, bert: nn.Module, classes: int, seed: int) -> None:
        super().__init__()
        self.bert = bert
        config: Any = bert.config
        self.config = config
        self.classifier = new_head(config.hidden_size, classes, seed)
        self.eval()

    def forward(self, **batch: Tensor) -> Tensor:
        return self.classifier(mean_of_tokens(self.bert(**batch).last_hidden_state, batch["attention_mask"]))


def new_head(width: int, classes: int, seed: int) -> nn.Linear:
    head = nn.Linear(width, classes)
    with torch.no_grad():
        head.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    return head


def mean_of_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """hidden [B, T, d], mask [B, T] → [B, d]."""
    mask = mask.unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


class _Given(nn.Module):
    """In place of the embeddings of a model without its lower layers: passes on what these returned."""

    def forward(self, inputs_embeds: Tensor | None = None, **_: Any) -> Tensor | None:
        return inputs_embeds


def above(bert: nn.Module, layer: int) -> nn.Module:
    """A copy of the encoder's layers from number `layer` on, which takes `inputs_embeds`; the whole encoder for 0."""
    if layer == 0:
        return copy.deepcopy(bert)
    lower, bert.encoder.layer = bert.encoder.layer, bert.encoder.layer[layer:]  # type: ignore[union-attr, index]
    embeddings, bert.embeddings = bert.embeddings, _Given()
    try:
        return copy.deepcopy(bert)
    finally:
        bert.encoder.layer, bert.embeddings = lower, embeddings  # type: ignore[union-attr]


class Features:
    """What the frozen lower layers return for every sentence of a set: computed once, kept for all runs."""

    def __init__(self, bert: nn.Module, data: Encoded) -> None:
        self._bert, self._data = bert, data
        self._kept: dict[int, list[Tensor]] = {}  # by layer: [T, d] a sentence, without padding

    def batch(self, rows: list[int], layer: int) -> dict[str, Tensor]:
        """The inputs of `above(bert, layer)` for these rows."""
        batch = self._data.batch(rows)
        if layer == 0:
            return batch
        if not self._kept:
            self._compute()
        inputs = torch.zeros(*batch["input_ids"].shape, self._kept[layer][0].shape[-1])
        for place, row in enumerate(rows):
            kept = self._kept[layer][row]
            inputs[place, : len(kept)] = kept
        return {"inputs_embeds": inputs, "attention_mask": batch["attention_mask"]}

    def _compute(self) -> None:
        with torch.inference_mode():
            for rows in self._data.by_length(FEATURE_BATCH):
                batch = self._data.batch(rows)
                outputs: Any = self._bert(**batch, output_hidden_states=True)
                for layer, hidden in enumerate(outputs.hidden_states[1:], 1):
                    kept = self._kept.setdefault(layer, [torch.empty(0)] * len(self._data))
                    for place, row in enumerate(rows):
                        kept[row] = hidden[place, : len(self._data.ids[row])].clone()

"""Many LoRA runs as adapters of one model, trained in one mixed batch: other seeds, ranks, placements, learning rates.

Every run has its own rows of the batch, its own head, learning rate and clipping, so it trains as it would alone: the
numbers differ by the rounding of fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import peftk
from peftk.tools.minilm import quiet_peft
from peftk.tools.study.classifier import mean_of_tokens, new_head
from peftk.tools.study.methods import LORA_ALPHA, PLACES
from peftk.tools.study.runs import Run
from peftk.tools.study.training import start_lora


class Together:
    """Runs of LoRA, of one task and number of steps, on one HF PEFT model with peftk's kernels."""

    first_layer = 0

    def __init__(self, bert: nn.Module, classes: int, runs: Sequence[Run]) -> None:
        import peft

        self.runs = tuple(runs)
        self._names = [f"run{number}" for number in range(len(runs))]
        configs = [
            peft.LoraConfig(r=run.method.size, lora_alpha=LORA_ALPHA, target_modules=PLACES[run.method.where])
            for run in runs
        ]
        with quiet_peft():
            model: Any = peft.get_peft_model(copy.deepcopy(bert), configs[0], adapter_name=self._names[0])
            for name, config in zip(self._names[1:], configs[1:], strict=True):
                model.add_adapter(name, config)
            self.model = peftk.accelerate(model).eval()
        self.model.set_requires_grad(self._names)
        self.heads = nn.ModuleList(new_head(bert.config.hidden_size, classes, run.seed) for run in runs)  # type: ignore
        for number, run in enumerate(runs):
            start_lora(self._of(number).items(), run.seed)

    def _of(self, number: int) -> dict[str, nn.Parameter]:
        """The factors of a run, by their names in a Classifier."""
        ending = f".{self._names[number]}.weight"
        return {
            f"bert.{name.removeprefix('base_model.model.').removesuffix(ending)}": p
            for name, p in self.model.named_parameters()
            if name.endswith(ending)
        }

    def parameters(self, number: int) -> list[nn.Parameter]:
        return [*self._of(number).values(), *self.heads[number].parameters()]

    def vectors(self, batch: dict[str, Tensor], owners: list[int]) -> Tensor:
        hidden = self.model(**batch, adapter_names=[self._names[owner] for owner in owners]).last_hidden_state
        return mean_of_tokens(hidden, batch["attention_mask"])

    def logits(self, batch: dict[str, Tensor], owners: list[int]) -> Tensor:
        heads: Any = self.heads
        weight, bias = (torch.stack([getattr(head, name) for head in heads]) for name in ("weight", "bias"))
        return torch.einsum("bd,bcd->bc", self.vectors(batch, owners), weight[owners]) + bias[owners]

    def trained(self, number: int) -> dict[str, Tensor]:
        head = {f"classifier.{name}": p for name, p in self.heads[number].named_parameters()}
        return {name: p.detach().clone() for name, p in {**self._of(number), **head}.items()}

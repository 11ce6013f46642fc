"""Whether generated tokens are those of their adapter alone.

Every token must be the likeliest one of a model that has only this adapter, in fp32, given the tokens before it: up to
what bf16 changes in the logits, since near ties fall either way. A layer's result is rounded to 2⁻⁹ of it, and some 200
of them follow one another: √200·2⁻⁹ of the largest logit for each of the two that are compared.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peftk.models.server import MultiAdapter
from peftk.tools.benchmark.serving.traffic import Job
from peftk.tools.smollm2 import Language

ALLOWED = 2 * math.sqrt(200) * 2.0**-9  # of the largest logit: 5.5 %


class Alone:
    """A copy of the model in fp32 that computes one job at a time."""

    def __init__(self, language: Language, folder: Path, limit: int) -> None:
        """limit: the most jobs of one answer that are looked at, evenly spread."""
        self._server = MultiAdapter(copy.deepcopy(language.model).float(), max_adapters=1)
        self._folder, self._limit = folder, limit
        self._logits: dict[tuple[Job, tuple[int, ...]], Any] = {}

    def error(self, jobs: Sequence[Job], answers: Sequence[tuple[int, ...]]) -> float:
        """Of the worst token of all answers: how much likelier another one is, in multiples of what is allowed."""
        if [len(answer) for answer in answers] != [job.new_tokens for job in jobs]:
            return math.inf
        step = max(1, -(-len(jobs) // self._limit))
        pairs = list(zip(jobs, answers, strict=True))[::step]
        return max(self._gap(job, answer, job.adapter) for job, answer in pairs)

    def sensitivity(self, jobs: Sequence[Job], answers: Sequence[tuple[int, ...]]) -> float:
        """The median of the errors that these answers have if they are taken for the base model's."""
        step = max(1, -(-len(jobs) // self._limit))
        pairs = list(zip(jobs, answers, strict=True))[::step]
        return statistics.median(self._gap(job, answer, None) for job, answer in pairs)

    def _gap(self, job: Job, answer: tuple[int, ...], adapter: str | None) -> float:
        key = (job._replace(adapter=adapter), answer)
        if key not in self._logits:
            self._logits[key] = self._compute(job.prompt, answer, adapter)
        found: float = self._logits[key]
        return found

    def _compute(self, prompt: tuple[int, ...], answer: tuple[int, ...], adapter: str | None) -> float:
        for name in self._server.names:
            if name != adapter:
                self._server.unload(name)
        if adapter is not None and adapter not in self._server.names:
            self._server.load(adapter, self._folder / adapter)
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        with torch.inference_mode(), self._server.route([adapter]):
            logits = self._server.model(ids, logits_to_keep=len(answer)).logits[0]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        return ((logits.amax(1) - chosen) / (ALLOWED * logits.abs().amax(1))).max().item()

"""Choosing the next tokens: every request by its own options and from its own random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftk.serve.requests import Request

_COLDEST = torch.finfo(torch.float32).tiny  # the temperature that stands for smaller ones, which are 0 in fp32


class Sampler:
    """Chooses tokens for one request. lost: whether a step has given it logits without a finite maximum."""

    def __init__(self, request: Request, device: torch.device) -> None:
        self.lost = False
        self._warpers: Any = None
        self._generator: torch.Generator | None = None
        if request.temperature > 0:
            from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

            self._warpers = LogitsProcessorList([TemperatureLogitsWarper(max(float(request.temperature), _COLDEST))])
            if request.top_k:
                self._warpers.append(TopKLogitsWarper(request.top_k))
            if request.top_p < 1:
                self._warpers.append(TopPLogitsWarper(float(request.top_p)))
            self._generator = torch.Generator(device)
            if request.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(request.seed % 2**63)

    @property
    def greedy(self) -> bool:
        return self._warpers is None

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [1, V] fp32 → the token, int64 [1]."""
        assert self._warpers is not None
        scores = logits - logits.max()  # none above 0, which a small temperature would make infinite
        scores = self._warpers(torch.empty(1, 0, dtype=torch.int64, device=logits.device), scores)
        return torch.multinomial(scores.softmax(-1), 1, generator=self._generator)[:, 0]


def sample(logits: Tensor, samplers: list[Sampler | None]) -> Tensor:
    """The next token of each request, int64 [n], from logits [n, V] in fp32. None: of a request that has ended.

    A request whose logits are NaN or infinite gets any token, and is lost; the others are not concerned.
    """
    highest, tokens = logits.max(-1)
    for row, (sampler, finite) in enumerate(zip(samplers, highest.isfinite().tolist(), strict=True)):
        if sampler is None:
            continue
        sampler.lost |= not finite
        if finite and not sampler.greedy:
            tokens[row : row + 1] = sampler(logits[row : row + 1])
    return tokens

"""What vLLM's LoRA layers call, on peftk's kernels. Imports no vLLM: `cpu` and `gpu` put it before vLLM's classes.

vLLM calls such an object a punica wrapper, after Chen et al. 2023 (arXiv 2310.18547). It knows which slot each row of
the batch uses, and gets vLLM's stacked factors in every call. All of it is one operation here, y += s·(xA)B with a slot
a row, -1 for the base layer alone; where only A or only B is given, the other one is the identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftk.ops import dispatch
from peftk.serve.engines.vllm import stacks
from peftk.serve.engines.vllm.stacks import Factors, Stacks

if TYPE_CHECKING:
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase as Base
else:
    Base = object


class PeftkPunica(Base):
    """A mixin for vLLM's punica wrappers; what it does not define (mixtures of experts) stays vLLM's own.

    All arguments are vLLM's. Rows: y [M, N] and x [M, K] of the batch's tokens, or of its prompts in `add_lora_logits`
    and `apply_lora_full_linear`. Results are added to y in place; a row is rounded once more then.
    """

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.stacks = Stacks()
        # Padding rows of a batch, and all rows before the first `update_metadata`, use the base layer alone.
        self._slots = {
            rows: torch.full((max_num_batched_tokens,), -1, dtype=torch.int32, device=device)
            for rows in ("tokens", "prompts")
        }

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        for rows, found in (("tokens", self.token_lora_indices), ("prompts", self.sampler_indices)):
            self._slots[rows][: len(found)] = found
            self._slots[rows][len(found) :] = -1

    def add_shrink(
        self, y: tuple[Tensor, ...] | Tensor, x: Tensor, lora_a_stacked: tuple[Tensor, ...], scale: float, **kwargs: Any
    ) -> None:
        """y[i] [M, r] = x A_i · scale, one for each slice."""
        x = x.view(-1, x.shape[-1])
        for out, lora_A in zip(y, lora_a_stacked, strict=True):
            self._add(out.zero_(), x, (lora_A,), (), "tokens", scale)

    def add_expand(
        self,
        y: Tensor,
        x: tuple[Tensor, ...] | Tensor,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y's columns of slice i, from offset_start on, += x[i] B_i; x[i] [M, r]."""
        y = y.view(-1, y.shape[-1])
        for v, lora_B, size in zip(x, lora_b_stacked, output_slices, strict=True):
            self._expand(y[:, offset_start : offset_start + size], v, lora_B, add_inputs)
            offset_start += size

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """y += x B; x [M, r] are the rows of A that belong to the tokens."""
        self._expand(y, x, lora_b_stacked, add_inputs)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: Any = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y's columns of slice i += x A_i B_i · scale. buffer is not needed."""
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if not add_inputs:
            y.zero_()
        self._add(y, x, lora_a_stacked, lora_b_stacked, "tokens", scale)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Any = None,
        **kwargs: Any,
    ) -> None:
        """y += x A B · scale, a row for each prompt. y may have more columns than B (padding) or fewer."""
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        lora_B = lora_b_stacked[:, :, : y.shape[1]]
        self._add(y[:, : lora_B.shape[2]], x, (lora_a_stacked,), (lora_B,), "prompts", scale)

    def apply_lora_full_linear(
        self, y: Tensor, x: Tensor, weight_stacked: Tensor, bias_stacked: Tensor, module_enabled: Tensor
    ) -> None:
        """y = x Wᵀ + bias for prompts whose adapter has a whole layer of its own; weight_stacked [slots, 1, N, K]."""
        full = torch.zeros(x.shape[0], weight_stacked.shape[-2], dtype=torch.float32, device=x.device)
        self._add(full, x, (weight_stacked,), (), "prompts")
        y.copy_(self._select_full_linear_output(y, full, bias_stacked, module_enabled))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Factors, lora_B: Factors) -> Tensor:
        """x Wᵀ + bias + x A B, base layer and adapters in one call, rounded once. x [..., K], a row a token."""
        rows = x.reshape(-1, x.shape[-1])
        table, slots = self.stacks.table(lora_A, lora_B), self._slots["tokens"][: len(rows)]
        y = dispatch.direct_multi_lora_linear(rows, weight, bias, table, slots)
        if y is None:
            y, _ = dispatch.multi_lora_linear(rows, weight, bias, table, slots)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)

    def _expand(self, y: Tensor, x: Tensor, lora_B: Tensor, add_inputs: bool) -> None:
        if not add_inputs:
            y.zero_()
        self._add(y, x, (), (lora_B,), "tokens")

    def _add(self, y: Tensor, x: Tensor, lora_A: Factors, lora_B: Factors, rows: str, scale: float = 1.0) -> None:
        """y += x A B · scale; x is [M, K]. An op where vLLM compiles the model, which it does on a GPU."""
        add = add_op if torch.compiler.is_compiling() else add_
        add(y, x, self._slots[rows][: len(x)], lora_A, lora_B, scale, self.stacks.number)


def add_(y: Tensor, x: Tensor, slots: Tensor, lora_A: Factors, lora_B: Factors, scale: float, number: int) -> None:
    """y [M, N] += x A B · scale in place. slots: int32 [M]. number: of the Stacks."""
    dispatch.add_adapters_(y, x if scale == 1 else x * scale, stacks.of(number).table(lora_A, lora_B), slots)


def _add_op(
    y: Tensor, x: Tensor, slots: Tensor, lora_A: list[Tensor], lora_B: list[Tensor], scale: float, number: int
) -> None:
    add_(y, x, slots, lora_A, lora_B, scale, number)


add_op = torch.library.custom_op("peftk::punica_add", _add_op, mutates_args=("y",))
add_op.register_fake(lambda *_: None)

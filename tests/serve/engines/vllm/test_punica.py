"""The operations of vLLM's LoRA layers on peftk's kernels, without vLLM: a stand-in has what the mixin reads of it."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor

from peftk.reference.lora_linear import multi_lora_linear
from peftk.serve.engines.vllm.punica import PeftkPunica
from tests.support import numerics
from tests.support.cases import Case, expected

SLOTS, R, K = 5, 20, 24
SIZES = (32, 8, 16)
RANKS = [[4, 17, R, 0, 1], [3, 0, R, 0, 16], [4, 18, R, 0, 2]]  # of each slice, by slot
TOKENS = [0, -1, 1, 1, 2, 3, 4, -1, 0]


class Metadata:
    """What PunicaWrapperBase does for the mixin: the slots of tokens and prompts, as int64."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: str, **kwargs: object) -> None:
        self.token_lora_indices = self.sampler_indices = torch.empty(0, dtype=torch.long)

    def update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs) -> None:
        slot = {lora: index for index, lora in enumerate(lora_index_to_id)} | {0: -1}
        self.token_lora_indices = torch.tensor([slot[lora] for lora in mapping.index_mapping], dtype=torch.long)
        self.sampler_indices = torch.tensor([slot[lora] for lora in mapping.prompt_mapping], dtype=torch.long)

    def _select_full_linear_output(self, y, full, bias, enabled):
        at = self.sampler_indices.clamp_min(0)
        chosen = (self.sampler_indices >= 0) & enabled[at]
        return torch.where(chosen[:, None], full.to(y.dtype) + bias[at].to(y.dtype), y)


class Punica(PeftkPunica, Metadata):
    pass


def punica(tokens: list[int] = TOKENS, prompts: list[int] = TOKENS) -> Punica:
    """With the adapters 10 … 14 in the slots 0 … 4; 0 is vLLM's number for no adapter."""
    made = Punica(16, 8, "cpu")
    numbers = types.SimpleNamespace(
        index_mapping=[slot + 10 if slot >= 0 else 0 for slot in tokens],
        prompt_mapping=[slot + 10 if slot >= 0 else 0 for slot in prompts],
    )
    made.update_metadata(numbers, [10, 11, 12, 13, 14], SLOTS, 100)
    return made


def stacks(dtype: torch.dtype, sizes: tuple[int, ...] = SIZES) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Factors as vLLM stacks them, with zeros beyond each rank."""
    torch.manual_seed(0)
    A = tuple(torch.zeros(SLOTS, 1, R, K, dtype=dtype) for _ in sizes)
    B = tuple(torch.zeros(SLOTS, 1, N, R, dtype=dtype) for N in sizes)
    for ranks, a, b in zip(RANKS, A, B, strict=False):
        for slot, rank in enumerate(ranks):
            a[slot, 0, :rank], b[slot, 0, :, :rank] = torch.randn(rank, K) / 5, torch.randn(b.shape[2], rank) / 4
    return A, B


def delta(x: Tensor, A: tuple[Tensor, ...], B: tuple[Tensor, ...], slots: list[int]) -> Tensor:
    """The adapters' part in fp64."""
    out = torch.zeros(len(x), sum(b.shape[2] for b in B), dtype=torch.float64)
    for row, slot in enumerate(slots):
        if slot >= 0:
            out[row] = torch.cat(
                [x[row].double() @ a[slot, 0].double().t() @ b[slot, 0].double().t() for a, b in zip(A, B, strict=True)]
            )
    return out


def close(actual: Tensor, wanted: Tensor) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[actual.dtype]
    torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_layer_and_adapters_of_packed_slices_in_one_call(dtype: torch.dtype, learned: bool) -> None:
    A, B = stacks(dtype)
    wrapper = punica()
    for slot in range(SLOTS) if learned else ():
        wrapper.stacks.learn(A, B, slot)
    assert wrapper.stacks.ranks(A, B) == (RANKS if learned else [[R] * SLOTS] * 3)
    x, W, bias = (torch.randn(*shape).to(dtype) for shape in ((len(TOKENS), K), (sum(SIZES), K), (sum(SIZES),)))
    table, ids = wrapper.stacks.table(A, B), torch.tensor(TOKENS, dtype=torch.int32)
    with torch.inference_mode():
        y = wrapper.linear(x, W, bias, A, B)
    numerics.check(y, *expected(Case(x, W, bias, table.adapters, ids, table.columns)))
    torch.testing.assert_close(y, multi_lora_linear(x, W, bias, table, ids)[0], rtol=1e-2, atol=1e-2)


def test_rows_of_the_base_model_are_not_changed_by_a_bit() -> None:
    A, B = stacks(torch.bfloat16)
    y, x = torch.randn(len(TOKENS), sum(SIZES)).bfloat16(), torch.randn(len(TOKENS), K).bfloat16()
    before = y.clone()
    punica().add_lora_linear(y, x, A, B, 1.0, SIZES)
    base = torch.tensor(TOKENS) < 0
    assert torch.equal(y[base], before[base])
    close(y, before.double() + delta(x, A, B, TOKENS))


def test_rows_beyond_the_batch_use_the_base_model() -> None:
    """vLLM pads batches for CUDA graphs, and runs the model before it has any request."""
    A, B = stacks(torch.float32)
    x = torch.randn(12, K)
    y = torch.zeros(12, sum(SIZES))
    punica().add_lora_linear(y, x, A, B, 1.0, SIZES)
    assert y[len(TOKENS) :].abs().max() == 0
    Punica(16, 8, "cpu").add_lora_linear(y.zero_(), x, A, B, 1.0, SIZES)
    assert y.abs().max() == 0


def test_one_tenants_nan_stays_his() -> None:
    A, B = stacks(torch.float32)
    A[0][0, 0, 0, 0] = torch.nan
    y = torch.zeros(len(TOKENS), sum(SIZES))
    punica().add_lora_linear(y, torch.randn(len(TOKENS), K), A, B, 1.0, SIZES)
    assert y.isnan().any(1).tolist() == [slot == 0 for slot in TOKENS]


def test_a_slot_gets_another_adapter() -> None:
    A, B = stacks(torch.float32)
    wrapper, x = punica(), torch.randn(len(TOKENS), K)
    wrapper.stacks.learn(A, B, 0)
    for stack in (*A, *B):
        stack[0] = 0
    wrapper.stacks.forget(A, B, 0)
    assert [ranks[0] for ranks in wrapper.stacks.ranks(A, B)] == [0, 0, 0]
    A[1][0, 0, :19], B[1][0, 0, :, :19] = torch.randn(19, K) / 5, torch.randn(SIZES[1], 19) / 4
    wrapper.stacks.learn(A, B, 0)
    assert [ranks[0] for ranks in wrapper.stacks.ranks(A, B)] == [0, 19, 0]
    y = torch.zeros(len(TOKENS), sum(SIZES))
    wrapper.add_lora_linear(y, x, A, B, 1.0, SIZES)
    close(y, delta(x, A, B, TOKENS))


def test_shrink_and_expand_apart_are_the_same() -> None:
    """So vLLM calls them where ranks are spread over processes."""
    A, B = stacks(torch.float32)
    wrapper, x = punica(), torch.randn(len(TOKENS), K)
    v = torch.full((3, len(TOKENS), R), torch.nan)
    wrapper.add_shrink(v, x, A, 0.5)
    y = torch.ones(len(TOKENS), 4 + sum(SIZES))
    wrapper.add_expand(y, v, B, SIZES, offset_start=4, add_input=True)
    close(y[:, 4:], 1 + delta(x, A, B, TOKENS) / 2)
    assert (y[:, :4] == 1).all()
    wrapper.add_expand(y, v, B, SIZES, offset_start=4, add_inputs=False)
    close(y[:, 4:], delta(x, A, B, TOKENS) / 2)


def test_nothing_is_learned_of_ranks_that_are_spread_over_processes() -> None:
    A, B = stacks(torch.float32)
    half = tuple(a[:, :, : R // 2].contiguous() for a in A)
    wrapper, x = punica(), torch.randn(len(TOKENS), K)
    wrapper.stacks.forget(half, B, 0)
    wrapper.stacks.learn(half, B, 0)
    v = torch.zeros(3, len(TOKENS), R // 2)
    wrapper.add_shrink(v, x, half, 1.0)
    close(v[0], delta(x, half[:1], (torch.eye(R // 2).expand(SLOTS, 1, -1, -1),), TOKENS))


def test_embedding() -> None:
    _, B = stacks(torch.bfloat16)
    x = torch.randn(len(TOKENS), R).bfloat16()
    y = torch.ones(len(TOKENS), SIZES[0]).bfloat16()
    punica().add_lora_embedding(y, x, B[0], add_input=True)
    parts = [x[i].double() @ B[0][s, 0].double().t() if s >= 0 else torch.zeros(SIZES[0]) for i, s in enumerate(TOKENS)]
    close(y, 1 + torch.stack([part.double() for part in parts]))


@pytest.mark.parametrize("columns", [SIZES[0], SIZES[0] + 8, SIZES[0] - 8])
def test_logits_use_the_prompts_rows_and_as_many_columns_as_there_are(columns: int) -> None:
    A, B = stacks(torch.bfloat16)
    prompts = [4, -1, 2]
    x, y = torch.randn(3, K).bfloat16(), torch.zeros(3, columns)  # logits may be fp32
    punica(TOKENS, prompts).add_lora_logits(y, x, A[0], B[0], 1.0)
    wanted = torch.zeros(3, columns, dtype=torch.float64)
    both = min(columns, SIZES[0])
    wanted[:, :both] = delta(x, A[:1], B[:1], prompts)[:, :both]
    close(y, wanted)


def test_whole_layers_of_adapters() -> None:
    """A classifier head in modules_to_save: slot 2 has one, slot 4 has none."""
    torch.manual_seed(0)
    W, bias = torch.randn(SLOTS, 1, 3, K), torch.randn(SLOTS, 3)
    enabled, prompts = torch.tensor([False, False, True, False, False]), [4, -1, 2]
    x, y = torch.randn(3, K), torch.ones(3, 3)
    punica(TOKENS, prompts).apply_lora_full_linear(y, x, W, bias, enabled)
    assert (y[:2] == 1).all()
    close(y[2:], (x[2].double() @ W[2, 0].double().t() + bias[2])[None])


def test_as_an_op_in_compiled_code() -> None:
    A, B = stacks(torch.float32)
    wrapper, x = punica(), torch.randn(len(TOKENS), K)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: Tensor) -> Tensor:
        y = torch.zeros(len(TOKENS), sum(SIZES))
        wrapper.add_lora_linear(y, x, A, B, 1.0, SIZES)
        return y * 2

    close(compiled(x), 2 * delta(x, A, B, TOKENS))


def test_stacks_that_do_not_belong_together_are_named() -> None:
    A, B = stacks(torch.float32)
    wrapper = punica()
    with pytest.raises(ValueError, match=r"lora_A: expected as many slices as lora_B, at least 1, got 3 and 2"):
        wrapper.stacks.table(A, B[:2])
    with pytest.raises(ValueError, match=r"lora_A: expected slice 0 to be \[slots, 1, r, K\]"):
        wrapper.stacks.table([A[0][:, :, :5]], [B[0]])
    with pytest.raises(ValueError, match=r"y: expected \[M, N\] beside x \[M, K\]"):
        wrapper.add_lora_linear(torch.zeros(3, sum(SIZES)), torch.zeros(4, K), A, B, 1.0, SIZES)

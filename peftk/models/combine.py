"""Several adapters into one new one, weighted, by the methods that HF PEFT's `add_weighted_adapter` knows.

For one module with adapters i of weight w_i (any sign), factors A_i [R_i, K] and B_i [N, R_i] and scaling s_i, and
with p_i = prune(·), elementwise:

    cat              A = [w_i s_i A_i] stacked, B = [B_i] side by side: BA = Σ w_i s_i B_i A_i, exact, of rank Σ R_i
    svd              BA = the best rank-r approximation of Σ w_i s_i B_i A_i
    linear           A = Σ sign(w_i s_i) √|w_i s_i| A_i, B = Σ √|w_i s_i| B_i: cheap, with all cross terms B_i A_j
    ties             as linear; of each factor the largest `density` are kept, and of these only the entries that have
                     the sign of the majority; their mean over the adapters that have one
    dare_linear      as linear; of each factor a random `density` is kept and divided by it
    dare_ties        the random choice of dare, the signs and means of ties
    magnitude_prune  as linear, of the largest `density` of each factor
    *_svd            the same on ΔW_i = s_i B_i A_i with weights w_i in place of factors, then svd

Sums are formed in fp32 (fp64 for fp64 factors); the outcome is rounded once to the dtype of the first adapter. Sources:
Yadav et al. 2023 (TIES), Yu et al. 2023 (DARE); the arguments, defaults and order of random draws are PEFT 0.21's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from peftk.adapters import checks
from peftk.checkpoints import peft as peft_checkpoint
from peftk.checkpoints.files import CheckpointError
from peftk.checkpoints.peft import LoadedAdapter, LoadedCheckpoint

_PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = ("svd", "linear", "cat", *_PRUNED, *(f"{name}_svd" for name in _PRUNED))


def combine(
    adapters: Sequence[LoadedAdapter],
    weights: Sequence[float],
    combination_type: str = "svd",
    *,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    generator: torch.Generator | None = None,
) -> LoadedAdapter:
    """One module's adapters into a new one of scaling 1. The module docstring has the formulas.

    Args:
        adapters: of one module: lora_A [R, K] and lora_B [N, R], on one device. Ranks may differ with cat and *svd.
            A single one is scaled by `linear`, whatever the method, as in PEFT.
        weights: one for each adapter, of any sign, dimensionless.
        density: the share of entries that pruning keeps, 0 … 1 (dare: more than 0); ties, dare and magnitude_prune.
        majority_sign_method: the sign of the sum of the entries, or of the sum of their signs; ties.
        svd_rank: of the outcome; None for the largest of the adapters'. svd_clamp: both factors are clamped to ± this
            quantile of their entries. svd_full_matrices, svd_driver: as `torch.linalg.svd`.
        generator: dare's; None for torch's own. One adapter after another, all A before all B, as PEFT draws.

    Raises:
        TypeError, ValueError: an argument is not one of these, the adapters are not of one module, or the outcome would
            not be finite.
    """
    _check_options(combination_type, density, majority_sign_method, svd_rank, svd_clamp)
    _check_adapters(adapters, weights)
    if len(adapters) == 1:
        combination_type = "linear"
    dtype = adapters[0].lora_A.dtype
    wide = torch.promote_types(dtype, torch.float32)
    scaled = [float(w) * adapter.scaling for w, adapter in zip(weights, adapters, strict=True)]

    def mixed(tensors: list[Tensor], shares: list[float], method: str) -> Tensor:
        return _mixed(tensors, shares, method, density, majority_sign_method, generator).to(wide)

    if combination_type == "cat":
        lora_A = torch.cat([adapter.lora_A.to(wide) * s for s, adapter in zip(scaled, adapters, strict=True)])
        lora_B = torch.cat([adapter.lora_B.to(wide) for adapter in adapters], dim=1)
    elif combination_type.endswith("svd"):
        rank = max(adapter.lora_A.shape[0] for adapter in adapters) if svd_rank is None else svd_rank
        deltas = [(a.lora_B.to(wide) @ a.lora_A.to(wide) * a.scaling).to(dtype) for a in adapters]
        delta = mixed(deltas, [float(w) for w in weights], combination_type.removesuffix("_svd"))
        lora_A, lora_B = _svd(delta, rank, svd_clamp, svd_full_matrices, svd_driver)
    else:
        ranks = [adapter.lora_A.shape[0] for adapter in adapters]
        if len(set(ranks)) > 1:
            raise ValueError(f"adapters: expected one rank for {combination_type} (cat and *svd take any), got {ranks}")
        roots = [math.sqrt(abs(s)) for s in scaled]
        signed = [math.copysign(root, s) for root, s in zip(roots, scaled, strict=True)]
        lora_A = mixed([adapter.lora_A for adapter in adapters], signed, combination_type)
        lora_B = mixed([adapter.lora_B for adapter in adapters], roots, combination_type)
    lora_A, lora_B = lora_A.to(dtype).contiguous(), lora_B.to(dtype).contiguous()
    if not bool(lora_A.isfinite().all() and lora_B.isfinite().all()):
        raise ValueError(f"adapters: expected a combination that {dtype} holds, got inf or NaN")
    return LoadedAdapter(lora_A, lora_B, lora_alpha=float(lora_A.shape[0]), use_rslora=False)


def combine_checkpoints(
    adapters: Sequence[str | os.PathLike[str] | Mapping[str, LoadedAdapter]],
    weights: Sequence[float],
    combination_type: str = "svd",
    **options: Any,
) -> dict[str, LoadedAdapter]:
    """`combine` for every module of several checkpoints: what `peftk.switch_adapter` takes.

    Args:
        adapters: folders of PEFT checkpoints, or module name → adapter. A module that some of them don't have is
            combined from those that do, as in PEFT.
        weights, combination_type, options: as in `combine`; modules draw one after another, in the order of `adapters`.

    Raises:
        CheckpointError: a folder cannot be read. TypeError, ValueError: as `combine`, with the module's name.
    """
    _one_weight_each(adapters, weights)
    read = [one if isinstance(one, Mapping) else peft_checkpoint.load_factors(one) for one in adapters]
    _one_base([one for one in read if isinstance(one, LoadedCheckpoint)])
    loaded = [one.adapters if isinstance(one, LoadedCheckpoint) else one for one in read]
    combined = {}
    for name in dict.fromkeys(name for one in loaded for name in one):
        present = [(one[name], weight) for one, weight in zip(loaded, weights, strict=True) if name in one]
        try:
            chosen, shares = [adapter for adapter, _ in present], [weight for _, weight in present]
            combined[name] = combine(chosen, shares, combination_type, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    return combined


def _one_base(checkpoints: Sequence[LoadedCheckpoint]) -> None:
    """Raises CheckpointError unless what checkpoints bring of the base model is one and the same, and adapted.

    PEFT saves W of an adapted embedding beside its adapter. Of another embedding it does so where its size was changed.
    """
    seen: dict[str, LoadedCheckpoint] = {}
    for one in checkpoints:
        for name, value in one.base.items():
            first = seen.setdefault(name, one)
            if name.rpartition(".")[0] not in one.adapters or not torch.equal(first.base[name], value):
                raise CheckpointError(
                    f"{one.path}: expected LoRA factors alone, got {name} of a base model whose embeddings have changed"
                )


def _mixed(
    tensors: list[Tensor],
    weights: list[float],
    method: str,
    density: float | None,
    majority_sign_method: str,
    generator: torch.Generator | None,
) -> Tensor:
    """Σ w_i prune(t_i), or of those entries that have the majority's sign their mean."""
    if density is not None and method not in ("linear", "svd"):
        random = method.startswith("dare")
        tensors = [_kept_at_random(t, density, generator) if random else _largest(t, density) for t in tensors]
    stacked = torch.stack(tensors)
    shares = torch.tensor(weights, device=stacked.device).view(-1, *[1] * tensors[0].dim())
    weighted = stacked * shares
    if not method.endswith("ties"):
        return weighted.sum(dim=0)
    sign = stacked.sign()
    majority = torch.where((stacked if majority_sign_method == "total" else sign).sum(dim=0) >= 0, 1, -1)
    agree = sign == majority
    return (weighted * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """The ⌊density · count⌋ of largest magnitude; zeros elsewhere."""
    if density >= 1:
        return tensor
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).flatten()
    mask[kept] = 1
    return tensor * mask.view(tensor.shape)


def _kept_at_random(tensor: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """Each with probability `density`, divided by it so that the mean stays; zeros elsewhere."""
    if density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


def _svd(
    delta: Tensor, rank: int, clamp: float | None, full_matrices: bool, driver: str | None
) -> tuple[Tensor, Tensor]:
    """A [rank, K] = Vᵀ and B [N, rank] = U·S of the best approximation of ΔW [N, K]."""
    if rank > min(delta.shape):
        raise ValueError(f"svd_rank: expected at most {min(delta.shape)} for ΔW {list(delta.shape)}, got {rank}")
    if not bool(delta.isfinite().all()):
        raise ValueError("adapters: expected Σ w·s·BA to be finite, got inf or NaN")
    try:
        U, S, Vh = torch.linalg.svd(delta, full_matrices=full_matrices, driver=driver)
    except RuntimeError as error:
        if driver is None:
            raise
        raise ValueError(
            f"svd_driver: expected one that torch has on {delta.device}, got {driver!r}: {error}"
        ) from None
    lora_A, lora_B = Vh[:rank], U[:, :rank] * S[:rank]
    if clamp is not None:
        most = torch.cat([lora_B.flatten(), lora_A.flatten()]).quantile(clamp)
        lora_A, lora_B = lora_A.clamp(-most, most), lora_B.clamp(-most, most)
    return lora_A, lora_B


def _check_options(
    combination_type: str,
    density: float | None,
    majority_sign_method: str,
    svd_rank: int | None,
    svd_clamp: float | None,
) -> None:
    if combination_type not in METHODS:
        raise ValueError(f"combination_type: expected one of {', '.join(METHODS)}, got {combination_type!r}")
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method: expected total or frequency, got {majority_sign_method!r}")
    if combination_type.removesuffix("_svd") in _PRUNED:
        least = "0 <" if combination_type.startswith("dare") else "0 ≤"
        if density is None or not _is_number(density) or not 0 <= density <= 1 or (density == 0 and least == "0 <"):
            raise ValueError(f"density: expected {least} density ≤ 1 for {combination_type}, got {density!r}")
    if svd_rank is not None and (not isinstance(svd_rank, int) or isinstance(svd_rank, bool) or svd_rank < 1):
        raise ValueError(f"svd_rank: expected an integer of 1 or more, got {svd_rank!r}")
    if svd_clamp is not None and (not _is_number(svd_clamp) or not 0 <= svd_clamp <= 1):
        raise ValueError(f"svd_clamp: expected a quantile, 0 … 1, got {svd_clamp!r}")


def _check_adapters(adapters: Sequence[LoadedAdapter], weights: Sequence[float]) -> None:
    _one_weight_each(adapters, weights)
    for number, adapter in enumerate(adapters):
        if not isinstance(adapter, LoadedAdapter):
            raise TypeError(f"adapters: expected LoadedAdapter, got {type(adapter).__name__} as number {number}")
        if adapter.lora_bias is not None:
            raise ValueError(f"adapter {number}: lora_bias: expected None, got a bias, which no method here combines")
        lora_A, lora_B = adapter.lora_A, adapter.lora_B
        for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
            checks.floating(f"adapter {number}: {name}", factor)
        if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != lora_B.shape[1] or lora_A.shape[0] < 1:
            raise ValueError(
                f"adapter {number}: expected lora_A [R, K] and lora_B [N, R] with R ≥ 1, "
                f"got {list(lora_A.shape)} and {list(lora_B.shape)}"
            )
        if not math.isfinite(adapter.scaling):
            raise ValueError(f"adapter {number}: expected a finite scaling, got {adapter.scaling}")
        first = adapters[0]
        if lora_A.shape[1] != first.lora_A.shape[1] or lora_B.shape[0] != first.lora_B.shape[0]:
            raise ValueError(
                f"adapter {number}: expected K = {first.lora_A.shape[1]} and N = {first.lora_B.shape[0]} "
                f"like the first, got {list(lora_A.shape)} and {list(lora_B.shape)}"
            )
        if len({lora_A.device, lora_B.device, first.lora_A.device}) > 1:
            raise ValueError(
                f"adapter {number}: expected on {first.lora_A.device} like the first, "
                f"got lora_A on {lora_A.device} and lora_B on {lora_B.device}"
            )
        for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
            checks.dense(f"adapter {number}: {name}", factor)
            if not bool(factor.isfinite().all()):
                raise ValueError(f"adapter {number}: {name}: expected finite values, got inf or NaN")


def _one_weight_each(adapters: Any, weights: Any) -> None:
    for name, values in (("adapters", adapters), ("weights", weights)):
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name}: expected a list or tuple, got {type(values).__name__}")
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(
            f"weights: expected one for each of 1 or more adapters, got {len(weights)} for {len(adapters)}"
        )
    for weight in weights:
        if not _is_number(weight) or not math.isfinite(weight):
            raise ValueError(f"weights: expected finite numbers, got {weight!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

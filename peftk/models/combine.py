"""Combines several adapters into a new one, with weights, by the methods of HF PEFT's `add_weighted_adapter`.

For one module, adapter i has the weight w_i (of any sign), factors A_i [R_i, K] and B_i [N, R_i], and scaling s_i:

    cat              A = [w_i s_i A_i] stacked, B = [B_i] side by side: BA = Σ w_i s_i B_i A_i exactly, with rank Σ R_i
    svd              BA = the best rank-r approximation of Σ w_i s_i B_i A_i
    linear           A = Σ sign(w_i s_i) √|w_i s_i| A_i, B = Σ √|w_i s_i| B_i: cheap, but with all cross terms B_i A_j
    ties             as linear, but each factor keeps only its share `density` of largest entries; of these, only those
                     with the majority's sign count, and the result is their mean over the adapters that have one
    dare_linear      as linear, but each factor keeps a random share `density` of its entries, divided by density
    dare_ties        random entries as in dare_linear, signs and means as in ties
    magnitude_prune  as linear, but each factor keeps only its share `density` of largest entries
    *_svd            the same on ΔW_i = s_i B_i A_i with weights w_i instead of on the factors, then svd

Sums are computed in fp32 (fp64 for fp64 factors); the result is rounded once to the dtype of the first adapter.
Sources: Yadav et al. 2023 (TIES), Yu et al. 2023 (DARE). The arguments, defaults and order of random draws are those of
PEFT 0.21.
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
    """Combines adapters of one module into a new one with scaling 1. The formulas are in the module's docstring.

    Args:
        adapters: of one module: lora_A [R, K] and lora_B [N, R], on one device. For cat and *svd, ranks may differ.
            A single adapter is scaled by `linear`, whatever the method, as in PEFT.
        weights: one per adapter, of any sign, no unit.
        combination_type: one of svd, linear, cat, ties, dare_linear, dare_ties, magnitude_prune, or one of the last
            four with _svd appended.
        density: for ties, dare and magnitude_prune: the share of entries to keep, 0 … 1 (dare: more than 0).
        majority_sign_method: for ties: "total", the sign of the sum of the entries, or "frequency", the sign of the sum
            of their signs.
        svd_rank: rank of the result; None means the largest of the adapters' ranks. svd_clamp: both factors are clamped
            to ± this quantile of their entries. svd_full_matrices, svd_driver: as in `torch.linalg.svd`.
        generator: for dare; None means torch's own. It draws adapter after adapter, all A before all B, as PEFT does.

    Returns:
        An adapter with the first adapter's dtype, on its device.

    Raises:
        TypeError, ValueError: an argument is not one of these, the adapters do not belong to one module, or the result
            would not be finite.
    """
    _check_options(combination_type, density, majority_sign_method, svd_rank, svd_clamp)
    _check_adapters(adapters, weights)
    if len(adapters) == 1:
        combination_type = "linear"
    dtype = adapters[0].lora_A.dtype
    wide = torch.promote_types(dtype, torch.float32)
    scaled = [float(w) * adapter.scaling for w, adapter in zip(weights, adapters, strict=True)]

    def mixed(tensors: list[Tensor], shares: list[float], method: str) -> Tensor:
        return _weighted_sum(tensors, shares, method, density, majority_sign_method, generator).to(wide)

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
        raise ValueError(f"adapters: expected a combination that is finite in {dtype}, got inf or NaN")
    return LoadedAdapter(lora_A, lora_B, lora_alpha=float(lora_A.shape[0]), use_rslora=False)


def combine_checkpoints(
    adapters: Sequence[str | os.PathLike[str] | Mapping[str, LoadedAdapter]],
    weights: Sequence[float],
    combination_type: str = "svd",
    **options: Any,
) -> dict[str, LoadedAdapter]:
    """Runs `combine` for every module of several checkpoints. `peftk.switch_adapter` takes the result.

    Args:
        adapters: folders of PEFT checkpoints, or dicts from module name to adapter. A module that is missing from some
            of them is combined from the others, as in PEFT.
        weights: one per checkpoint. combination_type, options: as in `combine`; random numbers are drawn module after
            module, in the order of `adapters`.

    Returns:
        Module name → adapter.

    Raises:
        CheckpointError: a folder cannot be read, or brings a changed base model.
        TypeError, ValueError: as `combine`, with the module's name.
    """
    _check_weights(adapters, weights)
    read = [source if isinstance(source, Mapping) else peft_checkpoint.load_factors(source) for source in adapters]
    _check_same_base([checkpoint for checkpoint in read if isinstance(checkpoint, LoadedCheckpoint)])
    loaded = [checkpoint.adapters if isinstance(checkpoint, LoadedCheckpoint) else checkpoint for checkpoint in read]
    combined = {}
    for name in dict.fromkeys(name for by_module in loaded for name in by_module):
        present = [
            (by_module[name], weight) for by_module, weight in zip(loaded, weights, strict=True) if name in by_module
        ]
        try:
            chosen, shares = [adapter for adapter, _ in present], [weight for _, weight in present]
            combined[name] = combine(chosen, shares, combination_type, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    return combined


def _check_same_base(checkpoints: Sequence[LoadedCheckpoint]) -> None:
    """Raises CheckpointError unless all weights of the base model in the checkpoints are equal and of adapted modules.

    PEFT saves the weight of an adapted embedding beside its adapter. It saves other embeddings only if their size was
    changed.
    """
    seen: dict[str, LoadedCheckpoint] = {}
    for checkpoint in checkpoints:
        for name, value in checkpoint.base.items():
            first = seen.setdefault(name, checkpoint)
            if name.rpartition(".")[0] not in checkpoint.adapters or not torch.equal(first.base[name], value):
                raise CheckpointError(
                    f"{checkpoint.path}: expected only LoRA factors, got {name} of a base model whose embeddings have "
                    "changed"
                )


def _weighted_sum(
    tensors: list[Tensor],
    weights: list[float],
    method: str,
    density: float | None,
    majority_sign_method: str,
    generator: torch.Generator | None,
) -> Tensor:
    """Σ w_i prune(t_i); for ties the mean of the entries that have the majority's sign."""
    if density is not None and method not in ("linear", "svd"):
        random = method.startswith("dare")
        tensors = [_keep_random(t, density, generator) if random else _keep_largest(t, density) for t in tensors]
    stacked = torch.stack(tensors)
    shares = torch.tensor(weights, device=stacked.device).view(-1, *[1] * tensors[0].dim())
    weighted = stacked * shares
    if not method.endswith("ties"):
        return weighted.sum(dim=0)
    sign = stacked.sign()
    majority = torch.where((stacked if majority_sign_method == "total" else sign).sum(dim=0) >= 0, 1, -1)
    agree = sign == majority
    return (weighted * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def _keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Keeps the ⌊density · count⌋ entries of largest magnitude; zeros elsewhere."""
    if density >= 1:
        return tensor
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).flatten()
    mask[kept] = 1
    return tensor * mask.view(tensor.shape)


def _keep_random(tensor: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """Keeps each entry with probability `density`, divided by it so that the mean stays; zeros elsewhere."""
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
    _check_weights(adapters, weights)
    for number, adapter in enumerate(adapters):
        if not isinstance(adapter, LoadedAdapter):
            raise TypeError(f"adapter {number}: expected a LoadedAdapter, got {type(adapter).__name__}")
        if adapter.lora_bias is not None:
            raise ValueError(f"adapter {number}: lora_bias: expected None, got a bias, which no method combines")
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


def _check_weights(adapters: Any, weights: Any) -> None:
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

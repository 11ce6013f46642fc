"""The public operations: each checks its arguments, chooses a backend, and is differentiable.

    y[m] = x[m] Wᵀ + bias + s_i · act(x̃[m] A_iᵀ + a_i) B_iᵀ + β_i

Every backend accumulates in fp32 and rounds once, to x's dtype; with u the unit roundoff of that dtype

    |y − y*| ≤ u·|y*| + c·√(K + R)·2⁻²⁴·(|x||W|ᵀ + |s||v||B|ᵀ + |bias| + |β|),   c = 2       (docs/numerics.md)

The reference runs fp64 inputs, in fp64. v is act(x̃Aᵀ + a), x̃ is x after dropout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from peftk.adapters import checks
from peftk.adapters.adapter import adapter_of
from peftk.adapters.bank import AdapterBank, PackedBank
from peftk.adapters.dropout import dropout_of
from peftk.adapters.table import AdapterTable
from peftk.ops import layer_calls, merge
from peftk.ops.dispatch import direct_lora_linear
from peftk.reference.merge import Factors, factors
from peftk.reference.receipt import MergeReceipt
from peftk.reference.receipt import check as check_receipt
from peftk.system.lasting import lasting
from peftk.system.recording import is_recording

__all__ = [
    "MergeReceipt",
    "adapter_block",
    "lora_linear",
    "merge_",
    "merge_layers_",
    "multi_adapter_block",
    "multi_lora_linear",
    "remerge_",
    "remerge_layers_",
    "unmerge_",
    "unmerge_layers_",
]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    *,
    activation: str = "identity",
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A frozen linear layer with one adapter, in one operation: `y = xWᵀ + bias + s·act(x̃Aᵀ + a)Bᵀ + β`.

    Args:
        x: [..., K]; weight: W [N, K], frozen; bias: [N].
        lora_A: A [R, K]; lora_B: B [N, R]; any R ≥ 1; both None for the base layer alone.
        scaling: s, dimensionless (lora_alpha / r).
        activation: identity, relu, gelu (erf), gelu_tanh or silu, applied to the R hidden values.
        bias_A: a [R]; bias_B: β [N].
        dropout_p: p, the probability with which each element of x is zeroed for the adapter only (x̃); the others are
            scaled by 1/(1 - p). The mask is recomputed from `seed` with Philox and not stored.
        seed: int64 tensor of one element on x's device; None draws one from torch's generator.
        backend: reference, cpu, gemm, triton or cuda; None chooses one (see `peftk.explain`).

    Dtypes: x, W and bias in fp32, bf16 or fp16, mixed freely; the adapter's tensors share one dtype, which may differ.
    Or everything in fp64. Under torch.autocast x and W are cast to its dtype, as in nn.Linear (docs/numerics.md).

    Returns:
        y [..., N] in x's dtype: fp32 accumulation, one rounding; the module's docstring has the error bound.
        Differentiable in x, bias and the adapter's four tensors.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a weight that requires grad.
        BackendError: the forced backend cannot run this call.

    Source: Hu et al. 2021 (LoRA); He et al. 2021 (with an activation: parallel adapter).
    """
    checks.base(weight, bias)
    checks.adapter(weight, lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias_B)
    scaling, dropout = float(scaling), dropout_of(dropout_p, seed, weight.device)
    if dropout is None and backend is None:
        y = direct_lora_linear(
            x, weight, bias, lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias_B
        )
        if y is not None:
            return y
    adapter = adapter_of(lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias_B)
    return layer_calls.lora_linear(x, weight, bias, adapter, dropout=dropout, backend=backend)


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: AdapterBank | PackedBank | AdapterTable,
    ids: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A frozen linear layer with a different adapter per row: row m uses adapter ids[m], or none if that is -1.

    y[m] = x[m] Wᵀ + bias + s_i · act(x̃[m] A_iᵀ + a_i) B_iᵀ + β_i, with i = ids[m].

    Args:
        x: [..., K]; weight: W [N, K], frozen; bias: [N].
        bank: the adapters (`peftk.AdapterBank`, or an `AdapterTable` of tensors stored elsewhere), with any ranks,
            activations and biases. A `peftk.PackedBank` for packed outputs: each slice of W's rows (for example query,
            key and value) has its own adapters, and a row uses those of its id in every slice.
        ids: int32 or int64, of shape x.shape[:-1] (per token) or, if x has three or more dimensions, x.shape[:1]
            (per sequence); in any order.
        dropout_p, seed, backend: as in `lora_linear`.

    Returns:
        y [..., N] in x's dtype. Each row has the error bound of `lora_linear` with its adapter. Rows do not influence
        each other: an inf in one adapter stays in its rows. Differentiable in x, bias and the adapters' tensors.

    Raises:
        TypeError, ValueError: as in `lora_linear`; also, on a CPU, for an id that is neither -1 nor the number of an
            adapter in the bank. On a GPU such an id counts as -1, unless PEFTK_CHECK=1 is set, which checks the ids and
            so synchronises.
        BackendError: the forced backend cannot run this call.

    Source: the problem is from Chen et al. 2023 (Punica) and Sheng et al. 2023 (S-LoRA).
    """
    checks.base(weight, bias)
    if not isinstance(bank, (AdapterBank, PackedBank, AdapterTable)):
        raise TypeError(f"bank: expected an AdapterBank, a PackedBank or an AdapterTable, got {type(bank).__name__}")
    bank = _current_bank(bank)
    _check_bank(bank, *weight.shape)
    if bank.device != weight.device:
        raise ValueError(f"bank: expected on {weight.device} like weight, got {bank.device}")
    dropout = dropout_of(dropout_p, seed, weight.device)
    return layer_calls.multi_lora_linear(
        x, weight, bias, bank, layer_calls.slots_of(bank, ids), dropout=dropout, backend=backend
    )


def _current_bank(bank: Any) -> Any:
    """Rebuilds a user's AdapterTable if its Parameters have moved in memory. (A bank does so itself.)"""
    return bank.current() if isinstance(bank, AdapterTable) and not is_recording() else bank


def _check_bank(bank: AdapterBank | PackedBank | AdapterTable, N: int, K: int) -> None:
    """Checks that the adapters fit W. A bank has checked them against its own shape, so only that shape is compared."""
    if isinstance(bank, AdapterTable) or bank.shape != (N, K):
        checks.bank(bank.adapters, bank.columns, N, K)


def adapter_block(
    x: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float = 1.0,
    *,
    activation: str = "relu",
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A series adapter (skip, down, activation, up) in one operation: `y = x + s·act(x̃Aᵀ + a)Bᵀ + β`.

    It is `lora_linear` with W = identity, without that product.

    Args:
        x: [..., K]; lora_A: A [R, K] (down); lora_B: B [K, R] (up); any R ≥ 1.
        scaling: s, dimensionless; bias_A: a [R]; bias_B: β [K].
        activation, dropout_p, seed, backend: as in `lora_linear`.

    Returns:
        y [..., K] in x's dtype: fp32 accumulation, one rounding, so the error is at most u·|y*| + c·√(K + R)·2⁻²⁴·(|x|
        + |s|(|x̃||A|ᵀ + |a|)|B|ᵀ + |β|). Unlike in `lora_linear`, the error of the hidden values v counts, because
        there is no large |x||W|ᵀ. Differentiable in x and the adapter's four tensors.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        BackendError: the forced backend cannot run this call.

    Source: Houlsby et al. 2019.
    """
    checks.block(x, lora_A, lora_B, scaling, activation, bias_A, bias_B)
    scaling, dropout = float(scaling), dropout_of(dropout_p, seed, x.device)
    if dropout is None and backend is None:
        y = direct_lora_linear(
            x, None, None, lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias_B
        )
        if y is not None:
            return y
    adapter = adapter_of(lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias_B)
    return layer_calls.adapter_block(x, adapter, dropout=dropout, backend=backend)


def multi_adapter_block(
    x: Tensor,
    bank: AdapterBank | AdapterTable,
    ids: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A different series adapter per row: `adapter_block` with adapter ids[m], or y[m] = x[m] if that is -1.

    Args:
        x: [..., K]; bank: adapters with N = K; ids, dropout_p, seed, backend: as in `multi_lora_linear`.

    Returns:
        y [..., K] in x's dtype; each row has the error bound of `adapter_block` with its adapter.

    Raises:
        As `adapter_block` and `multi_lora_linear`.
    """
    if not isinstance(bank, (AdapterBank, AdapterTable)) or bank.columns:
        raise TypeError(f"bank: expected an AdapterBank or an AdapterTable, got {type(bank).__name__}")
    bank = _current_bank(bank)
    checks.block_bank(x, bank.device, bank.dtype)
    _check_bank(bank, x.shape[-1], x.shape[-1])
    dropout = dropout_of(dropout_p, seed, x.device)
    return layer_calls.multi_adapter_block(x, bank, layer_calls.slots_of(bank, ids), dropout=dropout, backend=backend)


def merge_(
    weight: Tensor,
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float] = 1.0,
    *,
    backend: str | None = None,
) -> MergeReceipt:
    """Merges adapters in place, W ← round(W + Σ s·BA), and returns the receipt from which `unmerge_` restores W.

    Each BA is a chain of fp32 fmas over ascending rank, then multiplied by s. The products of several adapters are
    added in order, and their sum is added to W. Each of these steps rounds once (`peftk.reference.merge`). All backends
    give the same bits, so a merge made on one can be undone on another.

    Args:
        weight: W [N, K], fp32, bf16 or fp16 (fp64: reference only), with any strides under which elements do not
            overlap.
        lora_A: A [R, K]; lora_B: B [N, R]; both are copied into the receipt. scaling: s, dimensionless. For several
            adapters in one pass: lists of equal length, of any ranks; scaling may still be one number for all.
        backend: as in `lora_linear`.

    Returns:
        MergeReceipt: A, B, and about half a byte per weight unless ΔW is several times as large as W (docs/merge.md).

    Raises:
        TypeError, ValueError: as in `lora_linear`, or if W' would not be finite. W is then unchanged.
        BackendError: the forced backend cannot run this call.
    """
    factors = _checked_factors(weight, lora_A, lora_B, scaling)
    return merge.merge_(weight, factors, backend=backend)


def unmerge_(weight: Tensor, receipt: MergeReceipt, *, backend: str | None = None) -> None:
    """Restores every bit that `weight` had before `receipt = merge_(weight, ...)`, in place.

    Args:
        weight: W' [N, K] as the merge left it; receipt: of that merge; backend: any, not only the one that merged.

    Raises:
        TypeError: receipt is not a MergeReceipt.
        ValueError: weight differs from what the merge left (shape, dtype, device or checksum). It is then unchanged.
        BackendError: the forced backend cannot run this call.
    """
    _check_merged_weight(weight, receipt)
    merge.unmerge_(weight, receipt, backend=backend)


def remerge_(
    weight: Tensor,
    receipt: MergeReceipt,
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float] = 1.0,
    *,
    backend: str | None = None,
) -> MergeReceipt:
    """Replaces one merge by another, with the bits of `unmerge_` followed by `merge_`.

    On a CPU this is one pass over W, in place, and no forward in between sees the unmerged weight.

    Args:
        As in `unmerge_` and `merge_`.

    Returns:
        MergeReceipt: of the new merge. It restores the base layer's weight, not the previous merge.

    Raises:
        As `unmerge_` and `merge_`. W is then unchanged: still merged, and `receipt` still undoes that.
    """
    factors = _checked_factors(weight, lora_A, lora_B, scaling)
    _require_receipt(receipt)
    return merge.remerge_(weight, receipt, factors, backend=backend)


def merge_layers_(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor | Sequence[Tensor]],
    lora_B: Sequence[Tensor | Sequence[Tensor]],
    scaling: float | Sequence[float | Sequence[float]] = 1.0,
    *,
    backend: str | None = None,
) -> list[MergeReceipt]:
    """`merge_` for many layers, with shapes, adapters and ranks that may differ. Merges all of them or none.

    That holds whatever is raised; Ctrl-C is delivered between two groups of layers. The CUDA C++ and Triton backends
    merge all layers of one device and pair of dtypes in one launch (of at most 2²⁸ weights), other backends one by one.

    Args:
        weights: one per layer; no two may share memory. lora_A, lora_B: one entry per layer, each as for `merge_`.
        scaling: one number for all layers, or one entry per layer, each as for `merge_`.

    Returns:
        list[MergeReceipt]: one per layer. Each can also be used alone, with `unmerge_` and `remerge_`.

    Raises:
        As `merge_`, with the number of the layer. No weight has then changed.
    """
    return merge.merge_layers_(weights, _layer_factors(weights, lora_A, lora_B, scaling), backend=backend)


def remerge_layers_(
    weights: Sequence[Tensor],
    receipts: Sequence[MergeReceipt | None],
    lora_A: Sequence[Tensor | Sequence[Tensor]],
    lora_B: Sequence[Tensor | Sequence[Tensor]],
    scaling: float | Sequence[float | Sequence[float]] = 1.0,
    *,
    backend: str | None = None,
) -> list[MergeReceipt]:
    """`remerge_` for many layers: replaces the merge of each receipt by one of these adapters. Changes all or none.

    Whatever is raised, layers that had already changed get the bits of their previous merge again, and `receipts` still
    undo it.

    Args:
        receipts: one per layer; None for a weight that is not merged. The others as in `merge_layers_`.

    Returns:
        list[MergeReceipt]: of the new merges, one per layer.

    Raises:
        As `remerge_`, with the number of the layer.
    """
    factors = _layer_factors(weights, lora_A, lora_B, scaling)
    _check_sequences(weights=weights, receipts=receipts)
    for layer, (weight, receipt) in enumerate(zip(weights, receipts, strict=True)):
        if receipt is not None:
            with _name_layer_in_errors(layer):
                _check_merged_weight(weight, receipt)
    return merge.remerge_layers_(weights, receipts, factors, backend=backend)


def unmerge_layers_(weights: Sequence[Tensor], receipts: Sequence[MergeReceipt], *, backend: str | None = None) -> None:
    """`unmerge_` for many layers. Unmerges all or none.

    Raises:
        As `unmerge_`, with the number of the layer. No weight has then changed.
    """
    _check_sequences(weights=weights, receipts=receipts)
    for layer, (weight, receipt) in enumerate(zip(weights, receipts, strict=True)):
        with _name_layer_in_errors(layer):
            _check_merged_weight(weight, receipt)
    checks.separate_memory(weights)
    merge.unmerge_layers_(weights, receipts, backend=backend)


def _layer_factors(weights: Any, lora_A: Any, lora_B: Any, scaling: Any) -> list[Factors]:
    """The adapters to merge into each layer, checked and copied."""
    _check_sequences(weights=weights, lora_A=lora_A, lora_B=lora_B)
    scalings = [scaling] * len(weights) if isinstance(scaling, (int, float)) else scaling
    _check_sequences(weights=weights, scaling=scalings)
    factors = []
    for layer, arguments in enumerate(zip(weights, lora_A, lora_B, scalings, strict=True)):
        with _name_layer_in_errors(layer):
            factors.append(_checked_factors(*arguments))
    checks.separate_memory(weights)
    return factors


@contextlib.contextmanager
def _name_layer_in_errors(layer: int) -> Iterator[None]:
    """Prefixes errors with the number of the layer."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {layer}: {error}") from None


def _check_sequences(**arguments: Any) -> None:
    """Checks for lists or tuples, all of one length."""
    (first, layers), *_ = arguments.items()
    for name, values in arguments.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name}: expected a list or tuple, one for each layer, got {type(values).__name__}")
        if len(values) != len(layers):
            raise ValueError(f"{name}: expected {len(layers)}, as many as {first}, got {len(values)}")


def _check_merged_weight(weight: Tensor, receipt: MergeReceipt) -> None:
    """The checks of unmerging, except those of values."""
    checks.dense("weight", weight)
    _require_receipt(receipt)
    checks.floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape {list(receipt.shape)} as in the merge, got {list(weight.shape)}")
    checks.writable("weight", weight)


def _require_receipt(receipt: MergeReceipt) -> None:
    if not isinstance(receipt, MergeReceipt):
        raise TypeError(f"receipt: expected the MergeReceipt that merge_ returned, got {type(receipt).__name__}")
    check_receipt(receipt)


@lasting()
def _checked_factors(weight: Tensor, lora_A: Any, lora_B: Any, scaling: Any) -> Factors:
    """The adapters of one layer's merge, one or several, checked and copied into one A and one B."""
    checks.dense("weight", weight)
    checks.base(weight.detach(), None)
    checks.writable("weight", weight)
    if not isinstance(lora_A, (list, tuple)) and not isinstance(lora_B, (list, tuple)):
        if lora_A is None:
            raise ValueError("lora_A: expected a tensor [R, K], got None")
        _check_factors(weight, lora_A, lora_B, scaling)
        return factors((lora_A,), (lora_B,), (float(scaling),))
    count = len(lora_A) if isinstance(lora_A, (list, tuple)) else len(lora_B)
    if isinstance(scaling, (int, float)):
        scaling = [scaling] * count
    for name, values in (("lora_A", lora_A), ("lora_B", lora_B), ("scaling", scaling)):
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name}: expected a list or tuple, one for each adapter, got {type(values).__name__}")
        if len(values) != count or count == 0:
            raise ValueError(f"{name}: expected {count or '1 or more'}, one for each adapter, got {len(values)}")
    for number, (A, B, s) in enumerate(zip(lora_A, lora_B, scaling, strict=True)):
        if A is None:
            raise ValueError(f"adapter {number}: lora_A: expected a tensor [R, K], got None")
        try:
            _check_factors(weight, A, B, s)
        except (TypeError, ValueError) as error:
            raise type(error)(f"adapter {number}: {error}") from None
    return factors(lora_A, lora_B, [float(s) for s in scaling])


def _check_factors(weight: Tensor, lora_A: Any, lora_B: Any, scaling: Any) -> None:
    """Checks one adapter of a merge."""
    checks.adapter(weight, lora_A, lora_B, scaling)
    checks.dense("lora_A", lora_A)
    checks.dense("lora_B", lora_B)

"""The public operations: values, shapes, bad input, autocast; on the default backend."""

from __future__ import annotations

import re

import pytest
import torch

import peftk
from peftk import functional
from peftk.adapters.bank import AdapterBank


def layer(N: int = 6, K: int = 8, R: int = 2, dtype: torch.dtype = torch.float32):  # type: ignore[no-untyped-def]
    return {
        "x": torch.randn(3, K).to(dtype),
        "weight": torch.randn(N, K).to(dtype),
        "bias": torch.randn(N).to(dtype),
        "lora_A": torch.randn(R, K).to(dtype),
        "lora_B": torch.randn(N, R).to(dtype),
        "scaling": 0.5,
    }


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 0, 8), (0, 8), (1, 2, 3, 8)])
def test_leading_shape_is_kept(shape: tuple[int, ...]) -> None:
    arguments = {**layer(), "x": torch.randn(shape)}
    y = functional.lora_linear(**arguments)
    assert y.shape == (*shape[:-1], 6)
    A, B = arguments["lora_A"], arguments["lora_B"]
    expected = arguments["x"] @ (arguments["weight"] + 0.5 * B @ A).t() + arguments["bias"]
    torch.testing.assert_close(y, expected)


BAD = [
    ({"x": torch.zeros(3, 8, dtype=torch.int64)}, TypeError, "x: expected dtype float32"),
    ({"x": torch.zeros(3, 7)}, ValueError, r"x: expected shape \[..., K\] with K = 8, got \[3, 7\]"),
    ({"x": torch.zeros(())}, ValueError, "x: expected shape"),
    ({"x": torch.zeros(3, 8, dtype=torch.float64)}, TypeError, "x: expected a dtype that mixes"),
    ({"x": torch.zeros(3, 8, device="meta")}, ValueError, "x: expected on cpu like weight, got meta"),
    ({"weight": torch.zeros(6)}, ValueError, r"weight: expected shape \[N, K\]"),
    ({"weight": torch.zeros(6, 8, requires_grad=True)}, ValueError, "weight: expected a frozen weight"),
    ({"weight": torch.zeros(6, 8, dtype=torch.int8)}, TypeError, "weight: expected dtype"),
    ({"bias": torch.zeros(5)}, ValueError, r"bias: expected shape \[N\] = \[6\], got \[5\]"),
    ({"lora_A": torch.zeros(2, 7)}, ValueError, r"lora_A: expected shape \[R, K\] = \[2, 8\], got \[2, 7\]"),
    ({"lora_B": torch.zeros(6, 3)}, ValueError, r"lora_B: expected shape \[N, R\] = \[6, 2\], got \[6, 3\]"),
    ({"lora_A": torch.zeros(0, 8), "lora_B": torch.zeros(6, 0)}, ValueError, "lora_A: expected shape .* R ≥ 1"),
    ({"lora_B": None}, ValueError, "lora_B: expected a tensor, as lora_A and lora_B belong together"),
    ({"lora_B": torch.zeros(6, 2, dtype=torch.float16)}, TypeError, "lora_B: expected torch.float32 like"),
    ({"lora_A": torch.zeros(2, 8, device="meta")}, ValueError, "lora_A: expected on cpu"),
    ({"lora_A": torch.zeros(2, 8, dtype=torch.int32)}, TypeError, "lora_A: expected dtype"),
    ({"scaling": float("nan")}, ValueError, r"scaling: expected a finite number \(in float32\), got nan"),
    ({"scaling": float("inf")}, ValueError, r"scaling: expected a finite number \(in float32\), got inf"),
    ({"scaling": 1e39}, ValueError, "scaling: expected a finite number"),
    ({"scaling": 10**400}, ValueError, "scaling: expected a finite number"),
    ({"activation": ["relu"]}, ValueError, "activation: expected one of"),
    ({"dropout_p": "a"}, ValueError, "dropout_p: expected 0 ≤ p < 1"),
    ({"dropout_p": 0.1, "seed": 3}, TypeError, "seed: expected an int64 tensor of one element, got int"),
    ({"bias": torch.zeros(6, dtype=torch.float64)}, TypeError, "bias: expected a dtype that mixes"),
    ({"x": torch.zeros(3, 8).to_sparse()}, TypeError, "x: expected a dense"),
    ({"weight": torch.zeros(6, 8).to_sparse()}, TypeError, "weight: expected a dense"),
    ({"scaling": "2"}, TypeError, "scaling: expected a number, got str"),
    ({"activation": "tanh"}, ValueError, "activation: expected one of identity, relu"),
    ({"bias_A": torch.zeros(3)}, ValueError, r"bias_A: expected shape \[R\] = \[2\]"),
    ({"bias_B": torch.zeros(3)}, ValueError, r"bias_B: expected shape \[N\] = \[6\]"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p: expected 0 ≤ p < 1, got 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p: expected 0 ≤ p < 1"),
    ({"dropout_p": 0.1, "seed": torch.zeros(1)}, TypeError, "seed: expected an int64 tensor"),
    ({"backend": "nonesuch"}, ValueError, "backend: expected one of reference, cpu, gemm, triton, cuda"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_of_lora_linear(change: dict, error: type[Exception], message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(error, match=message):
        functional.lora_linear(**{**layer(), **change})


def bank() -> AdapterBank:
    """Adapters 0 (rank 2) and 1 (rank 20, relu) in 4 slots."""
    made = AdapterBank(8, 6, 4, torch.float32, torch.device("cpu"))
    made.add("a", torch.randn(2, 8), torch.randn(6, 2), 1.0)
    made.add("b", torch.randn(20, 8), torch.randn(6, 20), 0.5, activation="relu")
    return made


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.tensor([0, 1]), ValueError, r"ids: expected shape \[3\] \(per token\), got \[2\]"),
        (torch.tensor([0.0, 1.0, 0.0]), TypeError, "ids: expected dtype int32 or int64"),
        ([0, 1, 0], TypeError, "ids: expected a tensor"),
        (torch.tensor([0, 2**32, 0]), ValueError, r"ids\[1\]: expected -1 or an adapter's number below 4"),
        (torch.tensor([0, 2**32 - 1, 0]), ValueError, r"ids\[1\]: expected -1"),
        (torch.tensor([0, -(2**32), 0]), ValueError, r"ids\[1\]: expected -1"),
        (torch.tensor([0, 4, 0]), ValueError, r"ids\[1\]: expected -1 or an adapter's number below 4, got 4"),
        (torch.tensor([0, -2, 0]), ValueError, r"ids\[1\]: .* got -2"),
        (torch.tensor([0, 3, 0]), ValueError, r"ids\[1\]: .* got 3, an empty slot"),
        (torch.tensor([0, 1, 0], device="meta"), ValueError, "ids: expected on cpu like x, got meta"),
    ],
)
def test_bad_ids(backend: str | None, ids: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.multi_lora_linear(torch.randn(3, 8), torch.randn(6, 8), None, bank(), ids, backend=backend)


def test_bad_bank() -> None:
    ids = torch.tensor([0, 0, 0])
    with pytest.raises(ValueError, match=r"bank\[0\]: expected lora_A \[R, 9\] and lora_B \[6, R\]"):
        functional.multi_lora_linear(torch.randn(3, 9), torch.randn(6, 9), None, bank(), ids)
    with pytest.raises(TypeError, match="bank: expected an AdapterBank, a PackedBank or an AdapterTable, got NoneType"):
        functional.multi_lora_linear(torch.randn(3, 9), torch.randn(6, 9), None, None, ids)
    bias_only = AdapterBank(3, 1, 2, torch.float32, torch.device("cpu"))
    bias_only.add("a", None, None, 1.0, bias_B=torch.randn(1))
    with pytest.raises(ValueError, match=r"bank\[0\]: expected bias_B of shape \[2000\], got \[1\]"):
        functional.multi_lora_linear(torch.zeros(3, 3), torch.randn(2000, 3), None, bias_only, ids)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_strided_factors_and_biases(backend: str) -> None:
    def strided(*shape: int) -> torch.Tensor:
        return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]

    names = {"x": (5, 12), "weight": (9, 12), "bias": (9,), "lora_A": (3, 12), "lora_B": (9, 3)}
    names |= {"bias_A": (3,), "bias_B": (9,)}
    arguments = {name: strided(*shape) for name, shape in names.items()}
    dense = {name: tensor.contiguous() for name, tensor in arguments.items()}
    for given in (arguments, dense):
        given["lora_B"].requires_grad_()
    y = functional.lora_linear(**arguments, scaling=0.5, activation="silu", backend=backend)
    expected = functional.lora_linear(**dense, scaling=0.5, activation="silu", backend="reference")
    torch.testing.assert_close(y, expected)
    dy = strided(5, 9)
    (actual,) = torch.autograd.grad(y, arguments["lora_B"], dy)
    (wanted,) = torch.autograd.grad(expected, dense["lora_B"], dy.contiguous())
    torch.testing.assert_close(actual, wanted)


def test_ids_per_token_and_per_sequence_agree() -> None:
    x, weight, adapters = torch.randn(3, 5, 8), torch.randn(6, 8), bank()
    per_sequence = torch.tensor([1, -1, 0])
    per_token = per_sequence[:, None].expand(3, 5).to(torch.int32)
    y = functional.multi_lora_linear(x, weight, None, adapters, per_sequence)
    assert torch.equal(y, functional.multi_lora_linear(x, weight, None, adapters, per_token))
    for row, number in enumerate(per_sequence.tolist()):
        adapter = adapters.slots[number] if number >= 0 else None
        factors = (None, None) if adapter is None else (adapter.lora_A, adapter.lora_B)
        alone = functional.lora_linear(
            x[row],
            weight,
            None,
            *factors,
            1.0 if adapter is None else adapter.scaling,
            activation="identity" if adapter is None else adapter.activation,
        )
        torch.testing.assert_close(y[row], alone)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_one_tenants_inf_stays_in_its_rows(backend: str, poison: float) -> None:
    adapters = AdapterBank(40, 24, 4, torch.float32, torch.device("cpu"))
    adapters.add("bad", torch.full((20, 40), poison), torch.full((24, 20), poison), 1.0)
    adapters.add("good", torch.randn(3, 40), torch.randn(24, 3), 1.0)
    for rows in (4, 70):
        ids = torch.tensor([0, 1, -1, 1] * rows)[:rows]
        y = functional.multi_lora_linear(
            torch.randn(rows, 40), torch.randn(24, 40), None, adapters, ids, backend=backend
        )
        assert y[ids != 0].isfinite().all()
        assert not y[ids == 0].isfinite().any()


def test_autocast_gives_the_dtype_of_autocast() -> None:
    arguments = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = functional.lora_linear(**arguments)
        assert y.dtype == torch.nn.functional.linear(arguments["x"], arguments["weight"]).dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), functional.lora_linear(**arguments), atol=0.1, rtol=0.02)


def test_dropout_is_unbiased_and_draws_anew() -> None:
    torch.manual_seed(0)
    arguments = {**layer(), "x": torch.ones(1, 8)}
    mean = torch.stack([functional.lora_linear(**arguments, dropout_p=0.5) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, functional.lora_linear(**arguments), atol=0.25, rtol=0.05)
    first, second = (functional.lora_linear(**arguments, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)


def test_dropout_masks_agree_between_backends() -> None:
    arguments = {**layer(K=37), "dropout_p": 0.4, "seed": torch.tensor([2**60 + 17])}
    torch.testing.assert_close(
        functional.lora_linear(**arguments, backend="cpu"), functional.lora_linear(**arguments, backend="reference")
    )


def test_fp64_is_served_by_the_reference() -> None:
    y = functional.lora_linear(**layer(dtype=torch.float64))
    assert y.dtype == torch.float64
    choice = peftk.explain("lora_linear", dtype=torch.float64)
    assert choice.backend == "reference"
    assert re.search("cpu: .*float64", str(choice))


def test_inference_mode_and_no_grad_agree_with_training() -> None:
    arguments = layer()
    arguments["lora_A"].requires_grad_()
    y = functional.lora_linear(**arguments)
    assert y.requires_grad
    with torch.inference_mode():
        assert torch.equal(functional.lora_linear(**arguments), y)
    with torch.no_grad():
        quiet = functional.lora_linear(**arguments)
    assert torch.equal(quiet, y)
    assert not quiet.requires_grad

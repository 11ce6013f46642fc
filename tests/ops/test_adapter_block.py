"""Series adapters: every backend against the fp64 reference, bad input, torch.compile."""

from __future__ import annotations

import pytest
import torch

import peftk
from peftk import functional
from peftk.ops import custom_ops
from tests.support import adapter_block


@pytest.mark.parametrize("backend", ["reference", "cpu", None])
@pytest.mark.parametrize("chunk", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1, 4))])
def test_random(backend: str | None, chunk: int) -> None:
    for seed in range(chunk * 20, (chunk + 1) * 20):
        try:
            adapter_block.check(seed, backend, max_rows=60, max_width=200)
        except AssertionError as error:
            raise AssertionError(f"case {seed}: {error}") from error


def tensors(K: int = 12, R: int = 4) -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 5, K), torch.randn(R, K), torch.randn(K, R), torch.randn(R), torch.randn(K)


def test_gradcheck() -> None:
    wide = [t.double().requires_grad_() for t in tensors()]

    def call(x, A, B, a, b):  # type: ignore[no-untyped-def]
        return functional.adapter_block(x, A, B, 0.5, activation="gelu", bias_A=a, bias_B=b)

    assert torch.autograd.gradcheck(call, wide)


@torch._inductor.config.patch(force_disable_caches=True)  # do not test graphs compiled earlier
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiles_without_a_graph_break(compiler: str) -> None:
    x, A, B, a, b = (t.requires_grad_() for t in tensors())
    ids = torch.tensor([0, -1, 0])
    bank = _bank(12, A, B)

    def call(x):  # type: ignore[no-untyped-def]
        y = functional.adapter_block(x, A, B, 0.5, activation="relu", bias_A=a, bias_B=b)
        return functional.multi_adapter_block(y, bank, ids)

    found, expected = torch.compile(call, fullgraph=True, backend=compiler)(x), call(x)
    torch.testing.assert_close(found, expected)
    found_grads, grads = (torch.autograd.grad(y.square().sum(), (x, A, B, a, b)) for y in (found, expected))
    torch.testing.assert_close(found_grads, grads)


def test_opcheck() -> None:
    x, A, B, a, b = (t.requires_grad_() for t in tensors())
    torch.library.opcheck(custom_ops.lora_linear, (x, None, None, A, B, 0.5, "silu", a, b, 0.0, None, None))


def test_bad_input_is_named() -> None:
    x, A, B, a, _ = tensors()
    for change, word in (
        ({"x": x[..., :3]}, "lora_A"),
        ({"lora_A": None}, "lora_A"),
        ({"lora_B": B.t()}, "lora_B"),
        ({"activation": "tanh"}, "activation"),
        ({"bias_A": a.double()}, "bias_A"),
        ({"x": x.long()}, "x"),
        ({"x": x.double()}, "x"),
        ({"scaling": float("inf")}, "scaling"),
        ({"dropout_p": 1.0}, "dropout_p"),
        ({"lora_A": None, "lora_B": None, "bias_A": None}, "lora_A"),
    ):
        given = {"x": x, "lora_A": A, "lora_B": B, "scaling": 1.0, "bias_A": a, **change}
        with pytest.raises((TypeError, ValueError), match=f"^{word}: expected"):
            functional.adapter_block(**given)
    with pytest.raises(ValueError, match="bank"):
        functional.multi_adapter_block(x, _bank(10, A, B[:10]), torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match="ids"):
        functional.multi_adapter_block(x, _bank(12, A, B), torch.tensor([0, 1, 0]))
    with pytest.raises(TypeError, match="bank"):
        functional.multi_adapter_block(x, [A], torch.tensor([0, 0, 0]))


def _bank(N: int, A: torch.Tensor, B: torch.Tensor) -> peftk.AdapterBank:
    bank = peftk.AdapterBank(12, N, 2, torch.float32, torch.device("cpu"))
    bank.add("one", A, B, 0.5, activation="relu")
    return bank


def test_explain_names_the_kernel() -> None:
    choice = peftk.explain("adapter_block", M=64, K=128, N=128)
    assert choice.backend == "cpu"
    assert "adapters" in choice.kernel

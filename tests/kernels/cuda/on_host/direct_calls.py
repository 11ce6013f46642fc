"""The direct way to the decode kernel: the ordinary way's bits, or the call is left to it; and what it costs."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import peftk
from peftk import _cuda
from peftk.adapters.adapter import adapter_of
from peftk.backends import choice, determinism
from peftk.backends import cuda as backend
from peftk.backends.call import Call
from peftk.launch import workspace
from peftk.ops import dispatch
from peftk.system import streams
from tests.support.cases import decode_case, normal
from tests.support.executor import Executor
from tests.support.fake_streams import Device
from tests.support.python_cost import calls

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
N, K = 40, 64


@pytest.fixture(autouse=True)
def _chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where this backend comes first; and a stream that has counters."""
    choose = lambda call: "cuda" if backend.cannot_run(call) is None else "reference"  # noqa: E731
    monkeypatch.setattr(choice, "unforced", choose)
    backend._is_chosen.cache_clear()
    monkeypatch.delenv("PEFTK_BACKEND", raising=False)
    with workspace.counters(torch.device("cpu"), 5000):
        pass


def one(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *adapter: Tensor | None, **biases: Tensor
) -> Tensor | None:
    A, B = adapter or (None, None)
    found = backend.direct_lora_linear(
        x, weight, bias, A, B, 0.5, "gelu", biases.get("bias_A"), biases.get("bias_B"), 0
    )
    if found is not None:
        ordinary = backend.lora_linear(
            x.reshape(-1, x.shape[-1]), weight, bias, adapter_of(A, B, 0.5, activation="gelu", **biases)
        )[0]
        assert found.dtype == x.dtype
        assert found.shape == (*x.shape[:-1], weight.shape[0])
        assert torch.equal(found.view(-1, weight.shape[0]), ordinary)
    return found


def tensors(dtype: torch.dtype = BF16, adapters: torch.dtype = BF16, rank: int = 20) -> tuple[Tensor, ...]:
    x, W, bias = normal(3, K, dtype=dtype, seed=1), normal(N, K, dtype=dtype, seed=2), normal(N, dtype=F32, seed=3)
    return x, W, bias, normal(rank, K, dtype=adapters, seed=4), normal(N, rank, dtype=adapters, seed=5)


@pytest.mark.parametrize(("dtype", "adapters"), [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)], ids=str)
def test_one_adapter_and_none(executor: Executor, dtype: torch.dtype, adapters: torch.dtype) -> None:
    x, W, bias, A, B = tensors(dtype, adapters)
    assert one(x, W) is not None
    assert one(x.view(1, 3, K), W, bias) is not None
    assert one(x, W, bias.to(dtype), A, B) is not None
    strided = B.t().contiguous().t()
    a, b = normal(20, dtype=adapters, seed=6), normal(N, dtype=adapters, seed=7)
    assert one(x[0], W, None, A, strided, bias_A=a, bias_B=b) is not None
    wide = normal(9, 2 * K, dtype=dtype, seed=8)
    assert one(wide[:, K:], W, bias, A[:1], B[:, :1]) is not None
    assert executor.statistics.launches == 10
    assert not any(counters.any() for counters in workspace._of_stream.values())


@pytest.mark.parametrize("seed", range(12))
def test_many_adapters(executor: Executor, seed: int) -> None:
    case = decode_case(seed)
    if case.ids is None or case.weight is None:
        return
    x, table, ids = case.x.contiguous().clone(), case.table(), case.ids.to(torch.int32).contiguous()
    found = backend.direct_multi_lora_linear(x, case.weight, case.bias, table, ids, 0)
    assert found is not None
    expected = backend.multi_lora_linear(x, case.weight, case.bias, table, ids)[0]
    assert torch.equal(found, expected)


def refused() -> dict[str, Callable[[], tuple[Tensor | None, ...]]]:
    x, W, bias, A, B = tensors()
    return {
        "x of another dtype": lambda: (x.float(), W, bias, A, B),
        "x not aligned": lambda: (torch.cat([x, x], 1)[:, 1 : K + 1], W, bias, A, B),
        "x with strides": lambda: (x.t().contiguous().t(), W, bias, A, B),
        "65 rows": lambda: (x[:1].repeat(65, 1), W, bias, A, B),
        "no rows": lambda: (x[:0], W, bias, A, B),
        "W transposed": lambda: (x, W.t().contiguous().t(), bias, A, B),
        "W of another dtype": lambda: (x, W.half(), bias, A, B),
        "W of another K": lambda: (x, W[:, :56], bias, A, B),
        "K": lambda: (x[:, :60], W[:, :60], bias, A[:, :60], B),
        "A with strides": lambda: (x, W, bias, A.t().contiguous().t(), B),
        "A of another dtype": lambda: (x, W, bias, A.half(), B.half()),
        "A and B of two dtypes": lambda: (x, W, bias, A.float(), B),
        "B of another N": lambda: (x, W, bias, A, B[1:]),
        "bias of another N": lambda: (x, W, bias[1:], A, B),
        "bias with strides": lambda: (x, W, torch.cat([bias, bias])[::2], A, B),
        "bias of integers": lambda: (x, W, bias.int(), A, B),
        "no B": lambda: (x, W, bias, A, None),
        "no W": lambda: (x, None, bias, A, B),
        "meta": lambda: (x, W, bias, A.to("meta"), B),
        "a subclass": lambda: (x, W, bias, A.as_subclass(torch.nn.Buffer), B),
    }


@pytest.mark.parametrize("what", refused())
def test_what_the_kernel_does_not_take_goes_the_ordinary_way(executor: Executor, what: str) -> None:
    x, W, bias, A, B = refused()[what]()
    if what == "a subclass":
        A = A.as_subclass(type("Other", (Tensor,), {}))
    assert backend.direct_lora_linear(x, W, bias, A, B, 0.5, "gelu", None, None, 0) is None
    assert executor.statistics.launches == 0


def test_ids_that_it_does_not_take(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, bias, A, B = tensors()
    bank = peftk.AdapterBank(K, N, 3, BF16, "cpu")
    bank.add("a", A, B, 1.0)
    table, ids = bank.table(), torch.tensor([0, -1, 0], dtype=torch.int32)
    run = lambda x, ids: backend.direct_multi_lora_linear(x, W, bias, table, ids, 0)  # noqa: E731
    assert run(x, ids) is not None
    assert run(x.view(3, 1, K), ids.view(3, 1)) is not None
    launches = executor.statistics.launches
    for bad in (ids.long(), ids[:2], ids.view(3, 1), torch.stack([ids, ids], 1)[:, 0], ids.float(), None):
        assert run(x, bad) is None
    assert run(x.view(1, 3, K), ids[:1]) is None
    monkeypatch.setenv("PEFTK_CHECK", "1")
    assert run(x, ids) is None
    assert executor.statistics.launches == launches


def test_who_is_asked_and_what_is_forced(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Call] = []
    answer = "cuda"
    monkeypatch.setattr(choice, "unforced", lambda call: asked.append(call) or answer)
    x, W, bias, A, B = tensors()
    for _ in range(3):
        assert one(x, W, bias, A, B) is not None
    [call] = asked
    assert (call.M, call.N, call.K, call.rank, call.adapters, call.op.many) == (3, N, K, 20, 1, False)
    assert (call.x_dtype, call.weight_dtype, call.adapter_dtype, call.device) == (BF16, BF16, BF16, "cpu")
    answer = "gemm"
    assert one(x[:2], W, bias, A, B) is None
    assert one(x, W, bias, A, B) is not None  # a choice is remembered
    choice.forget()  # as after `peftk tune`
    assert one(x, W, bias, A, B) is None
    answer = "cuda"
    choice.forget()
    monkeypatch.setenv("PEFTK_BACKEND", "triton")
    assert one(x, W, bias, A, B) is None
    monkeypatch.delenv("PEFTK_BACKEND")
    torch.use_deterministic_algorithms(True)
    try:
        assert one(x, W, bias, A, B) is None
    finally:
        torch.use_deterministic_algorithms(False)
    assert one(x, W, bias, A, B) is not None


def test_counters_are_the_streams_and_none_in_a_capture(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device(monkeypatch)
    x, W, bias, A, B = tensors()
    monkeypatch.setattr(backend, "_device_and_stream", lambda device: (0, 0))
    assert one(x, W, bias, A, B) is None  # the stream has none yet
    backend.lora_linear(x, W, bias, adapter_of(A, B, 0.5))
    monkeypatch.setattr(streams, "handle", lambda device: gpu.stream.cuda_stream)
    [counters] = workspace._of_stream.values()
    assert workspace.of_stream(x.device, gpu.stream.cuda_stream) is counters
    assert one(x, W, bias, A, B) is not None
    gpu.stream.captured = True
    assert one(x, W, bias, A, B) is None
    gpu.stream.captured = False
    with gpu.capture():
        assert one(x, W, bias, A, B) is None


def test_a_launch_that_fails_raises_and_drops_the_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, bias, A, B = tensors()

    class Failing:
        def __getattr__(self, name: str) -> object:
            return getattr(_cuda, name)

        def direct_lora_linear(self, *args: object) -> None:
            raise RuntimeError("lora_linear: cudaErrorLaunchFailure")

    monkeypatch.setattr(backend, "_cuda", Failing())
    with pytest.raises(RuntimeError, match="cudaErrorLaunchFailure"):
        backend.direct_lora_linear(x, W, bias, A, B, 0.5, "gelu", None, None, 0)
    assert workspace.of_stream(x.device, 0) is None


def layers() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    linear = nn.Linear(K, N).to(BF16)
    layer = peftk.LoRALinear.from_linear(linear, r=16, adapter_dtype=BF16).eval()
    many = peftk.MultiLoRALinear.from_linear(linear, max_adapters=4)
    many.add_adapter("a", torch.randn(16, K), torch.randn(N, 16))
    return layer, many, normal(3, K, dtype=BF16, seed=1), torch.tensor([0, -1, 0], dtype=torch.int32)


def test_the_cost_of_a_call(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Function calls of Python and of C: two of C allocate, y, and z with partial sums; most are torch's attributes."""
    layer, many, x, ids = layers()
    monkeypatch.setattr(determinism, "ever_entered", False)
    with torch.inference_mode():
        ordinary = layer(x), many(x, ids)
        monkeypatch.setattr(dispatch, "_direct", lambda device: (backend,))
        monkeypatch.setattr(dispatch, "_direct_multi", lambda device: (backend,))
        monkeypatch.setattr(dispatch.choice, "direct_limit", lambda device, dtype: 0)
        executor.reset()
        found = layer(x), many(x, ids)
        assert executor.statistics.launches == 2
        for y, expected in zip(found, ordinary, strict=True):
            torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-7)
        for run, python, c in ((lambda: layer(x), 27, 16), (lambda: many(x, ids), 30, 16)):
            cost = calls(run)
            of_c = sum(count for name, count in cost.items() if name.startswith("C "))
            assert cost.total() - of_c <= python, cost
            assert of_c <= c, cost


assert "PEFTK_CUDA_ON_HOST" in os.environ

"""Direct calls of the CPU kernels: the same bits as the ordinary way, and None for tensors that are not plain."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from torch import Tensor

import peftk
from peftk.adapters.activations import CODES
from peftk.adapters.adapter import Adapter, adapter_of
from peftk.backends import choice, determinism, measured
from peftk.backends.made_on import Verdict
from peftk.models.server import PreparedAdapter
from peftk.nn import ParallelAdapterLinear, SeriesAdapter
from peftk.ops import dispatch, layer_calls
from tests.support.python_cost import calls

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
N, K, R = 37, 29, 5

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch before 2.10 has no DLPack exchange API"
)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def layer(dtype: torch.dtype = torch.float32, adapter_dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        tensor(N, K, dtype=dtype),
        tensor(N, dtype=dtype),
        tensor(R, K, dtype=adapter_dtype),
        tensor(N, R, dtype=adapter_dtype),
    ]


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    x = tensor(2, 3, K, dtype=dtype)
    return {
        "vector": tensor(K, dtype=dtype),
        "row": tensor(1, K, dtype=dtype),
        "rows": tensor(5, K, dtype=dtype),
        "batch": x,
        "single sequences": tensor(4, 1, K, dtype=dtype),
        "batch of one": x[:1],
        "every other row": tensor(8, K, dtype=dtype)[::2],
        "part of a row": tensor(4, 2 * K, dtype=dtype)[:, 3 : 3 + K],
        "the last tokens": x[:, -1],
        "one row, many times": tensor(1, K, dtype=dtype).expand(6, K),
    }


@pytest.mark.parametrize(("dtype", "adapter_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_same_bits_as_the_ordinary_way(dtype, adapter_dtype):
    weight, bias, A, B = layer(dtype, adapter_dtype)
    for name, x in inputs(dtype).items():
        for b, a in ((bias, (A, B)), (None, (A, B)), (bias, (None, None)), (bias, (A, B.t().contiguous().t()))):
            y = dispatch.direct_lora_linear(x, weight, b, *a, 0.7)
            assert y is not None, name
            expected = layer_calls.lora_linear(x, weight, b, adapter_of(*a, 0.7), backend="cpu")
            assert y.dtype == dtype
            assert torch.equal(y, expected), name


@pytest.mark.parametrize("activation", list(CODES))
@pytest.mark.parametrize(("dtype", "adapter_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_activations_and_biases_of_an_adapter(dtype, adapter_dtype, activation):
    """With a weight, and without one (a series adapter)."""
    weight, bias, A, B = layer(dtype, adapter_dtype)
    up, a = tensor(K, R, dtype=adapter_dtype), tensor(R, dtype=adapter_dtype)
    for name, x in inputs(dtype).items():
        for W, b, up_of, N_of in ((weight, bias, B, N), (None, None, up, K)):
            beta = tensor(N_of, dtype=adapter_dtype, seed=1)
            for biases in ((a, beta), (None, beta), (a, None), (None, None)):
                rest = {"activation": activation, "bias_A": biases[0], "bias_B": biases[1]}
                y = dispatch.direct_lora_linear(x, W, b, A, up_of, 0.7, **rest)
                made = adapter_of(A, up_of, 0.7, **rest)
                if W is None:
                    ordinary = layer_calls.adapter_block(x, made, backend="cpu")
                else:
                    ordinary = layer_calls.lora_linear(x, W, b, made, backend="cpu")
                assert y is not None, name
                assert y.dtype == dtype
                assert torch.equal(y, ordinary), name


def test_adapters_that_are_not_plain_go_the_ordinary_way():
    weight, bias, A, B = layer()
    x, a, beta = tensor(4, K), tensor(R), tensor(N)

    def call(x=x, weight=weight, bias=bias, A=A, B=B, a=a, beta=beta):
        return dispatch.direct_lora_linear(x, weight, bias, A, B, 0.7, activation="relu", bias_A=a, bias_B=beta)

    assert call() is not None
    for change in (
        {"a": tensor(R + 1)},
        {"a": tensor(2 * R)[::2]},
        {"a": a.half()},
        {"a": a[None]},
        {"beta": tensor(N + 1)},
        {"beta": beta.double()},
        {"A": None, "B": None},
        {"weight": None},  # with a bias, and B is not square with A
        {"weight": None, "bias": None},
        {"weight": None, "bias": tensor(K), "B": tensor(K, R), "beta": None},
    ):
        assert call(**change) is None, change
    series = {"weight": None, "bias": None, "B": tensor(K, R), "beta": None}
    assert call(**series) is not None
    assert call(x=x[:, 1:], **series) is None
    assert call(x=x[:0], **series) is None
    assert call(x=x.double(), **series) is None


def test_transposed_weights_and_weights_with_gaps():
    weight, bias, A, B = layer()
    x = tensor(4, K)
    expected = layer_calls.lora_linear(x, weight, bias, adapter_of(A, B, 0.7), backend="cpu")
    apart = torch.zeros(N, K + 3)[:, :K].copy_(weight)
    torch.testing.assert_close(dispatch.direct_lora_linear(x, weight.t().contiguous().t(), bias, A, B, 0.7), expected)
    assert torch.equal(dispatch.direct_lora_linear(x, apart, bias, A, B, 0.7), expected)


def test_sizes_of_one():
    for n, k, r in itertools.product((1, 3), (1, 3), (1, 2)):
        x, weight, A, B = tensor(2, k), tensor(n, k), tensor(r, k), tensor(n, r)
        y = dispatch.direct_lora_linear(x, weight, None, A, B, 2.0)
        torch.testing.assert_close(y, x @ weight.t() + 2 * (x @ A.t()) @ B.t())


class Tagged(torch.Tensor):
    pass


def not_plain() -> dict[str, list]:
    weight, bias, A, B = layer()
    x = tensor(4, K)
    return {
        "subclass": [x.as_subclass(Tagged), weight, bias, A, B],
        "another device": [x.to("meta"), weight, bias, A, B],
        "fp64": [x.double(), weight, bias, A, B],
        "integers": [x.int(), weight, bias, A, B],
        "no tensor": [x.tolist(), weight, bias, A, B],
        "sparse": [x.to_sparse(), weight, bias, A, B],
        "scalar": [x.sum(), weight, bias, A, B],
        "too few inputs": [x[:, 1:].contiguous(), weight, bias, A, B],
        "too few inputs without an adapter": [x[:, 1:].contiguous(), weight, bias, None, None],
        "no rows": [x[:0], weight, bias, A, B],
        "strided inputs": [tensor(4, 2 * K)[:, ::2], weight, bias, A, B],
        "rows with two strides": [tensor(4, 5, K)[:, :3], weight, bias, A, B],
        "strided weight": [x, tensor(2 * N, 2 * K)[::2, ::2], bias, A, B],
        "another bias": [x, weight, tensor(N + 1), A, B],
        "strided bias": [x, weight, tensor(2 * N)[::2], A, B],
        "bias of two dimensions": [x, weight, bias[None], A, B],
        "A alone": [x, weight, bias, A, None],
        "B alone": [x, weight, bias, None, B],
        "A of another width": [x, weight, bias, tensor(R, K + 1), B],
        "A in columns": [x, weight, bias, tensor(K, R).t(), B],
        "B of another height": [x, weight, bias, A, tensor(N + 1, R)],
        "B of another rank": [x, weight, bias, A, tensor(N, R + 1)],
        "factors of two dtypes": [x, weight, bias, A, B.half()],
        "no ranks": [x, weight, bias, A[:0], B[:, :0]],
    }


@pytest.mark.parametrize("what", not_plain())
def test_what_is_not_plain_goes_the_ordinary_way(what):
    assert dispatch.direct_lora_linear(*not_plain()[what], 0.7) is None


def test_gradients_autocast_a_measured_choice_and_a_forced_backend_go_the_ordinary_way(monkeypatch):
    weight, bias, A, B = layer()
    call = (tensor(4, K), weight, bias, A, B, 0.7)
    assert dispatch.direct_lora_linear(*call) is not None
    assert dispatch.direct_lora_linear(tensor(10_000, K), *call[1:]) is not None
    monkeypatch.setattr(measured, "may_prefer_gemm", lambda op, dtype: True)
    monkeypatch.setattr(measured, "verdict", lambda call: Verdict(call.M % 2 == 1, "odd"))
    choice.forget()
    most = choice.SMALL_CALL // (N * K)
    assert dispatch.direct_lora_linear(tensor(most, K), *call[1:]) is not None
    odd = most + 1 + most % 2
    assert dispatch.direct_lora_linear(tensor(odd, K), *call[1:]) is None
    assert dispatch.direct_lora_linear(tensor(odd + 1, K), *call[1:]) is not None
    monkeypatch.setattr(measured, "verdict", lambda call: Verdict(False, "", unmeasured=True))
    choice.forget()
    assert dispatch.direct_lora_linear(tensor(odd + 1, K), *call[1:]) is None
    monkeypatch.undo()
    choice.forget()
    with torch.enable_grad():
        assert dispatch.direct_lora_linear(*call) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dispatch.direct_lora_linear(*call) is None
    monkeypatch.setenv("PEFTK_BACKEND", "reference")
    assert dispatch.direct_lora_linear(*call) is None
    monkeypatch.setenv("PEFTK_BACKEND", "")
    assert dispatch.direct_lora_linear(*call) is not None


def test_vmapped_tensors_are_not_plain():
    weight, bias, A, B = layer()

    def one(x: Tensor) -> Tensor:
        assert dispatch.direct_lora_linear(x, weight, bias, A, B, 0.7) is None
        return x

    torch.func.vmap(one)(tensor(4, K))


def test_output_of_inference_mode_and_its_threads():
    weight, bias, A, B = layer()
    with torch.inference_mode():
        y = dispatch.direct_lora_linear(tensor(4, K), weight, bias, A, B, 0.7)
        assert y.is_inference()


def bank(dtype: torch.dtype = torch.float32) -> peftk.AdapterBank:
    made = peftk.AdapterBank(K, N, 4, dtype, torch.device("cpu"))
    made.add("low", tensor(2, K), tensor(N, 2), 0.5)
    made.add("high", tensor(33, K), tensor(N, 33), 1.5, activation="relu", bias_A=tensor(33))
    made.add("bias", None, None, 1.0, bias_B=tensor(N))
    return made


@pytest.mark.parametrize(("dtype", "ids_dtype"), list(itertools.product(DTYPES, (torch.int32, torch.int64))))
def test_many_adapters_same_bits_as_the_ordinary_way(dtype, ids_dtype):
    weight, bias = layer(dtype)[:2]
    table = bank().table()
    cases = [
        (tensor(6, K, dtype=dtype), [2, 0, -1, 1, 0, 1]),
        (tensor(2, 3, K, dtype=dtype), [[2, 0, -1], [1, 0, 1]]),
        (tensor(2, 3, K, dtype=dtype), [1, -1]),
        (tensor(2, 2, 2, K, dtype=dtype), [1, 0]),
        (tensor(4, 1, K, dtype=dtype), [1, 0, 2, -1]),
    ]
    for x, numbers in cases:
        ids = torch.tensor(numbers, dtype=ids_dtype)
        y = dispatch.direct_multi_lora_linear(x, weight, bias, table, ids)
        assert y is not None
        assert torch.equal(y, layer_calls.multi_lora_linear(x, weight, bias, table, ids, backend="cpu"))


def test_ids_that_are_not_plain_go_the_ordinary_way():
    weight, bias = layer()[:2]
    x, table = tensor(6, K), bank().table()
    for ids in (
        torch.zeros(5, dtype=torch.int64),
        torch.zeros(6),
        torch.zeros(6, 1, dtype=torch.int64),
        torch.zeros(12, dtype=torch.int64)[::2],
        torch.zeros(6, dtype=torch.int16),
        [0] * 6,
    ):
        assert dispatch.direct_multi_lora_linear(x, weight, bias, table, ids) is None
    # one id per sequence requires a sequence dimension
    assert dispatch.direct_multi_lora_linear(x, weight, bias, table, torch.zeros(1, dtype=torch.int64)) is None


@pytest.mark.parametrize("number", [3, 4, -2, 2**31, -(2**40), 2**62])
def test_ids_outside_the_bank_are_an_error(number):
    weight, bias = layer()[:2]
    with pytest.raises(ValueError, match=r"ids\[1\]: expected -1 or an adapter's number below 4"):
        dispatch.direct_multi_lora_linear(tensor(2, K), weight, bias, bank().table(), torch.tensor([0, number]))


def test_layers_take_the_short_way(monkeypatch):
    """Calls of the layers use the direct calls, and nothing else."""
    linear = torch.nn.Linear(K, N)
    single = peftk.LoRALinear.from_linear(torch.nn.Linear(K, N), r=R)
    multi = peftk.MultiLoRALinear.from_linear(linear, max_adapters=2)
    multi.add_adapter("a", tensor(R, K), tensor(N, R))
    series = SeriesAdapter(K, R)
    parallel = ParallelAdapterLinear.from_linear(torch.nn.Linear(K, N), bottleneck=R)
    for adapter in (series, parallel):
        adapter.lora_B.normal_()
    x = tensor(2, K)

    def served():
        return single(x), multi(x, torch.tensor([0, -1])), multi(x), series(x), parallel(x)

    expected = served()
    for ordinary in ("_single_adapter", "_multi_adapter"):
        monkeypatch.setattr(layer_calls, ordinary, None)
    got = served()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def served():
    """A server of a linear with two adapters."""
    model = torch.nn.Sequential(torch.nn.Linear(K, N)).eval()
    server = peftk.MultiAdapter(model, max_adapters=2)
    server.adapt()
    for name in ("a", "b"):
        A, B = tensor(R, K, seed=ord(name)), tensor(N, R, seed=ord(name))
        server.place(name, PreparedAdapter(name, {"0": Adapter((A,), (B,), 0.5)}, 0))
    return server


def test_a_routed_layer_computes_as_with_ids():
    server, x = served(), tensor(2, 3, K)
    layer = server.model[0]
    with server.route(["b", None]):
        routed = server.model(x)
        assert torch.equal(routed, server.model(x))
    assert torch.equal(routed, layer(x, server.ids(["b", None])))
    assert not torch.equal(routed[0], layer(x)[0])
    with server.route(["b", None]), pytest.raises(ValueError, match="route: expected x"):
        layer(tensor(3, 3, K))
    with server.route(["b", None]), pytest.raises(TypeError, match="x: expected a dense tensor"):
        layer(x.to_sparse())
    for bad in ([1.0], 2, x.numpy(), torch.nested.nested_tensor([tensor(3, K), tensor(3, K)])):
        with torch.no_grad(), server.route(["b", None]), pytest.raises(TypeError, match="x: expected a dense tensor"):
            layer(bad)
    layer.weight.data = tensor(N + 1, K)
    with server.route(["b", None]), pytest.raises(ValueError, match="weight: expected"):
        layer(x)


@pytest.mark.parametrize(("what", "python", "c"), [("route", 26, 17), ("base", 18, 13), ("ids", 17, 12)])
def test_the_cost_of_a_call(what, python, c, monkeypatch):
    """Function calls of Python and of C; five of Python and three of C are torch's, of any module."""
    monkeypatch.setattr(determinism, "ever_entered", False)  # from then on every call asks
    server, ids = served(), torch.zeros(1, 3, dtype=torch.int32)
    layer, x = server.model[0], tensor(1, 3, K)
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        if what == "route":
            stack.enter_context(server.route_tokens(ids, [server.hold("a")], picked=ids[0]))
        cost = calls((lambda: layer(x, ids)) if what == "ids" else (lambda: layer(x)))
    of_c = sum(count for function, count in cost.items() if function.startswith("C "))
    assert cost.total() - of_c <= python, cost
    assert of_c <= c, cost


def test_an_output_that_is_not_plain_is_left_to_the_ordinary_way():
    """A mode of torch may make new_empty return something other than a plain tensor."""

    class Elsewhere(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return result.to("meta") if function is Tensor.new_empty else result

    weight, bias, A, B = layer()
    with Elsewhere():
        assert dispatch.direct_lora_linear(tensor(2, K), weight, bias, A, B, 1.0) is None

"""`peftk.deterministic`: what it excludes, where it applies, and rows whose bits do not depend on their batch."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import pathlib
import random
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import peftk
from peftk import BackendError, LoRALinear, MultiLoRALinear
from peftk.backends import choice, determinism, measured
from peftk.backends.call import Call
from peftk.backends.made_on import Verdict
from tests.support import calls
from tests.support.served_model import two_adapters
from tests.support.tiers import TIERS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT = {4: torch.int32, 2: torch.int16}


def call(op: str = "lora_linear", device: str = "cpu", dtype: torch.dtype = torch.float32, M: int = 512) -> Call:
    return calls.call(op, device=device, dtype=dtype, M=M, K=2048, N=2048)


def bits(y: Tensor) -> Tensor:
    return y.contiguous().view(INT[y.element_size()])


@pytest.fixture
def gemm_is_faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(measured, "verdict", lambda call: Verdict(True, "measured"))
    choice.forget()
    yield
    monkeypatch.undo()
    choice.forget()


# ---- the mode --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_no_library_multiplies(gemm_is_faster: None, batch_invariant: bool) -> None:
    for op in ("lora_linear", "multi_lora_linear", "lora_linear_backward"):
        assert choice.choose(call(op)).backend == "gemm"
        with peftk.deterministic(batch_invariant=batch_invariant):
            assert choice.choose(call(op)).backend == "cpu"
        assert choice.choose(call(op)).backend == "gemm"  # what was remembered is of the mode


def test_modes_nest_and_end() -> None:
    def state() -> tuple[bool, bool]:
        return determinism.is_deterministic(), peftk.is_batch_invariant()

    assert state() == (False, False)
    with peftk.deterministic():
        assert state() == (True, False)
        with peftk.deterministic(batch_invariant=True):
            assert state() == (True, True)
            with peftk.deterministic():
                assert state() == (True, True)
        assert state() == (True, False)
    assert state() == (False, False)
    with pytest.raises(TypeError, match="batch_invariant: expected a bool, got int"):
        peftk.deterministic(batch_invariant=1)  # type: ignore[arg-type]


def test_as_a_decorator() -> None:
    @peftk.deterministic(batch_invariant=True)
    def function() -> bool:
        return peftk.is_batch_invariant()

    @peftk.deterministic(batch_invariant=True)
    def generator() -> Iterator[bool]:
        yield peftk.is_batch_invariant()
        yield peftk.is_batch_invariant()

    @peftk.deterministic(batch_invariant=True)
    async def coroutine() -> bool:
        await asyncio.sleep(0)
        return peftk.is_batch_invariant()

    assert function()
    assert function()
    for inside in generator():
        assert inside
        assert not peftk.is_batch_invariant()  # between two steps
    assert asyncio.run(coroutine())
    assert not peftk.is_batch_invariant()


def test_threads_and_tasks_have_it() -> None:
    seen: list[bool] = []

    def look() -> None:
        seen.append(peftk.is_batch_invariant())

    async def tasks() -> None:
        with peftk.deterministic(batch_invariant=True):
            task = asyncio.create_task(asyncio.to_thread(look))
        look()
        await task

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(look).result()
        with peftk.deterministic(batch_invariant=True):
            inside = threading.Thread(target=look)
            inside.start()
            inside.join()
            pool.submit(look).result()
        pool.submit(look).result()
        outside = threading.Thread(target=look)
        outside.start()
        outside.join()
    assert seen == [False, True, True, False, False]
    seen.clear()
    asyncio.run(tasks())
    assert sorted(seen) == [False, True]


@pytest.mark.parametrize("op", ["lora_linear", "multi_lora_linear", "adapter_block", "multi_adapter_block"])
def test_what_cannot_keep_it_raises(op: str) -> None:
    cases = [(call(op), "reference"), (call(op, dtype=torch.float64), None), (call(op, device="cuda"), None)]
    for described, forced in cases:
        with peftk.deterministic(batch_invariant=True), pytest.raises(BackendError, match="batch_invariant=True"):
            choice.choose(described, forced)
    with peftk.deterministic(batch_invariant=True):
        assert choice.choose(call(f"{op}_backward", dtype=torch.float64)).backend == "reference"
        assert choice.choose(call("merge")).backend == "cpu"
    with peftk.deterministic():
        assert choice.choose(call(op, dtype=torch.float64)).backend == "reference"


def test_tensors_that_only_torch_reads() -> None:
    layer = LoRALinear.from_linear(nn.Linear(8, 6), r=2).requires_grad_(False)
    x = torch.randn(3, 2, 8)
    torch.func.vmap(layer)(x)
    with peftk.deterministic(batch_invariant=True), pytest.raises(BackendError, match="batch_invariant=True"):
        torch.func.vmap(layer)(x)


def test_a_call_of_a_gpu_does_not_go_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftk.ops import dispatch

    with torch.no_grad():
        assert dispatch.may_be_direct("cuda")
        with peftk.deterministic(batch_invariant=True):
            assert dispatch.may_be_direct("cpu")
            assert not dispatch.may_be_direct("cuda")


def test_explain_says_that_the_mode_decided() -> None:
    layer = LoRALinear.from_linear(nn.Linear(512, 512), r=4)
    assert "batch_invariant" not in peftk.explain(layer, M=1).reason
    assert "dot form" in peftk.explain(layer, M=1).kernel
    with peftk.deterministic(batch_invariant=True):
        chosen = peftk.explain(layer, M=1)
    assert "batch_invariant=True" in chosen.reason
    assert "transposed form" in chosen.kernel


# ---- rows ------------------------------------------------------------------------------------------------------------

KS = (1, 7, 40, 100, 250, 256, 333, 384, 513, 768, 1000, 1024, 2050, 2560, 4100)
BATCHES = {"default": 1_500, "full": 10_000, "long": 200_000}


class Served:
    """A layer with adapters of several ranks, rows for it, and what each row gives alone with each adapter."""

    def __init__(self, seed: int) -> None:
        its = random.Random(seed)
        torch.manual_seed(seed)
        self.dtype, K, N = its.choice(DTYPES), its.choice(KS), its.choice((1, 5, 8, 17, 48, 100, 300))
        linear = nn.Linear(K, N, bias=its.random() < 0.7)
        weight_dtype = its.choice((self.dtype, torch.float32, torch.bfloat16))
        weight = linear.weight.detach().to(weight_dtype)
        if its.random() < 0.3:  # contiguous along the output
            weight = weight.t().contiguous().t()
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(weight_dtype))
        self.layer = MultiLoRALinear.from_linear(linear, max_adapters=4)
        for number, rank in enumerate((3, 16, 40)):
            self.layer.add_adapter(
                str(number),
                torch.randn(rank, K) * K**-0.5,
                torch.randn(N, rank),
                its.choice((0.5, 2.0)),
                bias=torch.randn(N) if number == 1 else None,
                activation="gelu" if number == 2 else "identity",
            )
        self.x = torch.randn(24, K).to(self.dtype)
        ids = torch.arange(-1, 3)[:, None]
        self.alone = torch.stack([bits(torch.cat([self.layer(row, i) for i in ids])) for row in self.x[:, None]])

    def check(self, its: random.Random) -> None:
        """A batch of random rows with random adapters gives each row the bits that it has alone."""
        M = its.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 17, its.randint(18, 80)))
        rows = torch.tensor([its.randrange(len(self.x)) for _ in range(M)])
        ids = torch.tensor(its.choices(range(-1, 3), its.choice(((1, 1, 1, 1), (1, 0, 0, 0), (0, 0, 5, 1))), k=M))
        assert torch.equal(bits(self.layer(self.x[rows], ids)), self.alone[rows, ids + 1]), (self.layer, M, rows, ids)


@pytest.mark.parametrize("tier", TIERS)
def test_rows_of_random_batches(level: str, tier: str) -> None:
    its, threads = random.Random(tier), torch.get_num_threads()
    try:
        with torch.inference_mode(), peftk.deterministic(batch_invariant=True):
            for number in range(BATCHES[tier] // 50):
                torch.set_num_threads(its.choice((1, 1, 2, 3)))
                served = Served(number)
                for _ in range(50):
                    served.check(its)
    finally:
        torch.set_num_threads(threads)


def test_the_default_mode_differs_with_the_number_of_rows() -> None:
    torch.manual_seed(0)
    layer, x = LoRALinear.from_linear(nn.Linear(1024, 64), r=4), torch.randn(64, 1024)
    with torch.inference_mode():
        assert not torch.equal(layer(x)[:1], layer(x[:1]))


def test_every_way_to_the_kernel(level: str) -> None:
    """Directly, with gradients, compiled, and with ids of a bank: the same bits, for one row as for many."""
    torch.manual_seed(0)
    layer = LoRALinear.from_linear(nn.Linear(600, 40), r=4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(50, 600)
    compiled = torch.compile(layer, backend="eager", dynamic=False)
    with torch.inference_mode():
        outside = layer(x[:1])
        assert torch.equal(compiled(x[:1]), outside)
    with peftk.deterministic(batch_invariant=True):
        for run in (layer, compiled):
            with torch.inference_mode():
                y = run(x)
                assert not torch.equal(y[:1], outside)  # compiled outside of the mode, and called in it
                assert torch.equal(y[:1], run(x[:1]))
            assert torch.equal(layer(x[:1]), y[:1])  # with gradients
            assert torch.equal(layer(x), y)
    with torch.inference_mode():
        assert torch.equal(compiled(x[:1]), outside)


def test_a_with_in_compiled_code() -> None:
    torch.manual_seed(0)
    layer = LoRALinear.from_linear(nn.Linear(600, 40), r=4)

    def run(x: Tensor) -> Tensor:
        with peftk.deterministic(batch_invariant=True):
            return layer(x)

    x = torch.randn(1, 600)
    with torch.no_grad():
        assert torch.equal(torch.compile(run, backend="eager")(x), run(x))
        assert not torch.equal(run(x), layer(x))


def test_padding_and_series_adapters(level: str) -> None:
    torch.manual_seed(0)
    block = peftk.nn.SeriesAdapter(96, 24)
    multi = MultiLoRALinear.from_linear(nn.Linear(700, 50), max_adapters=2)
    for name in "ab":
        multi.add_adapter(name, torch.randn(5, 700), torch.randn(50, 5))
    with torch.inference_mode(), peftk.deterministic(batch_invariant=True):
        x = torch.randn(40, 96)
        assert torch.equal(block(x)[7:8], block(x[7:8]))
        padded = torch.randn(3, 9, 700)
        y = multi(padded, torch.tensor([0, 1, -1]))
        for sequence, length in enumerate((1, 4, 9)):
            alone = multi(padded[sequence : sequence + 1, :length], torch.tensor([(0, 1, -1)[sequence]]))
            assert torch.equal(alone[0], y[sequence, :length])


def test_generation(tmp_path: pathlib.Path) -> None:
    """In generate(), every layer of ours gives each sequence of the batch what it would give it alone."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 320, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=2, initializer_range=0.2, **sizes)
    names: list[str | None] = ["a", None, "b", "a"]
    for seed, name in enumerate("ab"):
        adapted = transformers.LlamaForCausalLM(config)
        peftk.inject(adapted, peftk.LoraConfig(r=2 + seed, target_modules=["q_proj", "v_proj", "down_proj"]))
        for _, layer in peftk.methods.inject.lora_layers(adapted):
            nn.init.normal_(layer.lora_B)
        peftk.save_adapter(adapted, tmp_path / name)
    model = transformers.LlamaForCausalLM(config).eval()
    server = peftk.MultiAdapter(model)
    for name in "ab":
        server.load(name, tmp_path / name)
    calls: list[tuple[MultiLoRALinear, Tensor, Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, MultiLoRALinear)]
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, y: calls.append((layer, inputs[0].clone(), y.clone())))
        for layer in layers
    ]
    tokens = torch.randint(3, 64, (4, 7))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0  # padding on the left
    with peftk.deterministic(batch_invariant=True), server.route(names):
        model.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for hook in hooks:
        hook.remove()
    assert len(calls) >= 5 * len(layers) == 30
    with torch.inference_mode(), peftk.deterministic(batch_invariant=True):
        for (layer, x, y), sequence in itertools.product(calls, range(4)):
            with server.route([names[sequence]]):
                assert torch.equal(layer(x[sequence : sequence + 1]), y[sequence : sequence + 1])


def test_routes_and_modes_travel_together(tmp_path: pathlib.Path) -> None:
    model, server = two_adapters(tmp_path)
    x = torch.randn(2, 16)
    orders: list[Callable[[], tuple[object, object]]] = [
        lambda: (peftk.deterministic(batch_invariant=True), server.route(["alice", "bob"])),
        lambda: (server.route(["alice", "bob"]), peftk.deterministic(batch_invariant=True)),
    ]
    results = []
    for make in orders:
        outer, inner = make()
        with torch.inference_mode(), outer, inner:  # type: ignore[attr-defined]
            assert peftk.is_batch_invariant()
            results.append(model(x))
    with torch.inference_mode():
        assert not torch.equal(results[0], model(x))
    assert torch.equal(*results)

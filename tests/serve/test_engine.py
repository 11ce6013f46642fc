"""Engine: each output of a mix is its adapter's alone; cancellation, deadlines, limits, fairness, failures."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", "5.24", reason="the engine is for transformers 5.24")

import peftk
from peftk.checkpoints.files import CheckpointError
from peftk.serve import AdapterStore, Engine, QueueFullError, Request
from tests.support import served_llama

NAMES = [None, "a0", "a1", "a2", "a3", "a4"]
PROMPT = (5, 6, 7, 8)


@pytest.fixture
def made(folder):
    """Makes engines, and closes them and their stores."""
    engines = []

    def make(where=folder, *, bank_slots=8, dtype=torch.float32, **options) -> Engine:
        model = served_llama.model(dtype)
        options = {"tokenizer": served_llama.tokenizer(), "cache_tokens": 8192, **options}
        engines.append(Engine(model, AdapterStore(model, where, bank_slots=bank_slots), **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close(drain=False)
        engine.store.close()


@pytest.fixture(scope="module")
def shared(folder):
    model = served_llama.model()
    store = AdapterStore(model, folder)
    with Engine(model, store, tokenizer=served_llama.tokenizer(), cache_tokens=8192) as engine:
        yield engine
    store.close()


def expected(folder, request: Request):
    path = None if request.adapter is None else folder / request.adapter
    return served_llama.alone(path, request.prompt, request.max_new_tokens)


def greedy(prompt, adapter, new=8, **options) -> Request:
    return Request(prompt, adapter, max_new_tokens=new, ignore_eos=True, **options)


@pytest.mark.parametrize("seed", range(6))
def test_every_request_of_a_mix_gets_what_its_adapter_gives_alone(made, folder, seed):
    """Prompts of other lengths, adapters of other ranks, some with an output layer, prompts cut into several steps, a
    bank that is smaller than the number of adapters, requests that come while others run."""
    draw = random.Random(seed)
    engine = made(
        bank_slots=draw.choice([1, 2, 3, 8]),
        step_tokens=draw.choice([8, 16, 64, 512]),
        max_running=draw.choice([1, 4, 16]),
    )
    requests = [greedy(p, draw.choice(NAMES), draw.randint(1, 12)) for p in served_llama.prompts(14, seed)]
    generations = []
    for request in requests:
        generations.append(engine.submit(request))
        time.sleep(draw.choice([0, 0, 0.02]))
    for request, generation in zip(requests, generations, strict=True):
        completion = generation.result(60)
        assert completion.tokens == expected(folder, request)
        assert completion.finish_reason == "length"
        assert completion.prompt_tokens == len(request.prompt)
    stats = engine.store.stats()
    assert stats.pinned == 0
    assert stats.resident <= engine.store.bank_slots


def test_a_shared_prefix_is_not_shared_between_adapters(shared, folder):
    """transformers would find a block by its tokens alone, whatever adapter has computed it."""
    prompt = served_llama.prompts(1, 3, 2)[0] * 100
    requests = [greedy(prompt, name, 6) for name in NAMES * 2]
    for request, completion in zip(requests, shared.generate(requests), strict=True):
        assert completion.tokens == expected(folder, request)


def test_the_base_model_runs_outside_of_routes(shared, folder, monkeypatch):
    entered = []
    route_tokens = shared.store.server.route_tokens
    monkeypatch.setattr(shared.store.server, "route_tokens", lambda *a, **k: entered.append(1) or route_tokens(*a, **k))
    request = greedy(PROMPT, None)
    assert shared.generate([request])[0].tokens == expected(folder, request)
    assert entered == []
    shared.generate([greedy(PROMPT, "a0")])
    assert entered != []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_logits_of_a_mix_are_those_alone_bit_for_bit(made, monkeypatch, dtype):
    seen: dict[str, list[torch.Tensor]] = {}
    monkeypatch.setattr(
        Engine,
        "_sample",
        lambda self, logits, ids: (
            [seen.setdefault(i, []).append(row.clone()) for i, row in zip(ids, logits, strict=True)]
            and logits.argmax(-1)
        ),
    )

    def number(item):  # requests are numbered as they are handed in
        return int(item[0].rpartition("-")[2])

    with peftk.deterministic(batch_invariant=True):
        engine = made(dtype=dtype)
    requests = [greedy(p, NAMES[n % 6], 6) for n, p in enumerate(served_llama.prompts(12, 1))]
    engine.generate(requests)
    together = [rows for _, rows in sorted(seen.items(), key=number)]
    seen.clear()
    for request in requests:
        engine.generate([request])
    assert len(seen) == len(together) == len(requests)
    for alone, mixed in zip([rows for _, rows in sorted(seen.items(), key=number)], together, strict=True):
        assert len(alone) == len(mixed) == 6
        assert all(torch.equal(a, b) for a, b in zip(alone, mixed, strict=True))


def test_text_comes_token_by_token(shared, folder):
    request = Request("w5 w6 w7", "a1", max_new_tokens=6, ignore_eos=True)
    generation = shared.stream(request)
    tokens = list(generation)
    completion = generation.result(10)
    assert [token.id for token in tokens] == list(completion.tokens)
    assert "".join(token.text for token in tokens) == completion.text
    assert completion.tokens == served_llama.alone(folder / "a1", [5, 6, 7], 6)
    assert completion.text.split() == [f"w{token}" for token in completion.tokens if token > 2]
    assert 0 <= completion.queued <= completion.to_first_token <= completion.total


def test_async_streams_interleave(shared, folder):
    async def collect(adapter):
        return [token.id async for token in shared.stream(PROMPT, adapter=adapter, max_new_tokens=8, ignore_eos=True)]

    async def main():
        return await asyncio.gather(*map(collect, NAMES))

    for name, tokens in zip(NAMES, asyncio.run(main()), strict=True):
        assert tuple(tokens) == expected(shared.store.folder, greedy(PROMPT, name))


def test_a_stop_string_ends_the_text_before_it(shared):
    whole = shared.generate([Request(PROMPT, "a2", max_new_tokens=12, ignore_eos=True)])[0]
    words = whole.text.split()
    stop = f"{words[4]} {words[5]}"
    cut = shared.generate([Request(PROMPT, "a2", max_new_tokens=12, ignore_eos=True, stop=[stop, "never"])])[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert len(cut.tokens) < len(whole.tokens)


def test_the_end_token_ends_a_text(made, folder):
    engine = made()
    tokens = expected(folder, greedy(PROMPT, "a0", 12))
    engine._end_tokens = frozenset({tokens[5]})
    completion = engine.generate([Request(PROMPT, "a0", max_new_tokens=12)])[0]
    assert completion.finish_reason == "stop"
    assert completion.tokens == tokens[: tokens.index(tokens[5]) + 1]
    assert engine.generate([greedy(PROMPT, "a0", 12)])[0].tokens == tokens


def test_sampling_depends_on_the_seed_and_nothing_else(shared):
    request = Request(PROMPT, "a1", max_new_tokens=10, temperature=1.5, top_k=20, top_p=0.9, seed=4, ignore_eos=True)
    alone = shared.generate([request])[0].tokens
    others = [
        Request(p, NAMES[n % 6], max_new_tokens=10, temperature=2.0) for n, p in enumerate(served_llama.prompts(7, 2))
    ]
    mixed = shared.generate([*others[:3], request, *others[3:]])[3].tokens
    assert mixed == alone
    assert shared.generate([request], seed=5)[0].tokens != alone
    assert shared.generate([request], top_k=1)[0].tokens == expected(shared.store.folder, greedy(PROMPT, "a1", 10))


@pytest.mark.parametrize("temperature", [1e-40, 5e-324])
def test_the_smallest_temperatures_take_the_likeliest_token(shared, folder, temperature):
    cold, plain = greedy(PROMPT, "a1", temperature=temperature), greedy(PROMPT, "a1")
    assert [c.tokens for c in shared.generate([cold, plain])] == [expected(folder, plain)] * 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_adapter_that_gives_no_finite_logits_fails_only_its_requests(made, folder, tmp_path, temperature):
    shutil.copytree(folder / "a0", tmp_path / "huge")
    weights = tmp_path / "huge" / "adapter_model.safetensors"
    save_file({k: v * 1e30 for k, v in load_file(weights).items()}, weights)
    shutil.copytree(folder / "a1", tmp_path / "a1")
    engine = made(tmp_path)
    good = [greedy(PROMPT, name, 12) for name in ("a1", None)]
    lost = engine.submit(greedy(PROMPT, "huge", 12, temperature=temperature))
    assert [c.tokens for c in engine.generate(good)] == [expected(folder, request) for request in good]
    with pytest.raises(RuntimeError, match="finite logits"):
        lost.result(60)
    again = [greedy([*PROMPT, number], "a1", 30) for number in range(3, 20)]  # on the pages that it had
    assert [c.tokens for c in engine.generate(again)] == [expected(folder, request) for request in again]


def test_a_deadline_that_is_farther_than_threads_can_wait_is_none(shared, folder):
    far = greedy(PROMPT, "a1", timeout=1e300)
    for _ in range(2):  # the second one needs the thread that would have waited for the first one's
        assert shared.submit(far).result(60).tokens == expected(folder, far)


def test_cancelled_requests_keep_what_they_have(made, folder):
    engine = made()
    generation = engine.stream(PROMPT, adapter="a0", max_new_tokens=200, ignore_eos=True)
    other = engine.submit(greedy(PROMPT, "a1", 20))
    tokens = []
    for token in generation:
        tokens.append(token.id)
        if len(tokens) == 3:
            break  # a loop that is left cancels
    completion = generation.result(10)
    assert completion.finish_reason == "cancelled"
    assert 3 <= len(completion.tokens) < 200
    assert completion.tokens[:3] == tuple(tokens) == expected(folder, greedy(PROMPT, "a0", 3))
    assert other.result(60).tokens == expected(folder, greedy(PROMPT, "a1", 20))
    generation.cancel()
    assert engine.stats().cancelled == 1
    assert engine.store.stats().pinned == 0


def test_an_abandoned_async_stream_is_cancelled(made):
    engine = made()
    generation = engine.stream(PROMPT, adapter="a0", max_new_tokens=200, ignore_eos=True)

    async def consume():
        async for _ in generation:
            pass

    async def main():
        task = asyncio.create_task(consume())
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert generation.result(10).finish_reason == "cancelled"


def test_a_deadline_ends_a_request_wherever_it_is(made):
    engine = made(max_running=1)
    running = engine.submit(greedy(PROMPT, "a0", 240, timeout=0.5))
    waiting = engine.submit(greedy(PROMPT, "a1", 240, timeout=0.2))
    late = waiting.result(30)
    assert (late.finish_reason, late.tokens, late.to_first_token) == ("timeout", (), None)
    assert running.result(30).finish_reason in ("timeout", "length")
    assert engine.stats().running == 0


def test_the_queue_is_bounded_and_generate_waits_for_it(made, folder):
    engine = made(max_running=1, max_waiting=2)
    first = engine.submit(greedy(PROMPT, None, 200))
    while engine.stats().running == 0:
        time.sleep(0.01)
    generations = [engine.submit(greedy(PROMPT, None, 2)) for _ in range(2)]
    with pytest.raises(QueueFullError, match="max_waiting = 2"):
        engine.submit(greedy(PROMPT, None, 2))
    first.cancel()
    assert [len(g.result(60).tokens) for g in generations] == [2, 2]
    assert len(engine.generate([greedy(PROMPT, "a0", 2)] * 9)) == 9


def test_a_tenant_with_many_requests_does_not_hold_up_another(made):
    engine = made(max_running=1)
    order: list[str] = []
    hold = engine.submit(greedy(PROMPT, None, 100))
    flood = [engine.submit(greedy(PROMPT, None, 2, tenant="flood")) for _ in range(8)]
    small = [engine.submit(greedy(PROMPT, None, 2, tenant="small")) for _ in range(2)]
    threads = [
        threading.Thread(target=lambda g=g: (g.result(60), order.append(g.request.tenant))) for g in (*flood, *small)
    ]
    for thread in threads:
        thread.start()
    hold.cancel()
    for thread in threads:
        thread.join()
    assert order.index("small") <= 2
    assert order.index("small", order.index("small") + 1) <= 5


def test_a_damaged_adapter_fails_only_its_requests(made, folder, tmp_path):
    for name in ("a0", "a1"):
        shutil.copytree(folder / name, tmp_path / name)
    os.truncate(tmp_path / "a1" / "adapter_model.safetensors", 1000)
    engine = made(tmp_path)
    good = [engine.submit(greedy(PROMPT, name, 12)) for name in ("a0", None, "a0")]
    bad = [engine.submit(greedy(PROMPT, "a1", 12)) for _ in range(2)]
    for generation in bad:
        with pytest.raises(CheckpointError, match="safetensors"):
            generation.result(60)
        with pytest.raises(CheckpointError):
            list(generation)
    for generation in good:
        assert generation.result(60).tokens == expected(folder, greedy(PROMPT, generation.request.adapter, 12))
    assert engine.stats().failed == 2
    with pytest.raises(CheckpointError):
        engine.generate([greedy(PROMPT, "a0"), greedy(PROMPT, "a1")])


def test_a_slow_load_does_not_hold_up_others(made, folder, monkeypatch):
    engine = made()
    go, prepare = threading.Event(), engine.store.server.prepare
    monkeypatch.setattr(engine.store.server, "prepare", lambda p: (p.name != "a1" or go.wait(30)) and prepare(p))
    engine.generate([greedy(PROMPT, "a0", 1)])
    slow = engine.submit(greedy(PROMPT, "a1", 4))
    assert engine.submit(greedy(PROMPT, "a0", 4)).result(30).tokens == expected(folder, greedy(PROMPT, "a0", 4))
    assert not slow.done
    go.set()
    assert slow.result(30).tokens == expected(folder, greedy(PROMPT, "a1", 4))


def test_an_adapter_that_left_memory_while_its_request_waited_is_read_again(folder):
    store = AdapterStore(served_llama.model(), folder, bank_slots=1, host_bytes=1)
    with Engine(store.server.model, store, max_running=1, cache_tokens=1024) as engine:
        engine.generate([greedy(PROMPT, "a0")])  # in the bank from now on
        engine.generate([greedy(PROMPT, None, 1, tenant="first")])
        with engine._lock:  # all three wait when the admission looks at them
            running = engine.submit(greedy(PROMPT, None, 200))
            first = engine.submit(greedy(PROMPT, "a1", tenant="one"))
            second = engine.submit(greedy(PROMPT, "a0", tenant="one"))  # has a lease, of what the bank has still
        assert running.result(60).finish_reason == "length"
        assert first.result(60).tokens == expected(folder, first.request)  # has put a0 out of bank and host memory
        assert second.result(60).tokens == expected(folder, second.request)
    assert store.stats().reads == 3
    store.close()


def test_a_name_is_replaced_while_it_is_used(made, folder):
    engine = made()
    engine.store.add("alice", folder / "a0")
    old = engine.submit(greedy(PROMPT, "alice", 60))
    while engine.stats().running == 0:
        time.sleep(0.005)
    engine.store.add("alice", folder / "a1")
    new = engine.submit(greedy(PROMPT, "alice", 20))
    assert new.result(60).tokens == expected(folder, greedy(PROMPT, "a1", 20))
    assert old.result(60).tokens == expected(folder, greedy(PROMPT, "a0", 60))
    assert old.result().digest != new.result().digest


def test_removing_an_adapter_cancels_or_waits(made, folder):
    engine = made()
    generation = engine.submit(greedy(PROMPT, "a0", 240))
    other = engine.submit(greedy(PROMPT, "a1", 30))
    while engine.stats().running < 2:
        time.sleep(0.005)
    engine.store.remove("a0", cancel=True, timeout=30)
    assert generation.result(1).finish_reason == "cancelled"
    engine.store.remove("a1", timeout=60)
    assert other.result(1).tokens == expected(folder, greedy(PROMPT, "a1", 30))
    with pytest.raises(ValueError, match="adapter"):
        engine.submit(greedy(PROMPT, "a0"))


def test_many_requests_share_few_places_while_adapters_come_and_go(made, folder):
    """More adapters than places, cancellations and replacements at random: every output that ends is right."""
    engine = made(bank_slots=2, max_running=6, step_tokens=32)
    draw, generations = random.Random(7), []
    contents = {f"t{n}": f"a{n % 5}" for n in range(7)}
    for name, content in contents.items():
        engine.store.add(name, folder / content)
    for prompt in served_llama.prompts(40, 5, 20):
        name = draw.choice([None, *contents])
        content = contents.get(name)
        generations.append((content, engine.submit(greedy(prompt, name, draw.randint(1, 10)))))
        if draw.random() < 0.15:
            draw.choice(generations)[1].cancel()
    for content, generation in generations:
        completion = generation.result(120)
        want = expected(folder, greedy(generation.request.prompt, content, generation.request.max_new_tokens))
        assert completion.tokens == want[: len(completion.tokens)]
        assert completion.finish_reason == "cancelled" or completion.tokens == want
    assert engine.store.stats().pinned == 0
    assert engine.store.stats().evictions > 5


def test_close_drains_or_cancels_and_gives_the_model_back(made, folder):
    engine = made()
    attention = served_llama.model().config._attn_implementation
    generations = [engine.submit(greedy(PROMPT, "a0", 20)) for _ in range(3)]
    engine.close()
    assert all(g.result(1).tokens == expected(folder, greedy(PROMPT, "a0", 20)) for g in generations)
    assert engine.model.config._attn_implementation == attention
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(greedy(PROMPT, "a0"))
    with torch.no_grad():
        out = engine.model.generate(torch.tensor([PROMPT]), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert tuple(out[0, 4:].tolist()) == served_llama.alone(None, PROMPT, 5)
    other = made()
    running = other.submit(greedy(PROMPT, "a0", 240))
    other.close(drain=False)
    assert running.result(1).finish_reason == "cancelled"


def test_a_dead_model_fails_its_requests_with_the_reason(made, monkeypatch):
    engine = made()

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.store.server, "route_tokens", broken)
    generation = engine.submit(greedy(PROMPT, "a0"))
    with pytest.raises(RuntimeError, match="out of memory"):
        generation.result(30)
    assert engine.generate([greedy(PROMPT, None, 3)])[0].tokens


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt": ()}, ValueError, "prompt"),
        ({"prompt": "w5", "adapter": "nobody"}, ValueError, "adapter"),
        ({"prompt": "w5", "adapter": "../a0"}, ValueError, "adapter"),
        ({"prompt": [5, 100]}, ValueError, "0 to 99"),
        ({"prompt": [5, -1]}, ValueError, "0 to 99"),
        ({"prompt": [5.0]}, TypeError, "ints"),
        ({"prompt": [5] * 250, "max_new_tokens": 10}, ValueError, "at most 256 tokens"),
        ({"prompt": [5], "max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"prompt": [5], "temperature": -1}, ValueError, "temperature"),
        ({"prompt": [5], "temperature": float("nan")}, TypeError, "temperature"),
        ({"prompt": [5], "temperature": 10**400}, TypeError, "temperature"),
        ({"prompt": [5], "timeout": 10**400}, TypeError, "timeout"),
        ({"prompt": [5], "top_p": 0}, ValueError, "top_p"),
        ({"prompt": [5], "top_k": -1}, ValueError, "top_k"),
        ({"prompt": [5], "stop": [""]}, TypeError, "stop"),
        ({"prompt": [5], "timeout": 0}, ValueError, "timeout"),
        ({"prompt": [5], "seed": "x"}, TypeError, "seed"),
    ],
)
def test_bad_requests_are_refused_before_anything_happens(shared, options, error, message):
    before = shared.stats()
    with pytest.raises(error, match=message):
        shared.submit(Request(**options))
    assert shared.stats() == before


def test_bad_arguments_are_refused():
    model = served_llama.model()
    with pytest.raises(TypeError, match="model"):
        Engine(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="max_running"):
        Engine(model, max_running=0)
    store = AdapterStore(served_llama.model())
    with pytest.raises(ValueError, match="another model"):
        Engine(model, store)
    store.close()
    with Engine(model, cache_tokens=512) as engine:
        with pytest.raises(ValueError, match="model: expected one that no open engine uses"):
            Engine(model, engine.store, cache_tokens=512)
        with pytest.raises(ValueError, match="tokenizer"):
            engine.submit(Request("text"))
        assert len(engine.generate([[5, 6]], max_new_tokens=3, ignore_eos=True)[0].tokens) == 3

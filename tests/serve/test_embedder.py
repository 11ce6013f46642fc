"""Embedder: texts of many adapters in one batch."""

from __future__ import annotations

import concurrent.futures
import shutil
import threading
import time

import pytest
import torch
from torch.nn import functional as F

import peftk
from peftk.checkpoints.files import CheckpointError
from peftk.methods.inject import lora_layers
from peftk.serve import AdapterStore, Embedder
from peftk.serve.requests import QueueFullError

transformers = pytest.importorskip("transformers", "5.24", reason="peftk.serve is for transformers 5.24")
WORDS = 60


def encoder():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def tokenizer():
    """Token i is the word w<i>; the file says to pad and truncate, as that of MiniLM does."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, WORDS)}}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.enable_truncation(8)
    made.enable_padding(length=8)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    for number, rank in enumerate((4, 16, 33)):
        model = encoder()
        peftk.inject(model, peftk.LoraConfig(r=rank, target_modules=["query", "value", "dense"]))
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for _, layer in lora_layers(model):
                layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) / 4)
        peftk.save_adapter(model, path / f"a{number}")
    return path


@pytest.fixture
def make(folder):
    """Makes an embedder with the adapters of a folder."""
    made = []

    def make(path=folder, *, bank_slots=64, **options):
        model = encoder()
        store = AdapterStore(model, path, bank_slots=bank_slots)
        made.append(Embedder(model, store, tokenizer(), **options))
        return made[-1]

    yield make
    for embedder in made:
        embedder.close()
        embedder.store.close()


@torch.inference_mode()
def alone(path, tokens, pooling="mean", normalize=True):
    """The vector of one text by one adapter, without peftk's banks."""
    model = encoder()
    if path is not None:
        peftk.load_adapter(model, path)
    hidden = model(torch.tensor([tokens])).last_hidden_state[0]
    pooled = hidden.mean(0) if pooling == "mean" else hidden[0]
    return F.normalize(pooled, dim=-1) if normalize else pooled


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", True), ("mean", False)])
def test_texts_of_many_adapters_in_a_batch_are_each_its_adapters(make, folder, pooling, normalize):
    embedder = make(pooling=pooling, normalize=normalize)
    jobs = []
    generator = torch.Generator().manual_seed(1)
    with embedder._wake:  # its thread waits, so that all are in the queue before the first batch
        for number in range(24):
            texts = [
                torch.randint(2, WORDS, (n,), generator=generator).tolist()
                for n in torch.randint(1, 40, (1 + number % 3,), generator=generator).tolist()
            ]
            name = f"a{number % 4}" if number % 4 < 3 else None
            jobs.append((name, texts, embedder.submit(texts, name)))
    for name, texts, job in jobs:
        found = job.future.result(30)
        assert found.tokens == sum(map(len, texts))
        assert (found.digest is None) == (name is None)
        tolerance = 1 if normalize else 8
        for text, vector in zip(texts, found.vectors, strict=True):
            expected = alone(None if name is None else folder / name, text, pooling, normalize)
            close(vector / tolerance, expected / tolerance)
    stats = embedder.stats()
    assert stats.batches < 12  # 47 texts of four adapters
    assert (stats.finished, stats.waiting, stats.running) == (sum(len(t) for _, t, _ in jobs), 0, 0)
    assert stats.prompt_tokens == sum(len(text) for _, texts, _ in jobs for text in texts)
    assert embedder.store.stats().pinned == 0


def test_an_adapter_changes_the_vectors(folder):
    """What the tests above would not see if no adapter did anything."""
    vectors = [alone(path, [5, 6, 7]) for path in (None, *(folder / f"a{n}" for n in range(3)))]
    assert all((a - b).norm() > 0.05 for i, a in enumerate(vectors) for b in vectors[:i])


def test_text_is_neither_padded_nor_cut_as_the_tokenizers_file_says(make):
    embedder = make()
    text = " ".join(f"w{number}" for number in range(2, 22))
    found = embedder.embed([text, "w5"])
    assert found.tokens == 21
    close(found.vectors[0], alone(None, list(range(2, 22))))
    close(found.vectors[1], alone(None, [5]))


def test_a_batch_keeps_within_its_tokens(make):
    embedder = make(batch_tokens=40)
    sizes = []
    real = embedder._vectors
    embedder._vectors = lambda batch: sizes.append((len(batch), max(len(t.tokens) for t in batch))) or real(batch)
    embedder.submit([[5] * n for n in (3, 30, 3, 31, 2, 50, 4, 12, 11, 3)]).future.result(30)
    assert all(count * longest <= 40 or count == 1 for count, longest in sizes)
    assert sum(count for count, _ in sizes) == 10
    assert max(count for count, _ in sizes) >= 4
    assert any(longest == 50 for _, longest in sizes)


@pytest.mark.parametrize(
    ("texts", "adapter", "message"),
    [
        ([], None, "texts: expected one or more"),
        ([[]], None, "texts: expected 1 to 64 tokens each, got 0"),
        ([[5] * 65], None, "texts: expected 1 to 64 tokens each, got 65"),
        ([[5], [WORDS]], None, "texts: expected tokens from 0 to 59"),
        ([[5]], "nobody", "adapter: expected a name of the store"),
    ],
)
def test_bad_texts_are_refused(make, texts, adapter, message):
    embedder = make()
    with pytest.raises(ValueError, match=message):
        embedder.submit(texts, adapter)
    assert embedder.stats().waiting == 0
    assert embedder.embed([[5]]).tokens == 1


@pytest.mark.parametrize("timeout", [float("nan"), "1", 10**400, True])
def test_a_timeout_that_is_no_number_is_refused(make, timeout):
    embedder = make()
    with pytest.raises(TypeError, match="timeout: expected seconds"):
        embedder.submit([[5]], "a0", timeout)
    assert embedder.embed([[5]], "a0").tokens == 1


@pytest.mark.parametrize("texts", ["w5", 5, [None], [[5.5]], [[True]], [["w5"]]])
def test_what_is_no_sequence_of_texts_is_refused(make, texts):
    with pytest.raises(TypeError, match="texts: expected"):
        make().submit(texts)


def test_a_timeout_that_is_farther_than_threads_can_wait_is_none(make):
    embedder = make()
    job = embedder.submit([[5]], timeout=1e300)
    with embedder._wake:
        assert embedder._until() <= threading.TIMEOUT_MAX
    assert job.future.result(30).tokens == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pooling": "max"}, "pooling"), ({"max_tokens": 65}, "max_tokens"), ({"batch_tokens": 0}, "batch_tokens")],
)
def test_bad_arguments_are_refused(make, options, message):
    with pytest.raises((ValueError, TypeError), match=f"{message}: expected"):
        make(**options)


def test_a_full_queue_takes_nothing_of_a_request(make):
    embedder = make(max_waiting=3)
    with embedder._wake:
        first = embedder.submit([[5], [6]])
        with pytest.raises(QueueFullError, match="max_waiting = 3"):
            embedder.submit([[7], [8]])
        assert embedder.stats().waiting == 2
    assert len(first.future.result(30).vectors) == 2


def test_a_damaged_checkpoint_fails_only_its_texts(make, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    weights = tmp_path / "copy/a1/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    embedder = make(tmp_path / "copy")
    with embedder._wake:
        jobs = [embedder.submit([[5, 6]], name) for name in ("a0", "a1", "a2", None)]
    with pytest.raises(CheckpointError):
        jobs[1].future.result(30)
    for job, name in ((jobs[0], "a0"), (jobs[2], "a2"), (jobs[3], None)):
        close(job.future.result(30).vectors[0], alone(None if name is None else folder / name, [5, 6]))
    assert (embedder.stats().failed, embedder.stats().finished) == (1, 3)


def test_more_adapters_than_the_bank_has_room_for_take_turns(make, folder):
    embedder = make(bank_slots=1)
    with embedder._wake:
        jobs = [(name, embedder.submit([[5, number]], name)) for number in range(2, 6) for name in ("a0", "a1", "a2")]
    for index, (name, job) in enumerate(jobs):
        close(job.future.result(30).vectors[0], alone(folder / name, [5, 2 + index // 3]))


def test_timeouts_and_cancelled_jobs(make):
    embedder = make()
    release = threading.Event()
    real = embedder._vectors
    embedder._vectors = lambda batch: release.wait(20) and real(batch)
    running = embedder.submit([[5]], "a0")
    end = time.monotonic() + 20
    while not embedder.stats().running and time.monotonic() < end:
        time.sleep(0.01)
    late, left = embedder.submit([[6]], timeout=0.05), embedder.submit([[7], [8]])
    left.cancel()
    assert embedder.stats().waiting == 1
    time.sleep(0.1)
    release.set()
    with pytest.raises(TimeoutError):
        late.future.result(30)
    with pytest.raises(concurrent.futures.CancelledError):
        left.future.result(30)
    assert running.future.result(30).tokens == 1
    assert (embedder.stats().timed_out, embedder.stats().cancelled, embedder.stats().finished) == (1, 2, 1)


def test_an_unloaded_adapter_finishes_or_is_cancelled(make):
    embedder = make()
    with embedder._wake:
        job = embedder.submit([[5]], "a0")
    threading.Thread(target=embedder.store.remove, args=("a0",)).start()
    assert job.future.result(30).digest is not None
    with embedder._wake:
        job = embedder.submit([[5]], "a1")
        embedder.store.remove("a1", cancel=True, timeout=20)
        assert job.future.cancelled()


def test_close_cancels_what_waits_and_refuses_more(make):
    embedder = make()
    with embedder._wake:
        job = embedder.submit([[5]])
        closing = threading.Thread(target=embedder.close)
    closing.start()
    closing.join(20)
    assert job.future.done()
    assert not embedder.alive
    with pytest.raises(RuntimeError, match="expected an open one"):
        embedder.submit([[5]])

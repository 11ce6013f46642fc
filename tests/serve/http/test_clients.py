"""`peftk serve` as a process: OpenAI's own client, curl, and what a signal does."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import threading

import pytest

from tests.support import http_server
from tests.support.http_server import ADMIN, body, text_alone

openai = pytest.importorskip("openai", reason="needs OpenAI's client")


@pytest.fixture(scope="module")
def server(model_folder, adapters):
    with http_server.command(model_folder, "--adapters", adapters) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openais_client_gets_what_each_adapter_gives_alone(client, adapters):
    for name, path in (("a1", adapters / "a1"), ("a2", adapters / "a2"), ("tiny", None)):
        fields = body(name)
        extra = {"ignore_eos": fields.pop("ignore_eos")}
        answer = client.completions.create(**fields, extra_body=extra)
        assert answer.choices[0].text == text_alone(path)
        assert answer.choices[0].finish_reason == "length"
        assert (answer.model, answer.usage.prompt_tokens, answer.usage.completion_tokens) == (name, 3, 8)


def test_openais_client_streams(client, adapters):
    fields = body("a1")
    extra = {"ignore_eos": fields.pop("ignore_eos")}
    chunks = list(
        client.completions.create(**fields, extra_body=extra, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text_alone(adapters / "a1")
    assert len(chunks) > 4
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 8)


def test_openais_client_chats(client, adapters):
    messages = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": [{"type": "text", "text": " w6"}]}]
    prompt = (5, 6, 3)  # w3 is what the template ends with
    options = {"model": "a3", "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = client.chat.completions.create(messages=messages, **options)
    expected = text_alone(adapters / "a3", prompt)
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", expected)
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"


def test_openais_client_lists_models_and_gets_its_errors(client):
    assert [model.id for model in client.models.list()] == ["tiny", "a0", "a1", "a2", "a3", "a4"]
    assert client.models.retrieve("a1").id == "a1"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="../a1", prompt="w5")
    with pytest.raises(openai.BadRequestError, match="n: expected 1"):
        client.completions.create(model="a1", prompt="w5", n=2)
    with pytest.raises(openai.BadRequestError, match="unknown role"):
        client.chat.completions.create(model="a1", messages=[{"role": "robot", "content": "w5"}])
    with pytest.raises(openai.NotFoundError, match="no endpoint"):  # of an encoder
        client.embeddings.create(model="a1", input="w5")


def test_many_clients_at_once_get_what_each_adapter_gives_alone(server, adapters):
    """40 requests of five adapters and the base model, of different lengths."""

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def ask(number):
                name = f"a{number % 6}" if number % 6 < 5 else "tiny"
                path = adapters / name if number % 6 < 5 else None
                prompt, new = tuple(range(3, 5 + number)), 3 + number % 9
                fields = body(name, prompt, new)
                extra = {"ignore_eos": fields.pop("ignore_eos")}
                answer = await client.completions.create(**fields, extra_body=extra)
                assert answer.choices[0].text == text_alone(path, prompt, new), number

            await asyncio.gather(*map(ask, range(40)))

    asyncio.run(ask_all())


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_streams(server, adapters):
    def curl(path, *arguments):
        command = ["curl", "-sS", "-m", "20", f"{server.url}{path}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout

    data = json.dumps(body("a2", "w5 w6 w7", stream=True))
    events = curl("/v1/completions", "-H", "content-type: application/json", "-d", data).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text_alone(adapters / "a2")
    load = json.dumps({"lora_name": "again", "lora_path": "a0"})
    sent = ("-H", "content-type: application/json", "-d", load)
    assert json.loads(curl("/v1/load_lora_adapter", *sent))["error"]["code"] == "invalid_api_key"
    assert curl("/v1/load_lora_adapter", "-H", f"authorization: Bearer {ADMIN}", *sent).startswith("Success")
    assert server.call("/v1/completions", body("again"))[1]["choices"][0]["text"] == text_alone(adapters / "a0")
    assert curl("/v1/models/%2e%2e%2fmodel").startswith('{"error"')


def test_sigterm_lets_running_requests_end_and_takes_no_more(model_folder, adapters):
    with http_server.command(model_folder, "--adapters", adapters) as server:
        answers = []

        def ask(number):
            answers.append(server.call("/v1/completions", body(f"a{number}", new=150)))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        while server.metrics()["peftk_requests_running"] < 3:
            pass
        server.process.send_signal(signal.SIGTERM)
        refused = False
        while any(thread.is_alive() for thread in threads) and not refused:
            try:
                server.connect().close()
            except OSError:
                refused = True
        for thread in threads:
            thread.join(20)
        assert refused
        assert [status for status, _ in answers] == [200] * 3
        assert sorted(answer["choices"][0]["text"] for _, answer in answers) == sorted(
            text_alone(adapters / f"a{number}", new=150) for number in range(3)
        )
        assert server.process.wait(20) == 0

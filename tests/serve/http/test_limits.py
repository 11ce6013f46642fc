"""Bodies, prompts, queues, times: what is too much gets an error of OpenAI's shape, and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import pytest

from peftk.serve.http.limits import Limits
from tests.support import http_server
from tests.support.http_server import ADMIN, body, text_alone, wait_until

TIGHT = Limits(
    body_bytes=20_000, prompts=4, new_tokens=200, prompt_tokens=50, request_seconds=20,
    head_seconds=0.6, body_seconds=0.6, idle_seconds=0.6, send_seconds=0.6, connections=40,
)  # fmt: skip


@pytest.fixture(scope="module")
def server(adapters):
    with http_server.in_thread(http_server.llama(adapters), TIGHT) as running:
        yield running


@pytest.fixture(autouse=True)
def _still_serves(server, adapters):
    yield
    status, answer = server.call("/v1/completions", body("a1"))
    assert (status, answer["choices"][0]["text"]) == (200, text_alone(adapters / "a1"))


def answer_of(client: socket.socket) -> tuple[int, bytes]:
    """Status and body of what comes until the server closes."""
    got = b""
    while part := client.recv(65536):
        got += part
    head, _, rest = got.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, rest


def post(path: str = "/v1/completions", *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def test_a_large_body_is_refused_by_its_length_before_it_is_sent(server):
    with server.connect() as client:
        client.sendall(post("/v1/completions", "Content-Length: 20001"))
        status, answer = answer_of(client)
    assert (status, json.loads(answer)["error"]["code"]) == (413, "body_too_large")


def test_a_large_body_in_chunks_is_refused_while_it_comes(server):
    with server.connect() as client:
        client.sendall(post("/v1/completions", "Transfer-Encoding: chunked"))
        sent = 0
        try:
            for _ in range(10_000):  # 40 MB, of which the server takes 20 kB and what is under way
                client.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                sent += 4096
        except OSError:
            pass
        assert sent < 20_000_000
        try:
            status, answer = answer_of(client)
            assert (status, json.loads(answer)["error"]["code"]) == (413, "body_too_large")
        except ConnectionResetError:
            pass  # the answer was lost with the rest of what was sent


def test_a_body_just_within_the_limit_is_read(server):
    sent = json.dumps(body("a1")).encode()
    sent += b" " * (20_000 - len(sent))
    assert server.call("/v1/completions", sent)[0] == 200
    assert server.call("/v1/completions", sent + b" ")[0] == 413


def test_without_the_key_no_body_is_read(server):
    with server.connect() as client:
        client.sendall(post("/v1/load_lora_adapter", "Content-Length: 10000"))
        begin = time.monotonic()
        client.settimeout(0.5)
        assert b"401" in client.recv(100)
        assert time.monotonic() - begin < 0.5


@pytest.mark.parametrize(
    ("sent", "seconds"),
    [(b"", 0.6), (b"POST /v1/completions HTTP/1.1\r\nHost:", 0.6), (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", 0.6)],
    ids=["nothing", "half a head", "idle after an answer"],
)
def test_a_connection_without_a_request_is_closed(server, sent, seconds):
    with server.connect() as client:
        begin = time.monotonic()
        client.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            answer_of(client)
        assert 0.8 * seconds < time.monotonic() - begin < 10 * seconds


def test_a_head_that_comes_byte_by_byte_is_cut(server):
    with server.connect() as client:
        begin = time.monotonic()
        with contextlib.suppress(OSError):  # reset, or a broken pipe
            for _ in range(100):
                client.sendall(b"G")
                time.sleep(0.05)
        assert 0.4 < time.monotonic() - begin < 4


def test_a_body_that_comes_byte_by_byte_is_refused(server):
    with server.connect() as client:
        client.sendall(post("/v1/completions", "Content-Length: 1000"))
        stop = threading.Event()

        def drip():
            while not stop.wait(0.05):
                try:
                    client.sendall(b" ")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        begin = time.monotonic()
        thread.start()
        try:
            status, answer = answer_of(client)
            assert (status, json.loads(answer)["error"]["code"]) == (408, "body_timeout")
        except ConnectionResetError:
            pass
        finally:
            stop.set()
            thread.join()
        assert 0.4 < time.monotonic() - begin < 5


def test_an_answer_that_nobody_reads_is_cut(server):
    """Pipelined requests whose answers fill all buffers; then the server lets go of the connection."""
    connections = server.server.server_state.connections
    wait_until(lambda: not connections)
    with server.connect() as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
        wait_until(lambda: any(connection.flow.write_paused for connection in connections))
        begin = time.monotonic()
        wait_until(lambda: not connections)
        assert 0.3 < time.monotonic() - begin < 5


def test_more_connections_than_allowed_are_refused(server):
    clients = [server.connect() for _ in range(45)]
    try:
        time.sleep(0.2)
        clients[-1].sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer_of(clients[-1])[0] == 503
    finally:
        for client in clients:
            client.close()
    wait_until(lambda: server.call("/health")[0] == 200)


BAD = {
    "no JSON": (b"{", None),
    "nested too deeply": (b"[" * 9000 + b"]" * 9000, None),
    "no object": (b"[]", None),
    "empty": (b"", None),
    "an endless number": (b'{"model": "a1", "prompt": "w5", "max_tokens": ' + b"9" * 9000 + b"}", None),
    "half a character": (b'{"model": "a1", "prompt": "\\ud800"}', "prompt"),
    "no utf-8": (b'{"model": "a1", "prompt": "\xff"}', None),
    "no prompt": ({"model": "a1"}, "prompt"),
    "an empty prompt": (body("a1", prompt=""), "prompt"),
    "an empty list": (body("a1", prompt=[]), "prompt"),
    "too many prompts": (body("a1", prompt=["w5"] * 5), None),
    "a token outside": (body("a1", prompt=[5, 100]), None),
    "a negative token": (body("a1", prompt=[-1]), None),
    "a huge token": (body("a1", prompt=[2**70]), None),
    "too long a prompt": (body("a1", prompt=[5] * 51), None),
    "more than the model has positions for": (body("a1", prompt=[5] * 50, new=210), None),
    "max_tokens above the limit": (body("a1", new=201), "max_tokens"),
    "max_tokens 0": (body("a1", new=0), "max_tokens"),
    "max_tokens text": ({**body("a1"), "max_tokens": "8"}, "max_tokens"),
    "temperature not a number": (b'{"model": "a1", "prompt": "w5", "temperature": NaN}', "temperature"),
    "temperature below 0": (body("a1", temperature=-1), "temperature"),
    "top_p 0": (body("a1", top_p=0), "top_p"),
    "two choices": (body("a1", n=2), "n"),
    "a boolean for one": (body("a1", n=True), "n"),
    "log probabilities": (body("a1", logprobs=1), "logprobs"),
    "an unknown field": (body("a1", nonsense=1), "nonsense"),
    "an empty stop string": (body("a1", stop=[""]), "stop"),
    "too many stop strings": (body("a1", stop=["x"] * 17), "stop"),
    "no timeout": (body("a1", timeout=0), "timeout"),
    "a model that is no text": ({**body("a1"), "model": 3}, "model"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_says_what_is_wrong(server, what):
    sent, param = BAD[what]
    status, answer = server.call("/v1/completions", sent)
    assert status == 400, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"]
    if param is not None:
        assert answer["error"]["param"] == param


def test_fields_that_ask_for_nothing_are_taken(server, adapters):
    nothing = {
        "n": 1,
        "logprobs": None,
        "stop": None,
        "user": "x",
        "presence_penalty": 0.0,
        "echo": False,
        "seed": 2**70,
    }
    status, answer = server.call("/v1/completions", body("a1", **nothing))
    assert (status, answer["choices"][0]["text"]) == (200, text_alone(adapters / "a1"))


def test_other_methods_paths_and_types_get_errors_of_the_same_shape(server):
    for path, sent, expected in (
        ("/v1/completions", None, 405),
        ("/v1/nothing", None, 404),
        ("/docs", None, 404),
        ("/openapi.json", None, 404),
        ("/v1/embeddings", {"model": "a1", "input": "w5"}, 404),
        ("/v1/completions/", body("a1"), 404),
    ):
        status, answer = server.call(path, sent)
        assert status == expected, path
        assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_a_form_is_no_json(server):
    """What a web page can post to any address without asking."""
    with server.connect() as client:
        sent = json.dumps(body("a1")).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: {len(sent)}\r\n"
        )
        client.sendall(head.encode() + b"Connection: close\r\n\r\n" + sent)
        assert answer_of(client)[0] == 400


def test_a_full_queue_says_when_to_come_back(adapters):
    served = http_server.llama(adapters, max_running=1, max_waiting=1)
    with http_server.in_thread(served) as server:
        statuses: list[tuple[int, dict[str, str]]] = []

        def ask(number):
            statuses.append(server.call_all("/v1/completions", body("a0", new=60))[:2])

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert {status for status, _ in statuses} == {200, 429}
        assert all(int(headers["retry-after"]) >= 1 for status, headers in statuses if status == 429)
        # of several prompts all are taken or none
        before = served.engine.stats().finished
        assert server.call("/v1/completions", body("a0", prompt=["w5"] * 4, new=200))[0] == 429
        wait_until(lambda: served.engine.stats().running == served.engine.stats().waiting == 0)
        assert served.engine.stats().finished == before
        assert server.call("/v1/completions", body("a0"))[0] == 200


def test_a_request_that_takes_too_long_ends_with_an_error(server, adapters):
    status, answer = server.call("/v1/completions", body("a0", new=200, timeout=0.05))
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
    with http_server.in_thread(http_server.llama(adapters), Limits(request_seconds=0.05)) as other:
        assert other.call("/v1/completions", body("a0", new=200, timeout=100))[0] == 504
        status, answer = other.call("/v1/completions", body("a0", new=200, stream=True))
        if status == 200:  # it had begun
            assert '"deadline_exceeded"' in answer
            assert answer.endswith("data: [DONE]\n\n")
        else:
            assert status == 504


@pytest.mark.parametrize("field", ["body_bytes", "request_seconds", "connections"])
def test_limits_are_positive(field):
    with pytest.raises(ValueError, match=f"{field}: expected a positive number, got 0"):
        Limits(**{field: 0})


def test_admin_bodies_are_checked_too(server):
    for sent in ({}, {"lora_name": "x"}, {"lora_name": 1, "lora_path": "a0"}, {"lora_name": "x", "lora_path": None}):
        status, answer = server.call("/v1/load_lora_adapter", sent, token=ADMIN)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")

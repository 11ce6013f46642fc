"""Adapters that come and go under traffic, clients that leave, damaged checkpoints, metrics."""

from __future__ import annotations

import json
import shutil
import threading
import time

import pytest

from peftk.serve.http.limits import Limits
from tests.support import http_server
from tests.support.http_server import ADMIN, body, text_alone, wait_until


@pytest.fixture
def folder(tmp_path, adapters):
    """A copy of the adapters, to change."""
    shutil.copytree(adapters, tmp_path / "adapters")
    return tmp_path / "adapters"


def load(server, name, path, **fields):
    sent = {"lora_name": name, "lora_path": path, **fields}
    return server.call("/v1/load_lora_adapter", sent, token=ADMIN)


def unload(server, name, **fields):
    return server.call("/v1/unload_lora_adapter", {"lora_name": name, **fields}, token=ADMIN)


def test_every_answer_is_its_adapters_while_adapters_come_and_go(folder):
    """Six clients; "x" is replaced in place and taken away all the time, in a bank for three."""
    versions = [0]  # what "x" was, one after the other; None while it is away
    failures: list[object] = []
    stop = threading.Event()
    expected = [text_alone(folder / f"a{number}") for number in range(5)]
    answered = {"x": 0, "away": 0, "others": 0}

    with http_server.in_thread(http_server.llama(folder, bank_slots=3)) as server:
        assert load(server, "x", "a0")[0] == 200

        def ask(number):
            turn = number
            while not stop.is_set():
                turn += 1
                name = "x" if turn % 2 else f"a{turn // 2 % 5}"
                before = len(versions)
                status, answer = server.call("/v1/completions", body(name))
                during = versions[max(before - 2, 0) : len(versions) + 1]  # one that is being put in may be seen early
                if name != "x":
                    good = status == 200 and answer["choices"][0]["text"] == expected[turn // 2 % 5]
                    answered["others"] += 1
                elif status == 404:
                    good = None in during
                    answered["away"] += 1
                else:
                    texts = [expected[version] for version in during if version is not None]
                    good = status == 200 and answer["choices"][0]["text"] in texts
                    answered["x"] += 1
                if not good:
                    failures.append((name, status, answer, during))

        clients = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for client in clients:
            client.start()
        for turn in range(1, 25):
            if turn % 6 == 0:
                versions.append(None)
                assert unload(server, "x")[0] == 200
            versions.append(turn % 5)
            assert load(server, "x", f"a{turn % 5}", load_inplace=True)[0] == 200
            time.sleep(0.05)
        stop.set()
        for client in clients:
            client.join(30)
        assert failures == []
        assert answered["x"] > 10
        assert answered["others"] > 10
        stats = server.metrics()
        assert stats["peftk_adapter_evictions_total"] > 0
        assert stats["peftk_adapters_pinned"] == 0
        assert stats["peftk_adapters_resident"] <= 3


def test_a_name_is_replaced_only_on_request(folder):
    with http_server.in_thread(http_server.llama(folder)) as server:
        status, answer = load(server, "a0", "a1")
        assert (status, answer["error"]["code"]) == (400, "already_loaded")
        assert server.call("/v1/completions", body("a0"))[1]["choices"][0]["text"] == text_alone(folder / "a0")
        assert load(server, "a0", "a1", load_inplace=True)[0] == 200
        assert server.call("/v1/completions", body("a0"))[1]["choices"][0]["text"] == text_alone(folder / "a1")


def test_unloading_waits_or_cancels(folder):
    with http_server.in_thread(http_server.llama(folder)) as server:
        for name, fields, expected in (("a0", {}, 200), ("a1", {"cancel": True}, 503)):
            answers: list[tuple[int, object]] = []

            def ask(name=name, answers=answers):
                answers.append(server.call("/v1/completions", body(name, new=200)))

            asking = threading.Thread(target=ask)
            asking.start()
            wait_until(lambda: server.metrics()["peftk_requests_running"] == 1)
            assert unload(server, name, **fields)[0] == 200
            assert server.call("/v1/completions", body(name))[0] == 404
            asking.join(20)
            assert answers[0][0] == expected, answers
            if expected == 200:
                assert answers[0][1]["choices"][0]["text"] == text_alone(folder / name, new=200)
            else:
                assert answers[0][1]["error"]["code"] == "cancelled"
            assert not any(f"adapter={name}," in sample for sample in server.metrics())


def test_a_damaged_checkpoint_is_not_loaded_and_fails_only_who_asks(folder):
    weights = (folder / "a3/adapter_model.safetensors").read_bytes()
    (folder / "a3/adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "a4/adapter_config.json").write_text("{")
    with http_server.in_thread(http_server.llama(folder)) as server:
        for name in ("a3", "a4"):
            status, answer = load(server, "a1", name, load_inplace=True)
            assert (status, answer["error"]["code"]) == (400, "bad_checkpoint")
            for stream in (False, True):
                status, answer = server.call("/v1/completions", body(name, stream=stream))
                assert (status, answer["error"]["code"]) == (500, "adapter_failed")
                assert str(folder) not in str(answer)
        assert server.call("/v1/completions", body("a1"))[1]["choices"][0]["text"] == text_alone(folder / "a1")
        assert load(server, "new", "a3")[0] == 400
        assert "new" not in str(server.call("/v1/models"))
        (folder / "a3/adapter_model.safetensors").write_bytes(weights)
        assert server.call("/v1/completions", body("a3"))[1]["choices"][0]["text"] == text_alone(folder / "a3")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(folder, stream):
    served = http_server.llama(folder)
    with http_server.in_thread(served) as server:
        stats = served.engine.stats
        for number in range(4):
            sent = json.dumps(body(f"a{number}", prompt=[[5], [6, 7]], new=250, stream=stream)).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            with server.connect() as client:
                client.sendall(head.encode() + f"Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
                if stream:
                    assert client.recv(1000).startswith(b"HTTP/1.1 200")
                else:
                    wait_until(lambda: stats().running == 2)
            wait_until(lambda: stats().running == 0)
        assert (stats().cancelled, stats().finished) == (8, 0)
        assert stats().generated_tokens < 4 * 2 * 250
        assert server.call("/v1/completions", body("a1"))[1]["choices"][0]["text"] == text_alone(folder / "a1")
        assert server.metrics()["peftk_adapters_pinned"] == 0
        if not stream:
            assert server.metrics()["peftk_http_requests_total,endpoint=/v1/completions,status=499"] == 4


def test_clients_that_leave_disturb_no_other(folder):
    """Every second client closes its connection at once, in the midst of its body, or while it is answered."""
    with http_server.in_thread(http_server.llama(folder, max_running=4)) as server:
        wrong: list[object] = []
        prompts = [tuple(range(3, 6 + number)) for number in range(20)]
        expected = [text_alone(folder / f"a{number % 5}", prompt, 20) for number, prompt in enumerate(prompts)]

        def stay(number):
            answer = server.call("/v1/completions", body(f"a{number % 5}", prompts[number], 20))[1]
            if answer["choices"][0]["text"] != expected[number]:
                wrong.append(answer)

        def leave(number):
            sent = json.dumps(body(f"a{number % 5}", new=200, stream=bool(number % 2))).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
            with server.connect() as client:
                data = head.encode() + f"{len(sent)}\r\n\r\n".encode() + sent
                client.sendall(data[: (0, 30, len(data) - 5, len(data))[number % 4]])
                time.sleep(0.01 * (number % 5))

        threads = [threading.Thread(target=(stay, leave)[n % 2], args=(n // 2,)) for n in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert wrong == []
        wait_until(lambda: server.metrics()["peftk_requests_running"] == 0)
        assert server.metrics()["peftk_requests_waiting"] == 0


def test_several_prompts_have_a_choice_each(folder):
    with http_server.in_thread(http_server.llama(folder)) as server:
        expected = [text_alone(folder / "a1", (5,), 6), text_alone(folder / "a1", (6, 7, 8), 6)]
        answer = server.call("/v1/completions", body("a1", [[5], [6, 7, 8]], 6))[1]
        assert [choice["text"] for choice in answer["choices"]] == expected
        assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16}
        streamed = server.call("/v1/completions", body("a1", ["w5", "w6 w7 w8"], 6, stream=True))[1]
        texts = ["", ""]
        for event in streamed.split("\n\n")[:-2]:
            choice = json.loads(event.removeprefix("data: "))["choices"][0]
            texts[choice["index"]] += choice["text"]
        assert texts == expected


def test_sampling_and_stop_strings(folder):
    with http_server.in_thread(http_server.llama(folder)) as server:

        def ask(**fields):
            return server.call("/v1/completions", body("a1", new=30, **fields))[1]["choices"][0]

        whole = ask()["text"]
        words = whole.split()
        stop = f" {words[4]}"
        stopped = ask(stop=stop)
        assert (stopped["text"], stopped["finish_reason"]) == (whole[: whole.index(stop)], "stop")
        drawn = [ask(temperature=1.5, seed=seed)["text"] for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert ask(temperature=1.5, seed=1, top_k=1)["text"] == whole
        assert ask(temperature=1.5, seed=1, top_p=1e-6)["text"] == whole


def test_metrics_say_what_happened(folder):
    with http_server.in_thread(http_server.llama(folder), Limits(new_tokens=100)) as server:
        for name in ("a0", "a1", "a1"):
            server.call("/v1/completions", body(name, new=5))
        server.call("/v1/completions", body("nobody"))
        server.call("/v1/nobody/knows")
        found = server.metrics()
        assert found["peftk_http_requests_total,endpoint=/v1/completions,status=200"] == 3
        assert found["peftk_http_requests_total,endpoint=/v1/completions,status=404"] == 1
        assert found["peftk_http_requests_total,endpoint=other,status=404"] == 1
        assert not any("nobody" in name for name in found)  # what clients send makes no series
        assert found["peftk_http_request_seconds_count,endpoint=/v1/completions"] == 4
        assert found["peftk_time_to_first_token_seconds_count"] == 3
        assert 0 < found["peftk_time_to_first_token_seconds_sum"] < 60
        assert found["peftk_time_per_output_token_seconds_count"] == 3
        assert found["peftk_prompt_tokens_total"] == 9
        assert found["peftk_generated_tokens_total"] == 15
        assert found["peftk_requests_total,outcome=finished"] == 3
        assert (found["peftk_adapters_registered"], found["peftk_adapters_resident"]) == (5, 2)
        assert found["peftk_adapter_residency,adapter=a0,tier=bank"] == 1
        assert "peftk_adapter_residency,adapter=a2,tier=bank" not in found
        assert found["peftk_bank_bytes"] > 0
        assert found["peftk_adapter_loads_total"] == 2
        assert found["peftk_adapter_hits_total"] == 1
        assert found["peftk_requests_waiting"] == found["peftk_requests_running"] == 0


def test_health_tells_whether_the_model_runs(folder):
    served = http_server.llama(folder)
    with http_server.in_thread(served) as server:
        assert server.call("/health")[0] == 200
        served.engine.close()
        assert server.call("/health")[0] == 503
        status, answer = server.call("/v1/completions", body("a1"))
        assert (status, answer["error"]["type"]) == (503, "server_error")


def test_a_model_without_a_template_does_not_chat(folder):
    served = http_server.llama(folder)
    served.engine.tokenizer.chat_template = None
    with http_server.in_thread(served) as server:
        sent = {"model": "a1", "messages": [{"role": "user", "content": "w5"}]}
        assert server.call("/v1/chat/completions", sent)[1]["error"]["code"] == "no_chat_template"


def test_no_folder_of_adapters():
    with http_server.in_thread(http_server.llama(None)) as server:
        assert load(server, "new", "a0")[1]["error"]["code"] == "no_adapters_folder"
        text = server.call("/v1/completions", body("base"))[1]["choices"][0]["text"]
        assert text == text_alone(None)

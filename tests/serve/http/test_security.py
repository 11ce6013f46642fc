"""Who may do what; names and paths that would lead elsewhere."""

from __future__ import annotations

import os
import pathlib
import urllib.parse

import pytest

from peftk.serve.http.errors import APIError
from peftk.serve.http.security import Keys, check_new_name, checkpoint_folder
from tests.support import http_server, served_llama
from tests.support.http_server import ADMIN, body, text_alone

TRICKS = [
    "../a0",
    "a0/../a1",
    "./a0",
    "a0/",
    "/a0",
    "..",
    ".",
    "",
    "..%2fa0",
    "%2e%2e%2fa0",
    "..\\a0",
    "a0\\..\\a1",
    "a0\0",
    "a0\0.safetensors",
    "A0",
    "a0 ",
    " a0",
    "．．／a0",
    "‥/a0",
    "a0\u200b",
    "a\u030a0",
    "~/a0",
    "file:///etc/passwd",
    "/etc/passwd",
    "a" * 100_000,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """adapters/a0 and adapters/a1 in a folder that has other things too."""
    root = tmp_path_factory.mktemp("secure")
    for number in range(2):
        served_llama.write_adapter(root / "adapters" / f"a{number}", 4, number)
    served_llama.write_adapter(root / "outside", 4, 7)
    os.symlink(root / "outside", root / "adapters" / "link")
    os.symlink(root / "adapters/a0", root / "adapters" / "inner")
    (root / "adapters" / "files").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        os.symlink(root / "outside" / file, root / "adapters" / "files" / file)
    (root / "adapters" / "empty").mkdir()
    return root / "adapters"


@pytest.fixture(scope="module")
def server(folder):
    served = http_server.llama(folder)
    for name in ("link", "files", "inner"):
        served.store.remove(name)
    with http_server.in_thread(served) as running:
        yield running


@pytest.mark.parametrize("name", TRICKS, ids=lambda name: repr(name)[:30])
def test_a_name_is_never_a_path(server, name):
    for path, sent in (
        ("/v1/completions", body(name)),
        ("/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": "w5"}], "max_tokens": 1}),
        ("/v1/unload_lora_adapter", {"lora_name": name}),
    ):
        status, answer = server.call(path, sent, token=ADMIN)
        assert (status, answer["error"]["code"]) == (404, "model_not_found"), path
    if name and len(name) < 1000:
        for quoted in (urllib.parse.quote(name, safe=""), urllib.parse.quote(urllib.parse.quote(name, safe=""))):
            assert server.call(f"/v1/models/{quoted}")[0] == 404
    status, answer = server.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "a0"}, token=ADMIN)
    assert status == (200 if name in ("A0",) else 400)
    if name == "A0":
        assert server.call("/v1/unload_lora_adapter", {"lora_name": "A0"}, token=ADMIN)[0] == 200
    assert [model["id"] for model in server.call("/v1/models")[1]["data"]] == ["base", "a0", "a1"]


@pytest.mark.parametrize(
    "path",
    [
        "..", ".", "", "../outside", "a0/../../outside", "link", "files", "/etc", "~", "a0\0", "..\\outside",
        "a0/../..", "%2e%2e/outside", "file:a0", "a0\n", "x" * 5000, "‥/outside", "./a0/./../../outside",
    ],
    ids=lambda path: repr(path)[:30],
)  # fmt: skip
def test_a_checkpoint_lies_in_the_folder_of_adapters(server, folder, path):
    for given in (path, str(folder / path) if "\0" not in path else path):
        status, answer = server.call("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": given}, token=ADMIN)
        assert (status, answer["error"]["param"]) == (400, "lora_path"), given
    assert "new" not in str(server.call("/v1/models"))


@pytest.mark.parametrize("path", ["a0", "./a0", "a1/../a0", "inner"])
def test_a_checkpoint_in_the_folder_is_loaded_by_any_path_to_it(server, folder, path):
    for given in (path, str(folder / path)):
        assert server.call("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": given}, token=ADMIN)[0] == 200
        assert server.call("/v1/completions", body("new"))[1]["choices"][0]["text"] == text_alone(folder / "a0")
        assert server.call("/v1/unload_lora_adapter", {"lora_name": "new"}, token=ADMIN)[0] == 200


def test_errors_of_paths_do_not_tell_what_exists_elsewhere(server):
    said = {
        server.call("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": path}, token=ADMIN)[1]["error"][
            "message"
        ]
        for path in ("/etc", "/etc/passwd", "/no/such/thing", "../outside", "../nothing")
    }
    assert len(said) == 1


def test_the_admins_endpoints_need_the_admins_token(folder):
    load, unload = {"lora_name": "new", "lora_path": "a0"}, {"lora_name": "a0"}
    with http_server.in_thread(http_server.llama(folder), keys=Keys(api="the-api-key", admin=ADMIN)) as server:
        for path, sent in (("/v1/load_lora_adapter", load), ("/v1/unload_lora_adapter", unload)):
            for token in (None, "the-api-key", ADMIN[:-1], ADMIN + "x", ADMIN.upper()):
                status, headers, answer = server.call_all(path, sent, token=token)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
                assert headers["www-authenticate"] == "Bearer"
        for path, sent in (("/v1/models", None), ("/v1/completions", body("a0")), ("/metrics", None)):
            assert server.call(path, sent)[0] == 401
            assert server.call(path, sent, token=ADMIN)[0] == 401
            assert server.call(path, sent, token="the-api-key")[0] == 200
        assert server.call("/health")[0] == 200
        assert server.call("/v1/load_lora_adapter", load, token=ADMIN)[0] == 200
        assert "new" in server.call("/v1/models", token="the-api-key")[1]["data"][-1]["id"]
    with http_server.in_thread(http_server.llama(folder), keys=Keys()) as server:
        for token in (None, "", ADMIN, "None"):
            status, answer = server.call("/v1/load_lora_adapter", load, token=token)
            assert (status, answer["error"]["code"]) == (403, "admin_off")
        assert server.call("/v1/completions", body("a0"))[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"secret-key")],
        [(b"authorization", b"Basic secret-key")],
        [(b"authorization", b"Bearer secret-ke")],
        [(b"authorization", b"Bearer \xff\xfe")],
        [(b"authorization", b"Bearer secret-key"), (b"authorization", b"Bearer x")],
        [(b"authorization", b"Bearer " + b"x" * 30000)],
        [(b"x-authorization", b"Bearer secret-key")],
    ],
)
def test_other_headers_are_no_key(headers):
    keys = Keys(api="secret-key")
    with pytest.raises(APIError) as caught:
        keys.check("/v1/completions", headers)
    assert caught.value.status == 401
    keys.check("/v1/completions", [(b"authorization", b"bearer  secret-key")])
    keys.check("/health", headers)


@pytest.mark.parametrize("secret", ["", "short", "with\nnewline", "päßword-and-more"])
def test_bad_secrets_are_refused(secret):
    with pytest.raises(ValueError, match="admin token: expected 8 or more"):
        Keys(admin=secret)


def test_secrets_are_compared_in_constant_time(monkeypatch):
    """Of equally long digests, by hmac.compare_digest, and not at all for a closed endpoint."""
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    keys = Keys(admin="secret-token")
    for secret in (b"s", b"secret-token", b"x" * 5000):
        try:
            keys.check("/v1/load_lora_adapter", [(b"authorization", b"Bearer " + secret)])
        except APIError:
            assert secret != b"secret-token"
    assert [(len(a), len(b)) for a, b in compared] == [(32, 32)] * 3
    assert b"secret" not in b"".join(sum(compared, ()))


@pytest.mark.parametrize("name", ["a", "alice-2_b.c", "A" * 128])
def test_good_names(name):
    check_new_name(name)


def test_a_link_out_of_the_folder_does_not_leave_it(tmp_path):
    (tmp_path / "adapters").mkdir()
    os.symlink("/etc", tmp_path / "adapters" / "etc")
    os.symlink(tmp_path / "adapters", tmp_path / "adapters" / "self")
    for path in ("etc", "self", "self/etc", "self/self"):
        with pytest.raises(APIError, match="inside of"):
            checkpoint_folder(tmp_path / "adapters", path)
    assert checkpoint_folder(tmp_path / "adapters", "self/new") == pathlib.Path(tmp_path / "adapters/new").resolve()


def test_an_adapter_cannot_have_the_models_name(server, tmp_path, folder):
    status, answer = server.call("/v1/load_lora_adapter", {"lora_name": "base", "lora_path": "a0"}, token=ADMIN)
    assert (status, answer["error"]["param"]) == (400, "lora_name")
    served_llama.write_adapter(tmp_path / "base", 4, 0)
    with pytest.raises(ValueError, match="name: expected one that no adapter has"):
        http_server.llama(tmp_path)

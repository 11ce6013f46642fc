"""llama.cpp as a side of `peftk bench --suite serving`: for real where it is built, else a server that plays it."""

from __future__ import annotations

import os
import sys
import time

import pytest

pytest.importorskip("transformers", "5.24", reason="the engine is for transformers 5.24")

from peftk.tools import smollm2
from peftk.tools.benchmark.peers import UnavailableError
from peftk.tools.benchmark.serving import adapters, llama_cpp_side, others
from peftk.tools.benchmark.serving.check import Alone
from peftk.tools.benchmark.serving.traffic import DISTINCT, Job, jobs

CONVERTER = """
import pathlib, sys
source, to = sys.argv[1], sys.argv[sys.argv.index("--outfile") + 1]
assert sys.argv[sys.argv.index("--outtype") + 1] == "bf16"
if "broken" in source:
    sys.exit("no such checkpoint")
pathlib.Path(to).write_text(source)
"""
# answers with the prompt's first token, the number of the adapter (-1: none) and how many tokens are asked for
SERVER = """#!{python}
import http.server, json, pathlib, sys
def of(name): return [sys.argv[n + 1] for n, part in enumerate(sys.argv) if part == name]
assert all(pathlib.Path(path).is_file() for path in of("--lora") + of("--model"))
assert int(of("--parallel")[0]) == len(of("--lora")) and "--lora-init-without-apply" in sys.argv
class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, code, found):
        self.send_response(code); self.end_headers(); self.wfile.write(json.dumps(found).encode())
    def do_GET(self): self.reply(200, {{}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (lora,) = asked["lora"]  # without one llama.cpp applies all
        if asked["prompt"][0] == 13: return self.reply(500, {{"error": "unlucky"}})
        self.reply(200, {{"tokens": [asked["prompt"][0], lora["id"] if lora["scale"] else -1, asked["n_predict"]]}})
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(of("--port")[0])), Handler).serve_forever()
"""


class Tokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture(scope="module")
def tiny():
    return smollm2.random_llama(hidden=64, layers=1)


@pytest.fixture
def played(tmp_path, monkeypatch):
    """A folder as of llama.cpp's sources."""
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (tmp_path / name).write_text(CONVERTER)
    server = tmp_path / "build" / "bin" / "llama-server"
    server.parent.mkdir(parents=True)
    server.write_text(SERVER.format(python=sys.executable))
    server.chmod(0o755)
    monkeypatch.setenv(llama_cpp_side.SOURCES, str(tmp_path))
    return tmp_path


def test_reasons(tiny, played, monkeypatch):
    monkeypatch.setenv("PATH", "")
    language = tiny._replace(tokenizer=Tokenizer())
    assert llama_cpp_side.why_not(language) is None
    assert "has no tokenizer" in llama_cpp_side.why_not(tiny)
    (played / "build" / "bin" / "llama-server").unlink()
    assert "no llama-server" in llama_cpp_side.why_not(language)
    (played / "convert_lora_to_gguf.py").unlink()
    assert "has no convert_lora_to_gguf.py" in llama_cpp_side.why_not(language)
    monkeypatch.delenv(llama_cpp_side.SOURCES)
    assert llama_cpp_side.SOURCES in llama_cpp_side.why_not(language)


def test_each_job_names_its_adapter(tiny, played, tmp_path):
    language, names = tiny._replace(tokenizer=Tokenizer()), ["a", "b"]
    side = llama_cpp_side.side("llama.cpp", language, tmp_path / "adapters", names)
    try:
        asked = [Job((5, 6), "b", 3), Job((7,), None, 4), Job((8,), "a", 5), Job((9,), "b", 6)]
        assert side.answer(asked) == [(5, 1, 3), (7, -1, 4), (8, 0, 5), (9, 1, 6)]
        assert 0 < side.processor() < 60
        with pytest.raises(RuntimeError, match="unlucky"):
            side.answer([Job((13,), "a", 1)])
    finally:
        side.close()


def test_what_does_not_start_is_unavailable(tiny, played, tmp_path):
    language = tiny._replace(tokenizer=Tokenizer())
    with pytest.raises(UnavailableError, match=r"convert_lora_to_gguf.py has failed: no such checkpoint"):
        llama_cpp_side.side("llama.cpp", language, tmp_path, ["broken"])
    (played / "build" / "bin" / "llama-server").write_text(f"#!{sys.executable}\nraise SystemExit('cannot serve')")
    with pytest.raises(UnavailableError, match="llama-server did not start: cannot serve"):
        llama_cpp_side.side("llama.cpp", language, tmp_path, ["a"])


def test_the_processor_time_of_a_process():
    before = time.process_time()
    assert others.processor_of(os.getpid()) == pytest.approx(before, abs=0.2)
    assert others.last_line(["a\n", "b\n", " \n"]) == "b"


@pytest.mark.engines
def test_real_answers_are_those_of_each_adapter_alone(tmp_path):
    if smollm2.why_not() is not None:
        pytest.skip(smollm2.why_not())
    language = smollm2.load()
    if llama_cpp_side.why_not(language) is not None:
        pytest.skip(llama_cpp_side.why_not(language))
    names = adapters.write(tmp_path, language.model, [4, 16])
    asked = jobs([*names, None], 3, popularity=DISTINCT, prompt=12, new=6, vocabulary=49152)
    side = llama_cpp_side.side("llama.cpp", language, tmp_path, names)
    try:
        answers = side.answer(asked)
    finally:
        side.close()
    alone = Alone(language, tmp_path, limit=3)
    assert alone.error(asked, answers) <= 1
    assert alone.sensitivity(asked[:2], answers[:2]) > 2

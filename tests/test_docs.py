"""The documentation's Python code runs, its links work, and its pictures are what the script draws.

Every ```python block of README.md, docs/*.md and docs/methods/*.md is run. The blocks of a page share a namespace and
an initially empty folder. The namespace has `torch`, `nn`, `peftk`, `peft` and `get_peft_model`, and the following,
created anew before each block:

    model, base_model   two copies of a small BERT with a classifier; in README.md of the size of MiniLM-L6
    config              an HF PEFT LoRA config for it
    batch               input_ids, attention_mask and labels for it, four sequences
    alice/, bob/        two LoRA checkpoints of it that change its output (once per page)

Blocks assert what they claim. `print(…)  # → text` is also checked: the text is what is printed, with … for anything.
The `>>>` lines of a block run, but their output is not checked, since it differs between machines.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pathlib
import re
import runpy
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import peftk

ROOT = pathlib.Path(__file__).parent.parent
METHODS = ROOT / "docs" / "methods"
PICTURES = ["bitfit", "layers", "llama_adapter", "lora", "overview", "parallel_adapter", "series_adapter"]


def blocks(page: pathlib.Path) -> list[tuple[int, str]]:
    """The page's Python blocks, each with the line at which it begins."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in found]


README = ROOT / "README.md"
ALL = [README, *sorted(ROOT.glob("docs/*.md")), *sorted(METHODS.glob("*.md"))]
PAGES = [page for page in ALL if blocks(page)]


@functools.cache
def made(readme: bool) -> nn.Module:
    torch.manual_seed(0)
    hidden_size, layers, vocab_size = (384, 6, 30522) if readme else (32, 2, 64)
    config = transformers.BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * hidden_size,
    )
    return transformers.BertForSequenceClassification(config).eval()


def prepared(page: pathlib.Path) -> dict[str, Any]:
    ids = torch.randint(3, 64, (4, 8), generator=torch.Generator().manual_seed(1))
    return {
        **{"torch": torch, "nn": nn, "peftk": peftk, "peft": peft, "get_peft_model": peft.get_peft_model},
        "model": copy.deepcopy(made(page == README)),
        "base_model": copy.deepcopy(made(page == README)),
        "batch": {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2},
        "config": peft.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"),
    }


def checkpoint(name: str, page: pathlib.Path) -> None:
    model = prepared(page)["model"]
    peftk.inject(model, peftk.LoraConfig(target_modules=["query", "value"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    peftk.save_adapter(model, name)


CLAIM = re.compile(r"^(print\(.*\))  # → (.*)$", re.M)


def claims(code: str) -> str:
    """The code with each claim about what is printed as a call of `claimed`, in the same line."""
    if code.startswith(">>> "):
        code = "".join(line[4:] if line.startswith(">>> ") else "\n" for line in code.splitlines(keepends=True))
    return CLAIM.sub(lambda found: f"with claimed({found[2]!r}): {found[1]}", code)


@contextlib.contextmanager
def claimed(text: str) -> Any:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        yield
    pattern = ".*".join(map(re.escape, text.split("…")))
    assert re.fullmatch(pattern, printed.getvalue().strip()), f"claimed {text!r}, printed {printed.getvalue()!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_of_the_documentation_runs(
    page: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.stem == "serving":
        pytest.importorskip("transformers", "5.24", reason="the engine is for transformers 5.24")
    monkeypatch.chdir(tmp_path)
    for name in ("alice", "bob"):
        checkpoint(name, page)
    namespace: dict[str, Any] = {"claimed": claimed}
    for line, code in blocks(page):
        namespace.update(prepared(page))
        # compiled under the page's name, at the page's lines: so that a traceback shows them
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is deprecated and will be removed", category=FutureWarning)
            exec(compile("\n" * line + claims(code), page, "exec"), namespace)


@pytest.mark.parametrize(
    ("printed", "text", "right"),
    [
        ("|Φ| = 2,048 of 9,999", "|Φ| = 2,048 of …", True),
        ("|Φ| = 2,049 of 9,999", "|Φ| = 2,048 of …", False),
        ("2,048", "2,048", True),
        ("12,048", "2,048", False),
        ("", "2,048", False),
    ],
)
def test_a_claim_about_what_is_printed_is_held_against_it(printed: str, text: str, right: bool) -> None:
    code = f"print({printed!r})  # → {text}\n"
    with contextlib.nullcontext() if right else pytest.raises(AssertionError, match="claimed"):
        exec(claims(code), {"claimed": claimed})


def test_every_method_has_a_page_with_its_picture_and_code() -> None:
    pages = {page.stem: page.read_text() for page in METHODS.glob("*.md")}
    assert pages.keys() == {*PICTURES, "README"} - {"overview"}
    for name, text in pages.items():
        assert f"]({'overview' if name == 'README' else name}.svg)" in text
        assert blocks(METHODS / f"{name}.md")
    for name in set(pages) - {"README"}:
        assert f"]({name}.md)" in pages["README"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def check_picture(svg: bytes) -> None:
    assert len(svg) < 60_000
    assert b"fill: #ffffff" in svg[:2000]  # it can be read on a dark page too
    assert b"<dc:date>" not in svg


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_small_and_on_white(name: str) -> None:
    assert sorted(path.stem for path in METHODS.glob("*.svg")) == PICTURES
    check_picture((METHODS / f"{name}.svg").read_bytes())


@pytest.mark.full
def test_the_script_draws_the_same_bytes_every_time(tmp_path: pathlib.Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "draw_methods.py"))
    script["draw"](tmp_path / "once")
    script["draw"](tmp_path / "twice")
    for name in PICTURES:
        drawn = (tmp_path / "once" / f"{name}.svg").read_bytes()
        check_picture(drawn)
        assert drawn == (tmp_path / "twice" / f"{name}.svg").read_bytes()

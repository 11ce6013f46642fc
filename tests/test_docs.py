"""The documentation's Python runs, its links lead somewhere, its pictures are what the script draws.

The rule: every ```python block of docs/methods/*.md and of README.md runs, one after the other, in a namespace of its
page and an empty folder. A block finds `torch`, `nn`, `peftk`, `peft` and `get_peft_model`, and fresh before each one:

    model, base_model   a small BERT with a classifier, twice
    config              a LoRA for it, HF PEFT's
    batch               input_ids, attention_mask and labels for it, four sequences
    alice/, bob/        two LoRA checkpoints of it (once a page)

What cannot run here is no ```python block, or needs a GPU and says "cuda".
"""

from __future__ import annotations

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
PAGES = [ROOT / "README.md", *sorted(METHODS.glob("*.md"))]
PICTURES = ["bitfit", "layers", "llama_adapter", "lora", "overview", "parallel_adapter", "series_adapter"]


def blocks(page: pathlib.Path) -> list[tuple[int, str]]:
    """The page's python blocks that run here, each with the line it begins at."""
    text = page.read_text()
    found = [(text[: m.start(1)].count("\n"), m[1]) for m in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)]
    return [(line, code) for line, code in found if "cuda" not in code and not code.startswith(">>>")]


def prepared() -> dict[str, Any]:
    def bert() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
        return transformers.BertForSequenceClassification(config).eval()

    ids = torch.randint(3, 64, (4, 8), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    config = peft.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS")
    modules = {"torch": torch, "nn": nn, "peftk": peftk, "peft": peft, "get_peft_model": peft.get_peft_model}
    return {**modules, "model": bert(), "base_model": bert(), "config": config, "batch": batch}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_of_the_documentation_runs(
    page: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("alice", "bob"):
        model = prepared()["model"]
        peftk.inject(model, peftk.LoraConfig(target_modules=["query", "value"]))
        peftk.save_adapter(model, name)
    namespace: dict[str, Any] = {}
    for line, code in blocks(page):
        namespace.update(prepared())
        # compiled under the page's name, at the page's lines: so that a traceback shows them
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is deprecated and will be removed", category=FutureWarning)
            exec(compile("\n" * line + code, page, "exec"), namespace)


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

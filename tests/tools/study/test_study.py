"""`peftk study` from the command to the pages, on small data and a model of two layers."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from click.testing import CliRunner
from rich.console import Console

from peftk import cli
from peftk.system import extras
from peftk.tools import study
from peftk.tools.study import gpt3, lab, report, training
from peftk.tools.study.figures import INK
from peftk.tools.study.part import Part
from peftk.tools.study.tasks import DataError
from tests.support.paths import ROOT
from tests.support.small_study import SETTINGS, cut_model, with_tasks, write_data

PAGES = ROOT / "docs" / "study"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    cut_model(monkeypatch)


def run(tmp_path, *, settings=SETTINGS, only=(), resume=False, out="out"):
    data = tmp_path / "data"
    if not data.exists():
        write_data(data)
    return study.run(settings, data, tmp_path / out, Console(file=io.StringIO()), only=only, resume=resume)


def result(tmp_path, name, out="out"):
    return Part.read(tmp_path / out / f"{name}.json").result


def test_the_smallest_part_from_data_to_pages(tmp_path):
    pages = run(tmp_path, only=["placement"])
    assert pages == [tmp_path / "out.md", tmp_path / "out" / "report.html"]
    found = result(tmp_path, "placement")["tasks"]["cola"]
    assert [(span["first"], span["last"]) for span in found["spans"]] == [(0, 0), (0, 1), (1, 1)]
    text, html = (page.read_text() for page in pages)
    for page in (text, html):
        assert "24 of 60 training sentences" in page
        assert "nothing is concluded" in page
        assert "peftk study --data DIR --only placement --quick" in page
        assert page.count("This part was not run") == len(report.PARTS) - 1
    assert "](out/placement_cola.svg)" in text
    assert "data:image/svg+xml;base64," in html
    assert "http" not in html.replace("http://www.w3.org", "")  # it needs no other file
    svg = (tmp_path / "out" / "placement_cola.svg").read_text()
    assert "prefers-color-scheme: dark" in svg
    assert f'[style*="fill: {INK}"]' in svg
    assert "nothing is concluded" in svg
    report.write(tmp_path / "out")
    assert (tmp_path / "out" / "placement_cola.svg").read_text() == svg  # the same bytes


@pytest.mark.full
def test_all_parts_and_the_same_again_after_a_stop(tmp_path, monkeypatch):
    settings = with_tasks("cola", "sick_r")
    run(tmp_path, settings=settings)
    stopped = 0
    train = training.train

    def stops(*arguments):
        nonlocal stopped
        stopped += 1
        if stopped % 7 == 6:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(lab.training, "train", stops)
    tries = 0
    while True:
        tries += 1
        try:
            run(tmp_path, settings=settings, out="again", resume=tries > 1)
            break
        except KeyboardInterrupt:
            assert tries < 60
    assert tries > 3
    for name in report.PARTS:
        first, second = (without_times(result(tmp_path, name, out)) for out in ("out", "again"))
        assert first == second, name
    assert without_times(runs(tmp_path, "out")) == without_times(runs(tmp_path, "again"))


def runs(tmp_path, out):
    return [json.loads(line) for line in (tmp_path / out / "runs.jsonl").read_text().splitlines()]


def without_times(value):
    if isinstance(value, dict):
        times = ("seconds", "not_run", "costs", "mixed_ms", "separate_ms")
        return {key: without_times(each) for key, each in value.items() if key not in times}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def test_a_folder_with_a_study_is_not_overwritten(tmp_path):
    run(tmp_path, only=["placement"])
    with pytest.raises(DataError, match=r"--out: expected a folder without a study, got .*placement.json; --resume"):
        run(tmp_path, only=["placement"])
    other = dataclasses.replace(SETTINGS, steps=4)
    with pytest.raises(DataError, match=r"--resume: .*placement.json is of a study with other settings"):
        run(tmp_path, only=["placement"], settings=other, resume=True)
    before = (tmp_path / "out" / "placement.json").read_text()
    run(tmp_path, only=["placement"], resume=True)
    assert (tmp_path / "out" / "placement.json").read_text() == before


def invoke(*arguments):
    return CliRunner().invoke(cli.main, ["study", *arguments])


def test_bad_options(tmp_path):
    out = ["--out", str(tmp_path / "out")]
    said = {
        ("--quick", "--full"): "--full: not with --quick",
        ("--only", "speed"): "'speed' is not one of methods, ranks, size",
        ("--seeds", "0"): "0 is not in the range",
        ("--data", str(tmp_path / "nowhere")): "--data: expected a folder with cola/, sst2/ and sick/",
        ("--report",): "--out: expected a folder with a finished part",
    }
    for options, text in said.items():
        outcome = invoke(*options, *out)
        assert outcome.exit_code != 0
        assert text in outcome.output, outcome.output
        assert not (tmp_path / "out").exists()


def test_the_command_takes_seeds(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(study, "run", lambda settings, *args, **named: taken.append((settings, named)) or [])
    outcome = invoke("--quick", "--seeds", "4", "--first-seed", "10", "--only", "size,ranks", "--out", str(tmp_path))
    assert outcome.exit_code == 0, outcome.output
    ((settings, named),) = taken
    assert list(settings.all_seeds) == list(settings.fewer_seeds) == [10, 11, 12, 13]
    assert named == {"only": ("size", "ranks"), "resume": False}


def test_a_stop_says_how_to_go_on(tmp_path, monkeypatch):
    def stop(*args, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run", stop)
    outcome = invoke("--out", str(tmp_path))
    assert outcome.exit_code == 1
    assert f"{tmp_path}: --resume goes on" in outcome.output


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "is_installed", lambda module: module != "scipy")
    outcome = invoke("--out", str(tmp_path / "out"))
    assert outcome.exit_code == 1
    assert "needs scipy" in outcome.output
    assert "peftk[study]" in outcome.output
    assert not (tmp_path / "out").exists()


def test_the_closed_forms_give_what_the_table_prints():
    given = {row.method: (row.parameters / 1e6, row.printed) for row in gpt3.rows()}
    assert {m for m, (ours, printed) in given.items() if round(ours, 1) != printed} == {"BitFit", "PreLayer"}
    assert given["PreEmbed"][0] == 264 * 12288 / 1e6
    assert given["LoRA, r = 8, query and value"][0] == 96 * 2 * 8 * 2 * 12288 / 1e6
    assert len(gpt3.remainders()) == 2


def test_the_page_in_docs_is_that_of_its_json(tmp_path):
    """No number in it is typed: the page is what the parts' JSON gives."""
    for file in PAGES.glob("*.json"):
        (tmp_path / "study").mkdir(exist_ok=True)
        (tmp_path / "study" / file.name).write_bytes(file.read_bytes())
    page, _ = report.write(tmp_path / "study")
    assert page.read_text() == PAGES.with_suffix(".md").read_text()
    assert {f.name for f in PAGES.glob("*.svg")} == {f.name for f in (tmp_path / "study").glob("*.svg")}

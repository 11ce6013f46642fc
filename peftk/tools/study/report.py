"""Makes the pages of a study from the JSON of its parts: no number is typed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from peftk.tools.study import figures
from peftk.tools.study.document import Section, Table, markdown, page
from peftk.tools.study.part import Part

PARTS = ("methods", "ranks", "size", "placement", "forgetting", "spectra", "capacity")


def module_of(part: str) -> ModuleType:
    return importlib.import_module(f"peftk.tools.study.parts.{part}")


def file_of(folder: Path, part: str) -> Path:
    return folder / f"{part}.json"


def section(part: Part) -> Section:
    with figures.style():
        return module_of(part.name).section(part)


def sections(folder: Path) -> list[Section]:
    """A section for every part, also for those that were not run."""
    found = []
    for name in PARTS:
        module = module_of(name)
        if file_of(folder, name).exists():
            found.append(section(Part.read(file_of(folder, name))))
        else:
            command = f"peftk study --data DIR --only {name}"
            found.append(Section(name, module.TITLE, command, text=["This part was not run: its JSON is missing."]))
    return found


def head(folder: Path) -> Section:
    parts = [Part.read(file_of(folder, name)) for name in PARTS if file_of(folder, name).exists()]
    rows = []
    for part in parts:
        env = part.environment
        rows.append(
            (
                *(part.name, part.settings["name"], str(part.settings["steps"]), f"{part.seconds / 60:.1f}"),
                *(env["cpu"], str(env["threads"]), env["peftk"], env["torch"]),
            )
        )
    columns = (
        "part",
        "study",
        "steps a run",
        "minutes beyond runs that were there",
        "processor",
        "threads",
        "peftk",
        "torch",
    )
    return Section(
        "study",
        "The study: what the methods buy on real tasks",
        "",
        text=[
            "Trained models are all-MiniLM-L6-v2 (22.6 M parameters, 6 layers, width 384) with a head on the mean over "
            "a sentence's tokens. AdamW without weight decay, batches of one size for all methods, a learning rate "
            "that rises over a tenth of the steps and then falls to 0, gradients clipped to norm 1, no dropout, fp32. "
            "LoRA: α = 16 at every rank; its runs are adapters of one mixed batch.",
            "This page is generated from the JSON files of the parts; no number in it was typed.",
        ],
        tables=[Table("The parts that were run", columns, rows)] if rows else [],
    )


def write(folder: Path) -> list[Path]:
    """Writes the figures and report.html into `folder`, and the page in Markdown beside it: FOLDER.md. The pages."""
    found, first = sections(folder), head(folder)
    page_file = folder.parent / f"{folder.name}.md"
    svg = {name: figures.svg(figure) for section in found for name, figure in section.figures.items()}
    files = {folder / f"{name}.svg": text for name, text in svg.items()}
    files |= {page_file: markdown(first, found, folder.name), folder / "report.html": page(first, found, svg)}
    for file, text in files.items():
        file.write_text(text, encoding="utf-8")
    return [page_file, folder / "report.html"]


def cuts(lab: Any, tasks: Sequence[str]) -> dict[str, dict[str, int]]:
    """How the data of these tasks was cut."""
    found = {}
    for task in tasks:
        data = lab.data(task)
        train_of, test_of = data.source_sizes
        found[task] = {"train": len(data.train), "train_of": train_of, "test": len(data.test), "test_of": test_of}
    return found

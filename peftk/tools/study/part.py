"""A finished part: its JSON, and what all parts say of their data and of the machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftk.tools.benchmark.quiet import is_quiet
from peftk.tools.study.document import Section
from peftk.tools.study.settings import ENOUGH_STEPS, Settings
from peftk.tools.study.tasks import TASKS, DataError

NOTHING = "nothing is concluded"


@dataclasses.dataclass(frozen=True)
class Part:
    """data: by task, how many training and test examples were used of how many. seconds: of measuring it."""

    name: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, dict[str, int]]
    seconds: float
    result: dict[str, Any]

    @staticmethod
    def read(file: Path) -> Part:
        """Raises DataError if the file is not a part of a study."""
        try:
            return Part(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{file}: expected a finished part of a study, got {error}") from error

    def write(self, file: Path) -> None:
        temporary = file.with_suffix(".writing")
        temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n", "utf-8")
        temporary.replace(file)

    @property
    def concludes(self) -> bool:
        return bool(self.settings["steps"] >= ENOUGH_STEPS)

    def message(self, text: str) -> str:
        """A figure's title."""
        return text if self.concludes else f"{text}\n({self.settings['steps']} steps a run: {NOTHING})"

    def section(self, title: str, *, caption: str = "", **of_section: Any) -> Section:
        """A section with the command that makes it, and a caption that says how the data was cut."""
        name = self.settings["name"]
        seeds = Settings(**self.settings)
        command = f"peftk study --data DIR --only {self.name}{'' if name == 'default' else f' --{name}'}"
        cuts = "; ".join(
            f"{TASKS[task].title}: {cut['train']:,} of {cut['train_of']:,} training sentences or pairs, tested on "
            f"{cut['test']:,} of {cut['test_of']:,}"
            for task, cut in self.data.items()
        )
        told = (
            f"{cuts}. A run: {seeds.steps} steps of {seeds.batch}, cut at {seeds.tokens} tokens; "
            f"{seeds.seeds} seeds in part 1, {seeds.other_seeds} in the others. "
        )
        if not self.concludes:
            told += f"Below {ENOUGH_STEPS} steps a run {NOTHING}. "
        return Section(self.name, title, command, caption=(told + caption).strip(), **of_section)

    def task_title(self, task: str) -> str:
        return TASKS[task].title

    def metric(self, task: str) -> str:
        return TASKS[task].metric_name

    def quietness(self, not_run: float | None) -> str:
        """What is said of times."""
        if not_run is None:
            return "How busy the machine was is not known."
        if is_quiet(not_run):
            return f"Others took {not_run:.1%} of the time."
        return f"Measured on a busy machine: others took {not_run:.0%} of the time, so only ratios mean something."


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def joined(words: Sequence[str]) -> str:
    """a, b and c; with semicolons if there are commas in them."""
    if len(words) < 2:
        return "".join(words)
    between = "; " if any("," in word for word in words) else ", "
    return f"{between.join(words[:-1])} and {words[-1]}"

"""Types of command-line options: comma-separated lists and files to write."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
POSITIVE = click.IntRange(min=1)
SECONDS = click.FloatRange(min=0, min_open=True)


class CommaList(click.ParamType):  # type: ignore[type-arg]
    """A list of words separated by commas, each converted by `parse`, which raises ValueError for a bad word."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.parse(word.strip()) for word in value.split(","))
        except ValueError as error:
            self.fail(f"expected {self.name}, got {value!r} ({error})", param, ctx)


def positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise ValueError(f"{number} is less than 1")
    return number


def dims_of(word: str) -> tuple[int, int]:
    """K or KxN as (K, N)."""
    if not re.fullmatch(r"\d+(x\d+)?", word):
        raise ValueError(f"{word!r} is neither K nor KxN")
    sides = [positive(side) for side in word.split("x")]
    return sides[0], sides[-1]


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(word: str) -> str:
        if word not in choices:
            raise ValueError(f"{word!r} is not one of {', '.join(choices)}")
        return word

    return parse


INTEGERS = CommaList("INT,INT…", positive)


def make_folders(files: dict[str, Path | None]) -> None:
    """Makes the parent folders of the files."""
    for file in files.values():
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)

"""Small tasks in the folders and columns of the real ones, and a study of a few steps on a model of two layers."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from peftk.tools.minilm import MiniLM
from peftk.tools.study.settings import QUICK, Settings

GOOD = ("the {} {} sings well", "a {} {} was seen near the river", "every {} {} is welcome here")
BAD = ("the {} {} sing well well", "a {} {} were seen near the the", "every {} {} are welcome is")
SETTINGS = dataclasses.replace(
    QUICK, steps=3, batch=4, train=24, test=16, held_out=8, seeds=2, sizes=(8, 24), timing_seconds=0.02, together=4
)


def write_data(folder: Path) -> Path:
    """cola/, sst2/ and sick/ with a few dozen sentences."""
    drawn = random.Random(0)

    def sentence(patterns: tuple[str, ...]) -> str:
        words = drawn.choice(["old", "young", "loud"]), drawn.choice(["bird", "dog", "child"])
        return drawn.choice(patterns).format(*words)

    def labelled(count: int) -> list[tuple[str, int]]:
        return [(sentence(GOOD if n % 2 else BAD), n % 2) for n in range(count)]

    def write(path: str, lines: list[str]) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("\n".join(lines) + "\n", encoding="utf-8")

    for part, count in (("in_domain_train", 60), ("in_domain_dev", 12), ("out_of_domain_dev", 12)):
        write(f"cola/{part}.tsv", [f"ab01\t{label}\t{'' if label else '*'}\t{text}" for text, label in labelled(count)])
    for part, count in (("train", 60), ("dev", 20), ("test", 20)):
        write(f"sst2/{part}.tsv", [f"{text}\t{label}" for text, label in labelled(count)])
    header = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment"
    judgments = ("ENTAILMENT", "NEUTRAL", "CONTRADICTION")
    for part, count in (("train", 40), ("trial", 12), ("test_annotated", 16)):
        pairs = [
            f"{n}\t{sentence(GOOD)}\t{sentence(GOOD)}\t{1 + drawn.random() * 4:.1f}\t{judgments[n % 3]}"
            for n in range(count)
        ]
        write(f"sick/SICK_{part}.txt", [header, *pairs])
    return folder


def cut_model(monkeypatch, layers: int = 2) -> None:
    """MiniLM with its lowest layers only, which computes in milliseconds."""
    original = MiniLM.__init__

    def shorter(minilm: MiniLM) -> None:
        original(minilm)
        del minilm.plain.encoder.layer[layers:]

    monkeypatch.setattr(MiniLM, "__init__", shorter)


def with_tasks(*names: str) -> Settings:
    return dataclasses.replace(SETTINGS, tasks=names)

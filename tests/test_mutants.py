"""The files and tests that scripts/mutate.py and scripts/mutants.json name exist."""

from __future__ import annotations

import fnmatch
import json
import runpy

import pytest

from tests.support.paths import ROOT

pytest.importorskip("pybind11")
SCRIPT = runpy.run_path(str(ROOT / "scripts/mutate.py"))
TESTS: dict[str, list[str]] = SCRIPT["TESTS"]


def test_every_file_of_tests_is_there() -> None:
    for test in sorted({test for tests in TESTS.values() for test in tests}):
        assert "def test_" in (ROOT / "tests" / test).read_text(), test


def test_every_source_has_tests_and_every_pattern_a_source() -> None:
    sources = {path for _, include, exclude in SCRIPT["GROUPS"].values() for path in SCRIPT["files"](include, exclude)}
    if not sources:
        pytest.skip("needs a git checkout")
    fitting = [[pattern for pattern in TESTS if fnmatch.fnmatch(path, pattern)] for path in sorted(sources)]
    assert [path for path, patterns in zip(sorted(sources), fitting, strict=True) if not patterns] == []
    assert {patterns[0] for patterns in fitting} == set(TESTS)


def test_every_mutant_is_of_a_source() -> None:
    for mutant in json.loads((ROOT / "scripts/mutants.json").read_text()):
        assert (ROOT / mutant["path"]).is_file(), mutant["path"]
        assert any(fnmatch.fnmatch(mutant["path"], pattern) for pattern in TESTS), mutant["path"]

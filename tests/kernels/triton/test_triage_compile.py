"""The kernels that the triage compiles ahead, for a GPU that is not there, are found by the launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from peftk.tools.triage import ahead
from peftk.tools.triage.environment import compiled_kernels
from tests.support import compiled_ahead
from tests.support.paths import ROOT
from tests.support.tiers import FULL

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, cannot interpret")

KERNELS = ["lora_linear_kernel", "merge_kernel", "segments_kernel", "wgrad_kernel"]


def run(script: str, *arguments: str, cache: Path) -> str:
    command = [sys.executable, *script.split(), *arguments]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@FULL
def test_launches_find_what_was_compiled_ahead(tmp_path: Path) -> None:
    """In another process, at another path, with tensors in memory, from the folder without anything but binaries."""
    made, folder, cache = tmp_path / "made", tmp_path / "folder", tmp_path / "cache"
    run("-m tests.support.compiled_ahead compile", cache=made)
    ahead.save(made, compiled_ahead.TARGET, folder)
    count = len(compiled_kernels(made))
    assert ahead.install(folder, compiled_ahead.TARGET, cache) == count
    assert {file.suffix for file in folder.rglob("*.*")} == {".cubin", ".json"}
    found = json.loads(run("-m tests.support.compiled_ahead launch", cache=cache))
    assert found == {"launched": KERNELS, "compiled": []}
    assert len(compiled_kernels(cache)) == count  # and what was compiled is what was launched
    unused = json.loads(run("-m tests.support.compiled_ahead launch", cache=tmp_path / "empty"))
    assert len(unused["compiled"]) == count
    assert compiled_kernels_by_key(tmp_path / "empty") == compiled_kernels_by_key(made)


def compiled_kernels_by_key(cache: Path) -> set[str]:
    return {binary.parent.name for binary in compiled_kernels(cache)}


EVERY_CHECK = """
from unittest import mock
import triton
from triton.compiler import compiler
names = set()
def compile(src, **_):
    names.add(src.name)
    return mock.MagicMock()
compiler.compile = triton.compiler.compile = compile
from peftk.tools.triage.groups import COMPILED, GROUPS
from peftk.tools.triage.prepare import compile_share
print(compile_share([GROUPS[name] for name in COMPILED], 90, 0, 1), sorted(names))
"""


@FULL
def test_every_check_reaches_its_end_on_the_stand_in(tmp_path: Path) -> None:
    """So nothing that it launches is left out."""
    others = ["checksum_kernel", "restore_kernel", "scan_kernel", "scatter_kernel", "sort_kernel", "unmerge_kernel"]
    assert run("-c", EVERY_CHECK, cache=tmp_path).strip() == f"[] {sorted(KERNELS + others)}"

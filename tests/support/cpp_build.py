"""Builds the programs of tests/kernels/cpu/cpp with csrc/cpu, using setup.py's files, levels, flags and ninja.

Built files stay in build/, and the plain build shares its objects with the extension module, so only what has changed
is compiled again.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

from tests.support.paths import ROOT


def load_setup(machine: str = platform.machine(), cxx: Sequence[str] = ()) -> ModuleType:
    """setup.py as a module, without running setup(): for this machine, or for another one with a cross-compiler."""
    spec = importlib.util.spec_from_file_location("peftk_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    module.CXX = list(cxx) or module.CXX
    if shutil.which(module.CXX[0]) is None:
        pytest.skip(f"needs a C++ compiler, and {module.CXX[0]} is not here")
    module.LEVELS = {platform.machine(): module.LEVELS.get(machine, {"portable": []})}
    return module


def runs_here(setup: ModuleType, flags: Sequence[str]) -> bool:
    """Whether a program compiled with `flags` runs here: sanitizers need libraries and a suitable kernel."""
    empty = ROOT / setup.BUILD / "empty"
    empty.parent.mkdir(parents=True, exist_ok=True)
    command = [*setup.CXX, *flags, "-x", "c++", "-", "-o", str(empty)]
    compiled = subprocess.run(command, input="int main() {}", capture_output=True, text=True).returncode == 0
    return compiled and subprocess.run([empty], capture_output=True).returncode == 0


def programs(
    *names: str,
    variant: str = "",
    flags: Sequence[str] = (),
    levels: Sequence[str] = (),
    setup: ModuleType | None = None,
) -> list[Path]:
    """Builds tests/kernels/cpu/cpp/<name>.cpp for every name, with csrc/cpu and its kernels of these levels (or all).

    `flags` are added to setup.py's; such a build needs its own `variant`, the name of its build folder.
    """
    setup = setup or load_setup()
    if variant:
        setup.BUILD = Path("build", f"tests-{variant}")
    setup.CXX_FLAGS = [*setup.CXX_FLAGS, *flags]
    if levels:
        (all_levels,) = setup.LEVELS.values()
        setup.LEVELS = {platform.machine(): {level: all_levels[level] for level in levels if level in all_levels}}
    shared = [item for item in setup.cpu_objects() if item.folder != "bindings"]
    built = next(item.flags for item in shared if item.folder == "cpu")
    mains = [setup.Object("cxx", Path(f"tests/kernels/cpu/cpp/{name}.cpp"), built, "tests") for name in names]
    build(setup, shared + mains, [item.path for item in shared + mains])
    return [link(setup, [*shared, main], flags) for main in mains]


def build(setup: ModuleType, objects: list, targets: Sequence[Path]) -> None:
    with setup.build_lock():
        assert setup.run_ninja({"cpu": objects}, None, *map(str, targets)) == 0, "does not compile, see above"


def link(setup: ModuleType, objects: list, flags: Sequence[str]) -> Path:
    program = ROOT / objects[-1].path.with_suffix("")
    command = [*setup.CXX, *flags, "-pthread", *(str(item.path) for item in objects), "-ldl", "-o", str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, *arguments: object, runner: Sequence[str] = (), **environment: str) -> str:
    """Runs a program and returns its output. Fails if the program fails or a sanitizer reports anything."""
    done = subprocess.run(
        [*runner, str(program), *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[:8000]}"
    assert not done.stderr, done.stderr[:8000]
    return done.stdout

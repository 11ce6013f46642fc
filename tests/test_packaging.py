"""Packaging: peftk imports quickly, does not depend on torch's ABI, and its wheel is complete."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import peftk
from tests.support import cpp_build
from tests.support.tiers import FULL

ROOT = Path(__file__).resolve().parents[1]
COMPILED = [name for name in ("_cpu", "_cuda") if importlib.util.find_spec(f"peftk.{name}")]


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    result = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def test_sources_include_no_torch_header():
    included = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|caffe2)/')
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert sources
    assert [path for path in sources if included.search(path.read_text())] == []


def test_cpu_module_is_built():
    assert "_cpu" in COMPILED


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_module_links_only_the_system(name):
    """No torch (one build works with every version), no OpenMP (it hangs in a forked child), no shared CUDA runtime."""
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf, from binutils")
    dynamic = run("readelf", "--dynamic", importlib.util.find_spec(f"peftk.{name}").origin)
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    allowed = re.compile(r"(libstdc\+\+|libgcc_s|libc|libm|libpthread|libdl|librt|ld-linux-[\w-]+)\.so\.\d+")
    assert [library for library in needed if not allowed.fullmatch(library)] == []


def test_simd_levels_are_linked_in_ascending_order():
    """If several objects define an inline function, the linker keeps the first, which must run on every machine."""
    levels = ["portable", "avx2", "avx512", "avx512_bf16", "neon"]
    folders = [item.path.parent.name for item in cpp_build.load_setup().cpu_objects()]
    order = [levels.index(folder) if folder in levels else -1 for folder in folders]
    assert order == sorted(order)


# In the checkout, every test of the Triton kernels imports them too.
@pytest.mark.parametrize("inside", [False, pytest.param(True, marks=FULL)], ids=["elsewhere", "in the checkout"])
def test_triton_kernels_are_importable(inside, tmp_path):
    code = "import peftk.triton_kernels; print(peftk.triton_kernels.__name__)"
    assert run(sys.executable, "-c", code, cwd=ROOT if inside else tmp_path).strip() == "peftk.triton_kernels"


def test_version_is_the_distributions():
    assert peftk.__version__ == importlib.metadata.version("peftk")


def test_every_dependency_is_pinned():
    """requirements/dev.txt covers every extra of pyproject.toml but `engines`, with versions that the extras allow."""
    lines = [line for line in (ROOT / "requirements/dev.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    here = {pin.name: str(pin.specifier) for pin in pins if pin.marker is None or pin.marker.evaluate()}
    assert all(re.fullmatch(r"==[\w.]+", version) for version in here.values())
    extras = [e for e in importlib.metadata.metadata("peftk").get_all("Provides-Extra") if e != "engines"]
    for line in importlib.metadata.requires("peftk"):
        requirement = Requirement(line)
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ["", *extras])
        if wanted and requirement.name != "peftk":
            assert requirement.specifier.contains(here[requirement.name].removeprefix("==")), requirement


@pytest.mark.full
def test_sdist_builds_a_complete_wheel(tmp_path, monkeypatch):
    """sdist → wheel → installation, without the network and away from the checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    # The files of a clone, without the objects that this checkout has built.
    clone = tmp_path / "clone"
    files = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for file in filter(None, files):
        if (ROOT / file).is_file():
            (clone / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, clone / file)
    dist = tmp_path / "dist"
    monkeypatch.setenv("PEFTK_CUDA_ARCHS", "80")  # where nvcc is: one architecture is enough here
    # `build` creates an sdist first, and the wheel from the sdist.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, clone)
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert {"peftk/py.typed", "peftk/__init__.py", f"peftk/_cpu{suffix}"} <= names
    for room, folder in (("peftk", ROOT / "peftk"), ("peftk/triton_kernels", ROOT / "triton_kernels")):
        assert {f"{room}/{path.relative_to(folder)}" for path in folder.rglob("*.py")} <= names
    strays = [name for name in names if not name.startswith(("peftk/", "peftk-"))]
    assert strays == []

    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    code = f"import sys; sys.path.insert(0, {str(target)!r}); import peftk._cpu; print(peftk.__file__)"
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == str(target / "peftk/__init__.py")

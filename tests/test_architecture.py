"""Which folder may import which. The tables below are the architecture; docs/architecture.md explains it."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

# From the top down: a folder or file imports only from those below it, and from itself.
ORDER = (
    "cli",
    "tools",
    "tuning",
    "explanation",
    "serve",
    "models",
    "distributed",
    "checkpoints",
    "interop",
    "methods",
    "nn",
    "functional",
    "ops",
    "backends",
    "launch",
    "reference",
    "adapters",
    "quantized",
    "system",
)
COMPILED = ("_cpu", "_cuda")  # C++ modules, below all others
# The Triton kernels are outside this order.
KERNELS_MAY_IMPORT = ("launch", "reference", "adapters", "system")
MAY_IMPORT_KERNELS = ("backends", "tuning", "tools")


def sources() -> list[Path]:
    folders = (ROOT / "peftk", ROOT / "triton_kernels")
    return sorted(p for folder in folders for p in folder.rglob("*.py") if (folder / "triton_kernels") not in p.parents)


def module_of(path: Path) -> str:
    """`peftk/ops/merge.py` is peftk.ops.merge; the kernels are installed as peftk.triton_kernels."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "triton_kernels":
        parts.insert(0, "peftk")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in sources()} | {f"peftk.{name}" for name in COMPILED}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, *, types: bool = True) -> Iterator[tuple[int, str]]:
    """Line and module of every import of a peftk module, at any level of a file. types: include those for mypy only."""
    tree = tree_of(path)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types and not types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module_of(path.parent / "__init__.py") if node.level else ""  # the kernels' imports are relative
            base = ".".join(part for part in (package, node.module) if part)
            full = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else base for name in full]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "peftk")


def folder_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def allowed(importer: str, target: str) -> bool:
    a, b = folder_of(importer), folder_of(target)
    if a == b or a == "":  # the package's __init__ imports what is public
        return True
    if b == "":
        return a in ("cli", "tools")  # these use the public package
    if b in COMPILED:
        return a in ("backends", "tools", "system")
    if "triton_kernels" in (a, b):
        return b in KERNELS_MAY_IMPORT if a == "triton_kernels" else a in MAY_IMPORT_KERNELS
    return ORDER.index(a) < ORDER.index(b)


def test_every_folder_is_in_the_table():
    assert {folder_of(module) for module in MODULES} - {"", "triton_kernels", *COMPILED} == set(ORDER)


def test_imports_go_down():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for path in sources()
        for line, target in imports(path)
        if not allowed(module_of(path), target)
    ]
    assert wrong == []


def test_no_cycles():
    graph = {module_of(path): {target for _, target in imports(path, types=False)} for path in sources()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"a cycle: {' -> '.join((*above[above.index(module) :], module))}"
        if module not in done:
            for target in graph.get(module, ()):
                if target != module:
                    visit(target, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_import_is_light():
    """`import peftk` loads no tool and no optional package."""
    absent = (
        "torch.distributed.tensor",
        "peftk.distributed",
        "peftk.tools",
        "peftk.cli",
        "transformers",
        "peft",
        "matplotlib",
        "rich",
        "triton",
        "fastapi",
    )
    code = f"import sys, peftk; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Folders of tests/ that have no counterpart in the package.
OF_TESTS = ("bench", "cuda_emulator", "fixtures", "kernels", "support")
KERNELS = {"cpu", "triton", "cuda"}


def folders(path: Path) -> set[str]:
    """The subfolders that contain files other than compiled ones."""
    return {p.name for p in path.iterdir() if any(f.suffix != ".pyc" and f.is_file() for f in p.rglob("*"))}


def test_tests_mirror_the_package():
    assert folders(ROOT / "tests") <= {*ORDER, *OF_TESTS}
    assert folders(ROOT / "tests/kernels") == KERNELS


def test_tests_import_only_support():
    """No test or test helper imports a test. Shared code is in tests/support."""
    wrong = []
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            shared = ("tests.support", "tests.fixtures")
            wrong += [
                f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"
                for name in names
                if name.split(".")[0] == "tests" and not name.startswith(shared)
            ]
    assert wrong == []

"""Who may import whom. The tables below are the architecture, written down; docs/architecture.md explains it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

# From the top down: a folder or file imports only what stands below it, or is its own.
ORDER = (
    "cli",
    "tools",
    "tuning",
    "explanation",
    "models",
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
    "system",
)
COMPILED = ("_cpu", "_cuda")  # below all: C++
# The Triton kernels lie outside of the order.
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


def imported(path: Path, *, types: bool = True) -> Iterator[tuple[int, str]]:
    """Line and module of every import of peftk's own, wherever it stands. types: those for mypy alone, too."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
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


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def allowed(importer: str, target: str) -> bool:
    a, b = room(importer), room(target)
    if a == b or a == "":  # the package's own __init__ names what is public
        return True
    if b == "":
        return a in ("cli", "tools")  # they use what users use
    if b in COMPILED:
        return a in ("backends", "tools", "system")
    if "triton_kernels" in (a, b):
        return b in KERNELS_MAY_IMPORT if a == "triton_kernels" else a in MAY_IMPORT_KERNELS
    return ORDER.index(a) < ORDER.index(b)


def test_every_room_is_in_the_table():
    assert {room(module) for module in MODULES} - {"", "triton_kernels", *COMPILED} == set(ORDER)


def test_imports_go_down():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for path in sources()
        for line, target in imported(path)
        if not allowed(module_of(path), target)
    ]
    assert wrong == []


def test_no_circles():
    graph = {module_of(path): {target for _, target in imported(path, types=False)} for path in sources()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"a circle: {' -> '.join((*above[above.index(module) :], module))}"
        if module not in done:
            for target in graph.get(module, ()):
                if target != module:
                    visit(target, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_import_is_light():
    """`import peftk` loads no tool, and nothing that only some users have."""
    absent = ("peftk.tools", "peftk.cli", "transformers", "peft", "matplotlib", "rich", "triton")
    code = f"import sys, peftk; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Of tests/, beside the package's own rooms.
OF_TESTS = ("bench", "cuda_emulator", "fixtures", "kernels", "support")
KERNELS = {"cpu", "triton", "cuda"}


def folders(path: Path) -> set[str]:
    """Those with files of ours."""
    return {p.name for p in path.iterdir() if any(f.suffix != ".pyc" and f.is_file() for f in p.rglob("*"))}


def test_tests_mirror_the_package():
    assert folders(ROOT / "tests") <= {*ORDER, *OF_TESTS}
    assert folders(ROOT / "tests/kernels") == KERNELS


def test_tests_share_by_support_alone():
    """No test, and no helper of tests, imports a test. What several need is in tests/support, for itself."""
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

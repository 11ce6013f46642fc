"""Every registered backend implements `peftk.backends.contract`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peftk.backends import registry
from peftk.backends.call import OPS, BackendError, Call, Kind, Op, call_of
from peftk.backends.contract import About, Backend, Backward, Direct, DirectMulti, Forward, Merge, MergeLayers, Sort
from tests.support.calls import call
from tests.support.paths import ROOT

PARTS = {
    "about": About,
    "forward": Forward,
    "backward": Backward,
    "direct": Direct,
    "direct_multi": DirectMulti,
    "merge": Merge,
    "merge_layers": MergeLayers,
    "sort": Sort,
}
# The part of a backend that runs an operation; forward or backward for the others.
PART_OF: dict[Kind, str] = {"merge": "merge", "unmerge": "merge", "segments": "sort"}


def backend(name: str) -> Backend:
    try:
        return registry.backend(name)
    except BackendError as error:
        pytest.skip(str(error))


def functions(contract: type) -> dict[str, Callable[..., object]]:
    return {name: value for name, value in vars(contract).items() if inspect.isfunction(value) and name[0] != "_"}


def parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    return [p.replace(annotation=p.empty) for n, p in inspect.signature(function).parameters.items() if n != "self"]


@pytest.mark.parametrize("name", registry.NAMES)
def test_every_backend_has_the_functions_of_its_parts(name: str) -> None:
    """With the contract's parameters in its order. Additional parameters come last, keyword-only and optional."""
    found = backend(name)
    for part, contract in PARTS.items():
        module = getattr(found, part)
        for function, wanted in functions(contract).items() if module is not None else ():
            has, own = parameters(getattr(module, function)), parameters(wanted)
            assert has[: len(own)] == own, (part, function)
            for extra in has[len(own) :]:
                assert extra.kind == extra.KEYWORD_ONLY, (part, function)
                assert extra.default is not extra.empty, (part, function)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", registry.NAMES)
def test_a_backend_that_runs_an_operation_has_its_part(name: str, device: str) -> None:
    found = backend(name)
    for op in OPS:
        one = call(op, device=device, dtype=torch.bfloat16)
        if found.about.cannot_run(one) is None:
            part = PART_OF.get(op.kind, "backward" if op.backward else "forward")
            assert getattr(found, part) is not None, op
            assert found.about.describe(one), op
        else:
            assert len(str(found.about.cannot_run(one))) > 5


def test_every_file_of_a_backend_is_registered() -> None:
    folder = ROOT / "peftk/backends"
    found = {
        path.stem
        for path in folder.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "backend" and path.stem != "registry"
    }
    assert found == set(registry.NAMES)


def test_no_backend_is_probed_for_attributes() -> None:
    """Its `Backend` says which parts it has."""
    for path in [*(ROOT / "peftk/backends").glob("*.py"), *(ROOT / "peftk/ops").glob("*.py")]:
        assert not re.search(r"\b(hasattr|getattr)\(", path.read_text()), path


@pytest.mark.parametrize("op", OPS, ids=str)
def test_names_of_operations(op: Op) -> None:
    assert Op.parse(str(op)) == op


def test_an_unknown_operation() -> None:
    with pytest.raises(ValueError, match=r"op: expected one of lora_linear, .*segments, got 'matmul'"):
        Op.parse("matmul")
    with pytest.raises(ValueError, match="got 'merge_backward'"):
        Op.parse(str(Op("merge", backward=True)))


def test_a_call_is_keyword_only_and_frozen() -> None:
    one = call()
    form = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    assert call_of(**form) == one
    assert call_of(**form) is call_of(**form)
    assert hash(call_of(**form)) == hash(one)
    with pytest.raises(TypeError, match="positional"):
        Call(*form.values())  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.M = 5  # type: ignore[misc]


BROKEN = """
from __future__ import annotations

from torch import Tensor

from peftk.adapters.adapter import Adapter
from peftk.adapters.dropout import Dropout
from peftk.backends import reference
from peftk.backends.contract import Backend


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter | None, *, dropout: Dropout | None = None
) -> Tensor: ...


multi_lora_linear = reference.multi_lora_linear
"""


@pytest.mark.full
def test_mypy_checks_the_signatures_of_a_backend(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(f"{BROKEN}\nimport broken\n\nBackend(reference, forward=broken)\n")
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", str(tmp_path / "broken.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert 'Argument "forward" to "Backend" has incompatible type Module' in done.stdout, done.stdout + done.stderr

"""A pytest plugin that runs HF PEFT's own tests on accelerated layers.

    cd <checkout of peft>; PYTHONPATH=<peftk>:<peftk>/tests pytest -p peft_suite tests/test_custom_models.py -k lora

Every LoRA layer is accelerated when PEFT creates it, however the test creates it. The summary begins with the number of
layer calls that peftk's kernels computed, so that a run without any does not look like a success. With
PEFTK_PEFT_SUITE=original nothing is accelerated: the same tests on the original, for comparison. `docs/accelerate.md`
says how to get PEFT's tests, and has the results.
"""

from __future__ import annotations

import collections
import os
from typing import Any

import pytest
from peft.tuners.lora.model import LoraModel as PeftLoraModel

from peftk.interop import peft_layers, peft_merge

COUNTS: collections.Counter[str] = collections.Counter()


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PEFTK_PEFT_SUITE") == "original":
        return
    _accelerate_what_is_made()
    _count()


def _accelerate_what_is_made() -> None:
    """Accelerates layers as PEFT creates them, and the model: get_peft_model, from_pretrained, inject, add_adapter."""
    create, init = PeftLoraModel._create_new_module, PeftLoraModel.__init__

    def create_new_module(*args: Any, **kwargs: Any) -> Any:
        module = create(*args, **kwargs)
        peft_layers.swap(module)
        return module

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self) is PeftLoraModel:
            self.__class__ = peft_layers.LoraModel

    PeftLoraModel._create_new_module = staticmethod(create_new_module)
    PeftLoraModel.__init__ = made


def _count() -> None:
    """Counts the calls that peftk's kernels computed, and those that went to PEFT's own code."""
    served, merge, unmerge = peft_layers.Linear._forward_by_kernels, peft_merge.merge, peft_merge.unmerge

    def counted_served(self: Any, x: Any, batch: Any) -> Any:
        y = served(self, x, batch)
        kind = "mixed" if batch is not None else "forward"
        COUNTS[f"{kind}, peftk" if y is not None else f"{kind}, PEFT's own"] += 1
        return y

    def counted_merge(*args: Any, **kwargs: Any) -> None:
        merge(*args, **kwargs)
        COUNTS["merge, peftk"] += 1

    def counted_unmerge(*args: Any, **kwargs: Any) -> None:
        unmerge(*args, **kwargs)
        COUNTS["unmerge, peftk"] += 1

    peft_layers.Linear._forward_by_kernels = counted_served  # type: ignore[method-assign]
    peft_merge.merge, peft_merge.unmerge = counted_merge, counted_unmerge


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("accelerated layers")
    for what, count in sorted(COUNTS.items()) or [("none", 0)]:
        terminalreporter.line(f"{what}: {count}")

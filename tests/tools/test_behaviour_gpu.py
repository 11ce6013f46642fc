"""The behaviour checks of `peftk selftest` on a GPU: CUDA graphs, streams, syncs, launches, torch.compile."""

from __future__ import annotations

import pytest
import torch

from peftk.tools.selftest import behaviour, target
from peftk.tools.selftest.check import Check, NotRunError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def checks() -> list[Check]:
    cuda = target("cuda")
    return list(behaviour.checks(cuda, behaviour.tools(cuda)))


@pytest.mark.parametrize("check", checks(), ids=str)
def test_behaviour(check: Check) -> None:
    try:
        check.run()
    except NotRunError as reason:
        pytest.skip(str(reason))

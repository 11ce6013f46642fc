"""How the CPU kernels cut the product: no blocking changes a bit, and what `peftk tune` finds is used later."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from peftk import _cpu
from peftk.backends import blocking, cpu, made_on
from peftk.backends.blocking import SHIPPED, Blocking
from peftk.backends.determinism import deterministic

SMALLEST = Blocking(rows=16, l2_rows=16, steps=256, blocks=1)
OTHERS = (SMALLEST, Blocking(rows=1024, l2_rows=4096, steps=4096, blocks=8), SHIPPED._replace(steps=512, blocks=2))


@pytest.fixture(autouse=True)
def _shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PEFTK_CACHE_DIR", str(tmp_path / "cache"))
    before = blocking.in_use()
    yield
    blocking.use(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("invariant", [False, True], ids=["", "batch-invariant"])
def test_no_blocking_changes_a_bit(dtype: torch.dtype, invariant: bool) -> None:
    torch.manual_seed(0)
    for level in cpu.simd_levels():
        before = cpu.simd_level()
        _cpu.use_simd_level(level)
        try:
            for M, N, K in ((14, 70, 600), (33, 50, 1300), (48, 300, 96), (130, 90, 2100), (600, 40, 520)):
                x, weight = torch.randn(M, K).to(dtype), torch.randn(N, K).mul(K**-0.5).to(dtype)
                for W in (weight, weight.t().contiguous().t()):  # rows of W along K, and along N as dX reads them
                    results = []
                    for chosen in (SHIPPED, *OTHERS):
                        blocking.use(chosen)
                        with deterministic(batch_invariant=invariant):
                            results.append(cpu.lora_linear(x, W, None, None)[0])
                    for chosen, result in zip(OTHERS, results[1:], strict=True):
                        assert torch.equal(result, results[0]), (level, M, N, K, chosen)
        finally:
            _cpu.use_simd_level(before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": 100}, "rows: expected a multiple of 16 from 16 to 4096, got 100"),
        ({"l2_rows": 0}, "l2_rows: expected a multiple of 16 from 16 to 4096, got 0"),
        ({"steps": 128}, "steps: expected a multiple of 256 from 256 to 4096, got 128"),
        ({"blocks": 9}, "blocks: expected a multiple of 1 from 1 to 8, got 9"),
    ],
)
def test_values_outside_the_limits_are_refused(values: dict[str, int], message: str) -> None:
    before = blocking.in_use()
    with pytest.raises(ValueError, match=message):
        blocking.use(SHIPPED._replace(**values))
    assert blocking.in_use() == before


def test_what_was_found_is_used_until_it_is_forgotten() -> None:
    found = SHIPPED._replace(rows=256)
    blocking.save(found)
    assert blocking.in_use() == SHIPPED
    blocking.use_found()
    assert blocking.in_use() == found
    assert blocking.delete()
    assert not blocking.delete()
    assert blocking.in_use() == SHIPPED


@pytest.mark.parametrize("values", [{"rows": 100}, {"rows": "many"}, {}, None])
def test_a_broken_entry_is_ignored_with_a_warning(tmp_path: Path, values: object) -> None:
    blocking.save(SHIPPED._replace(rows=256))
    file = tmp_path / "cache" / "blocking.json"
    entries = json.loads(file.read_text())
    entries[made_on.machine("cpu")]["blocking"] = values if not values else {**SHIPPED._asdict(), **values}
    file.write_text(json.dumps(entries))
    with pytest.warns(UserWarning, match="blocking.json: expected what `peftk tune` writes"):
        blocking.use_found()
    assert blocking.in_use() == SHIPPED

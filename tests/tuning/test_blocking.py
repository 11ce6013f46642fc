"""The search for a blocking: it keeps what is clearly faster, in bounded time, and loses nothing when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from peftk import cli
from peftk.backends import blocking as in_backend
from peftk.backends.blocking import SHIPPED, Blocking
from peftk.tuning import blocking, tune


@pytest.fixture(autouse=True)
def _shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PEFTK_CACHE_DIR", str(tmp_path))
    before = in_backend.in_use()
    yield
    in_backend.use(before)


def _speeds(monkeypatch: pytest.MonkeyPatch, speed: dict[str, dict[int, float]]) -> list[Blocking]:
    """Makes the search believe these speeds of single values, and returns the list of what it tries."""
    tried = []

    def of(one: Blocking) -> float:
        return speed.get("rows", {}).get(one.rows, 1.0) * speed.get("blocks", {}).get(one.blocks, 1.0)

    def gain(candidate: Blocking, best: Blocking, *_: object) -> float:
        tried.append(candidate)
        return of(candidate) / of(best)

    monkeypatch.setattr(blocking, "_gain", gain)
    return tried


def test_values_that_gain_are_kept_together(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = _speeds(monkeypatch, {"rows": {256: 1.1, 1024: 1.02}, "blocks": {2: 1.05, 4: 0.5}})
    found = blocking.search()
    assert found.best == SHIPPED._replace(rows=256, blocks=2)
    assert found.gain == pytest.approx(1.1 * 1.05)
    assert found.compared == len(tried) <= 12
    assert in_backend.in_use() == found.best
    in_backend.use(SHIPPED)
    in_backend.use_found()
    assert in_backend.in_use() == found.best


def test_noise_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _speeds(monkeypatch, {"rows": {256: 1.02}, "blocks": {2: 1.02}})
    assert blocking.search()[:2] == (SHIPPED, 1.0)


def test_it_ends_in_time() -> None:
    assert blocking.search(seconds=0.0).compared == 0


def test_a_real_comparison_and_a_failed_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(blocking, "DIM", 64)
    monkeypatch.setattr(blocking, "CHOICES", {"rows": (16, SHIPPED.rows)})
    assert blocking.search(seconds=1.0).compared == 1
    before = SHIPPED._replace(rows=64)
    in_backend.use(before)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFTK_CACHE_DIR", str(tmp_path / "file" / "folder"))
    with pytest.raises(OSError, match="folder"):
        blocking.search(seconds=1.0)
    assert in_backend.in_use() == before


def test_command(monkeypatch: pytest.MonkeyPatch) -> None:
    _speeds(monkeypatch, {"rows": {256: 1.25}})
    monkeypatch.setattr(tune, "TOKENS", ())
    done = CliRunner().invoke(cli.main, ["tune"])
    assert done.exit_code == 0, done.output
    assert "Blocking: rows 256, l2_rows" in done.output
    assert "1.25 ×" in done.output
    assert "Forgotten" in CliRunner().invoke(cli.main, ["tune", "--forget"]).output
    assert in_backend.in_use() == SHIPPED

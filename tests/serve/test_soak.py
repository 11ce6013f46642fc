"""A server for minutes under everything that may happen: no request is lost or wrong, and memory does not grow."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("transformers", "5.24", reason="the engine is for transformers 5.24")

from tests.support.soak import Contents, Soak

SECONDS = float(os.environ.get("PEFTK_SOAK_SECONDS", "600"))


def soaked(folder, adapters, seconds, most_mb):
    (folder / "contents").mkdir()
    contents = Contents(folder / "contents", adapters)
    report = Soak(folder, contents, seconds=seconds, bank_slots=32, seed=0).run()
    print(f"\n{report.asked} requests: {dict(report.outcomes)}\n{dict(report.actions)}\n{report.stats}")
    print(f"resident: {report.resident_mb[0]:.0f} … {report.resident_mb[-1]:.0f} MB, growth {report.growth_mb:.1f} MB")
    assert not report.wrong, report.wrong[:10]
    assert report.outcomes["length"] > 0.3 * report.asked
    assert {"cancelled", "timeout", "failed: CheckpointError", "queue full"} <= report.outcomes.keys()
    assert report.growth_mb < most_mb


@pytest.mark.full
def test_twenty_seconds_with_60_adapters(tmp_path):
    soaked(tmp_path, adapters=60, seconds=20, most_mb=60)


@pytest.mark.engines
def test_ten_minutes_with_500_adapters(tmp_path):
    soaked(tmp_path, adapters=500, seconds=SECONDS, most_mb=30)

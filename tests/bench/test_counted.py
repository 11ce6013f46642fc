"""`python -m bench.counted`: the closed forms, the models of other libraries, and the tables. Nothing is timed."""

from __future__ import annotations

import csv
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench.counted import peers, report, run
from bench.counted.__main__ import main
from bench.counted.batch import Batch, of_ids, one_adapter
from bench.counted.work import H100, Launch, Traffic, hbm_bytes
from peftk.triton_kernels import waves
from tests.support.paths import ROOT


@functools.cache
def counted() -> list[run.Counted]:
    return run.count(run.Options())


def rows(side: str, op: str = "forward") -> list[run.Row]:
    return [row for linear in counted() if linear.op == op for row in linear.rows() if row.side == side]


def test_counting_needs_no_triton() -> None:
    code = "import sys; from bench.counted import run; run.count(run.Options(tokens=(3,))); "
    subprocess.run([sys.executable, "-c", code + "assert 'triton' not in sys.modules"], cwd=ROOT, check=True)


def test_gaps_between_launches() -> None:
    """Before each but the first, and not where the launch before it still runs."""
    first, second, third = (Launch("", {}, waves_us=us, overlapped=us == 2.0) for us in (1.0, 2.0, 4.0))
    assert H100.total_us([first], [0]) == 1.0
    assert H100.total_us([first, second], [0, 0]) == 3.0
    assert H100.total_us([first, second, third], [0, 0, 0]) == 7.0 + waves.GAP_US


def test_the_targets_of_the_forward() -> None:
    """One launch, and at most 2 % more bytes than the minimum, even if sums are split over blocks.

    Or two that overlap, which read x twice, for many ranks.
    """
    assert len(rows("peftk")) == 2 * 5 * (3 + 4 + 4)
    for row in rows("peftk"):
        overlapped = row.rank in ("64", "mixed") and row.M >= 512
        assert row.launches in ((1, 2) if overlapped else (1,))
        assert 1.0 <= row.over_compulsory <= (1.02 if row.launches == 1 else 1.4)


def test_the_targets_of_the_backward() -> None:
    assert len(rows("peftk", "backward")) == 2 * 2 * (3 + 4 + 4)
    for row in rows("peftk", "backward"):
        assert row.launches in ((2, 3) if row.rank in ("64", "mixed") else (2,))
    assert all(linear.on_target for linear in counted())


@pytest.mark.parametrize(
    ("side", "launches"), [("vLLM", 4), ("SGLang", 3), ("Punica SGMV", 5), ("Punica BGMV", 4), ("LoRAFusion", 2)]
)
def test_launches_of_the_peers(side: str, launches: int) -> None:
    assert {row.launches for row in rows(side)} == {launches}


def test_launches_of_peft() -> None:
    assert {(min(row.adapters, row.M), row.launches) for row in rows("HF PEFT")} == {
        (1, 5 if adapters == 1 else 8) for adapters in (1, 8)
    } | {(n, 1 + 7 * n) for n in (8, 16, 64)}
    assert {row.launches for row in rows("HF PEFT", "backward")} == {7}


def test_no_side_moves_less_than_the_minimum() -> None:
    """If L2 keeps everything between launches, intermediates cost nothing; only padded ranks remain."""
    for row in [row for linear in counted() for row in linear.rows()]:
        assert row.compulsory_bytes <= row.kept_bytes <= row.distinct_bytes <= row.requested_bytes, row
        assert row.flops <= row.executed_flops * 1.001, row
        assert 0 < row.modelled_us_kept <= row.modelled_us, row
        if row.op == "forward" and row.side in ("SGLang", "HF PEFT", "LoRAFusion"):
            assert row.kept_bytes == row.compulsory_bytes, row


def test_vllm_by_hand() -> None:
    """M = 2 rows of two adapters of ranks 16 and 8, K = 256, N = 128, bf16: one split of K, everything padded to 16."""
    base, zero, shrink, expand = peers.vllm(of_ids(256, 128, (16, 8), (1, 0)))
    assert dict(base.tensors) == {
        "x": Traffic(2 * 2 * 256 * 2, 0, 2 * 256 * 2, 0),  # 128 columns are two tiles of 64
        "weight": Traffic(256 * 128 * 2, 0, 256 * 128 * 2, 0),
        "y": Traffic(0, 2 * 128 * 2, 0, 2 * 128 * 2),
    }
    assert dict(zero.tensors) == {"v": Traffic(0, 2 * 16 * 4, 0, 2 * 16 * 4)}
    assert shrink.tensors["x"] == Traffic(2 * 32 * 256 * 2, 0, 2 * 256 * 2, 0)  # a row wraps around a block of 32
    assert shrink.tensors["lora_A[1]"] == Traffic(16 * 256 * 2, 0, 16 * 256 * 2, 0)  # rank 8, padded
    assert shrink.tensors["v"] == Traffic(128, 128, 128, 128)  # atomic additions
    assert shrink.flops == 2 * 2 * 32 * 16 * 256
    assert expand.tensors["y"] == Traffic(512, 512, 512, 512)
    assert expand.tensors["lora_B[1]"].distinct == 16 * 128 * 2


def test_sglang_reads_no_padded_ranks() -> None:
    _, shrink, expand = peers.sglang(of_ids(256, 128, (16, 8), (0,) * 20 + (1,)))
    assert shrink.tensors["lora_A[0]"] == Traffic(2 * 16 * 256 * 2, 0, 16 * 256 * 2, 0)  # 20 rows are two chunks
    assert shrink.tensors["lora_A[1]"] == Traffic(8 * 256 * 2, 0, 8 * 256 * 2, 0)
    assert expand.tensors["y"].distinct == 2 * 21 * 128 * 2


def test_rows_of_the_base_layer_cost_no_adapter() -> None:
    batch = Batch(8, 256, 128, (16, 16), (0, 0))
    assert [len(model(batch)) for model in (peers.vllm, peers.peft)] == [1, 1]
    ours = run.forward(batch, "16")
    assert "lora_A" not in ours.compulsory or ours.compulsory["lora_A"] == 0
    assert all(launch.tensors.get("lora_A", Traffic()).read == 0 for launch in ours.sides["peftk"])


def test_hbm_bytes() -> None:
    first = Launch("a", {"x": Traffic(10, 0, 10, 0), "v": Traffic(0, 8, 0, 8), "y": Traffic(0, 100, 0, 100)})
    second = Launch("b", {"v": Traffic(8, 0, 8, 0), "x": Traffic(30, 0, 15, 0), "y": Traffic(50, 50, 50, 50)})
    assert hbm_bytes([first, second], l2_keeps_all=False) == [118, 8 + 15 + 100]
    assert hbm_bytes([first, second], l2_keeps_all=True) == [10, 5 + 100]


def test_the_roofline_is_the_slower_of_memory_and_products() -> None:
    assert H100.us(Launch("", {}), 3_350_000) == pytest.approx(1.0)
    assert H100.us(Launch("", {}, flops=2 * 989_500_000), 3_350_000) == pytest.approx(2.0)
    assert H100.us(Launch("", {}, vector_flops=67_000_000), 0) == pytest.approx(1.0)


def test_a_batch_in_blocks() -> None:
    batch = of_ids(8, 8, (4, 5, 6), (2, 0, -1, 2, 0, 2, 2))
    assert [[(s.id, s.start, s.rows) for s in block] for block in batch.blocks(4)] == [
        [(-1, 0, 1), (0, 1, 2), (2, 3, 1)],
        [(2, 4, 3)],
    ]
    assert (batch.used_ranks, batch.rank_rows, batch.z_width) == (10, 2 * 4 + 4 * 6, 16)
    assert one_adapter(3, 8, 8, 5, dtype=torch.float32).blocks(2).__next__()[0].rows == 2


def test_command(tmp_path: Path) -> None:
    files = {kind: tmp_path / "made" / f"counted.{kind}" for kind in ("json", "csv", "markdown")}
    options = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    result = CliRunner().invoke(main, ["--tokens", "1,4096", "--dims", "4096x14336", "--ranks", "8,64", *options])
    assert result.exit_code == 0, result.output
    assert "modelled" in result.output
    assert "measured: nothing ran" in result.output
    shown = result.output.split("Written:")[0]
    assert [line for line in shown.splitlines() if len(line) > 100] == []
    written = json.loads(files["json"].read_text())
    records = written["records"]
    assert {record["side"] for record in records} == {"peftk", *peers.FORWARD}
    assert {record["op"] for record in records} == {"forward", "backward"}
    assert written["sources"].keys() == peers.SOURCES.keys() == peers.FORWARD.keys()
    launch = written["launches"][0]["sides"]["peftk"][0]
    assert {"x", "weight", "lora_A", "lora_B", "y", "z"} <= launch["tensors"].keys()
    with files["csv"].open() as stream:
        assert len(list(csv.DictReader(stream))) == len(records)
    text = files["markdown"].read_text()
    assert "modelled" in text
    assert all(source.repository in text for source in peers.SOURCES.values())


def test_every_shape_can_be_counted() -> None:
    for M, K, N, n, rank in [(1, 17, 33, 1, 1), (5, 64, 48, 3, 200), (300, 768, 100, 2, 5)]:
        options = run.Options(((K, N),), (M,), (n,), (rank,))
        assert report.markdown(run.count(options))

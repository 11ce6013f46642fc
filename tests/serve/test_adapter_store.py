"""AdapterStore: three tiers, pins, replacement under use, failures."""

from __future__ import annotations

import os
import pathlib
import shutil
import threading
import time

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="the engine is for transformers 5.24")

from peftk.checkpoints import files
from peftk.checkpoints.files import CheckpointError
from peftk.serve import AdapterStore
from tests.support import served_llama


@pytest.fixture
def made():
    """Makes stores, and closes them."""
    stores = []

    def make(*args, **options):
        stores.append(AdapterStore(served_llama.model(), *args, **options))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def logits(store: AdapterStore, lease, ids=(5, 6, 7)) -> torch.Tensor:
    """What the model computes with the adapter of a lease."""
    with store.server.route(torch.tensor([lease.number])), torch.no_grad():
        return store.server.model(torch.tensor([ids])).logits


def expected(path: pathlib.Path, ids=(5, 6, 7)) -> torch.Tensor:
    with torch.no_grad():
        return served_llama._alone(path)(torch.tensor([ids])).logits


def test_an_adapter_is_served_from_disk_memory_and_bank(made, folder):
    store = made(folder, bank_slots=2)
    assert store.names == ["a0", "a1", "a2", "a3", "a4"]
    for name in ("a0", "a1", "a2", "a0", "a0"):
        with store.pin(name) as lease:
            torch.testing.assert_close(logits(store, lease), expected(folder / name))
    stats = store.stats()
    assert (stats.hits, stats.loads, stats.reads, stats.evictions) == (1, 4, 3, 2)
    assert (stats.registered, stats.resident, stats.pinned) == (5, 2, 0)
    assert 0 < stats.load_p50_ms <= stats.load_p99_ms


def test_ten_thousand_names_are_registered_without_reading_them(made, folder, tmp_path):
    (tmp_path / "adapter_config.json").write_text("not read")
    (tmp_path / "adapter_model.safetensors").write_text("not read")
    store = made(folder, bank_slots=256)
    begin = time.process_time()
    for number in range(10_000):
        store.add(f"name{number}", tmp_path)
    assert time.process_time() - begin < 2
    assert store.stats().registered == 10_005
    assert store.stats().reads == 0
    with pytest.raises(CheckpointError, match="JSON"):
        store.pin("name77")
    with store.pin("a1") as lease:
        torch.testing.assert_close(logits(store, lease), expected(folder / "a1"))


def test_256_adapters_are_in_the_bank_at_once(made, folder):
    store = made(bank_slots=256)
    tensors = {}
    for number in range(300):  # each a content of its own
        path = folder.parent / f"many{number % 5}-{number}"
        if not path.exists():
            shutil.copytree(folder / f"a{number % 5}", path)
            (path / "adapter_config.json").write_text((path / "adapter_config.json").read_text() + " " * number)
        store.add(f"n{number}", path)
        tensors[f"n{number}"] = path
    leases = {name: store.pin(name) for name in list(tensors)[:256]}
    assert store.stats().pinned == 256
    for name in ("n0", "n255", "n128", "n3"):
        torch.testing.assert_close(logits(store, leases[name]), expected(folder / f"a{int(name[1:]) % 5}"))
    with pytest.raises(TimeoutError):
        store.pin("n299", timeout=0.05)
    leases.pop("n7").release()
    with store.pin("n299") as lease:
        torch.testing.assert_close(logits(store, lease), expected(folder / "a4"))
    assert store.stats().evictions == 1
    torch.testing.assert_close(logits(store, leases["n255"]), expected(folder / "a0"))


def test_what_is_pinned_stays_and_the_least_recently_used_leaves(made, folder):
    store = made(folder, bank_slots=3)
    pinned = store.pin("a0")
    for name in ("a1", "a2", "a1", "a3"):  # a2 leaves
        store.pin(name).release()
    reads = store.stats().loads
    store.pin("a1").release()
    assert store.stats().loads == reads
    store.pin("a2").release()
    assert store.stats().loads == reads + 1
    torch.testing.assert_close(logits(store, pinned), expected(folder / "a0"))


def test_a_full_bank_waits_for_a_release(made, folder):
    store = made(folder, bank_slots=1)
    first = store.pin("a0")
    threading.Timer(0.1, first.release).start()
    with store.pin("a1", timeout=10) as second:
        torch.testing.assert_close(logits(store, second), expected(folder / "a1"))


def test_a_slot_that_a_route_still_reads_is_not_given_away(made, folder):
    store = made(folder, bank_slots=1)
    lease = store.pin("a0")
    with store.server.route(torch.tensor([lease.number])), torch.no_grad():
        lease.release()
        waiting = store.lease("a1")
        waiting.loaded.result(10)
        assert not waiting.pin()
        out = store.server.model(torch.tensor([[5, 6, 7]])).logits
        torch.testing.assert_close(out, expected(folder / "a0"))
    assert waiting.pin()
    waiting.release()


def test_the_budgets_in_bytes_hold(made, folder):
    store = made(folder)
    sizes = {}
    for name in store.names:
        before = store.stats().bank_bytes
        store.pin(name).release()
        sizes[name] = store.stats().bank_bytes - before
    small = made(folder, bank_bytes=sizes["a1"] + sizes["a2"], host_bytes=sizes["a0"] + 1)
    for name in ("a1", "a2", "a0", "a1"):
        small.pin(name).release()
        assert small.stats().bank_bytes <= sizes["a1"] + sizes["a2"]
    assert small.stats().host_evictions > 0
    with pytest.raises(CheckpointError, match="bank_bytes"):
        made(folder, bank_bytes=sizes["a0"] - 1).pin("a0")


def test_requests_for_one_adapter_share_a_read(made, folder, monkeypatch):
    store = made(folder)
    begun, go = threading.Event(), threading.Event()
    prepare = store.server.prepare

    def slow(path):
        begun.set()
        assert go.wait(10)
        return prepare(path)

    monkeypatch.setattr(store.server, "prepare", slow)
    leases = [store.lease("a0") for _ in range(5)]
    assert begun.wait(10)
    leases += [store.lease("a0") for _ in range(5)]
    assert not leases[0].pin()
    go.set()
    for lease in leases:
        lease.loaded.result(10)
        assert lease.pin()
    stats = store.stats()
    assert (stats.reads, stats.loads, stats.hits, stats.pinned) == (1, 1, 9, 1)
    assert len({lease.number for lease in leases}) == 1


def test_equal_contents_share_a_place(made, folder, tmp_path):
    store = made(folder)
    store.add("copy", shutil.copytree(folder / "a2", tmp_path / "copy"))
    with store.pin("a2") as one, store.pin("copy") as two:
        assert one.number == two.number
        assert one.digest == two.digest
    assert store.stats().loads == 1


def test_a_replaced_name_is_new_for_new_leases_only(made, folder):
    store = made()
    store.add("alice", folder / "a0")
    old = store.pin("alice")
    store.add("alice", folder / "a1")
    with store.pin("alice") as new:
        torch.testing.assert_close(logits(store, new), expected(folder / "a1"))
        torch.testing.assert_close(logits(store, old), expected(folder / "a0"))
    old.release()


def test_a_lease_that_waits_keeps_its_version(made, folder):
    store = made(bank_slots=1)
    store.add("alice", folder / "a0")
    store.add("bob", folder / "a2")
    with store.pin("bob"):
        waiting = store.lease("alice")
        waiting.loaded.result(10)
        store.add("alice", folder / "a1")
    assert waiting.pin()
    torch.testing.assert_close(logits(store, waiting), expected(folder / "a0"))


def test_files_that_changed_in_place_are_read_anew(made, folder, tmp_path):
    path = shutil.copytree(folder / "a0", tmp_path / "alice")
    store = made(tmp_path)
    old = store.pin("alice")
    served_llama.write_adapter(path, 16, 2, served_llama.EVERY_LINEAR[2:])
    with store.pin("alice") as new:
        assert new.digest != old.digest
        torch.testing.assert_close(logits(store, new), expected(folder / "a2"))
        torch.testing.assert_close(logits(store, old), expected(folder / "a0"))


def test_a_pinned_lease_keeps_its_digest_when_its_files_change_while_they_are_read_again(made, folder, tmp_path):
    path = shutil.copytree(folder / "a0", tmp_path / "alice")
    store = made(bank_slots=1, host_bytes=1)
    for name, where in (("alice", path), ("twin", folder / "a0"), ("other", folder / "a1")):
        store.add(name, where)
    with store.pin("alice") as first:
        digest = first.digest
    twin = store.lease("twin")
    twin.loaded.result(10)
    store.pin("other").release()  # bank and host memory have only this one now
    go, real = threading.Event(), store._content
    store._content = lambda version: go.wait(20) and real(version)
    again = store.lease("alice")  # is read again
    assert twin.pin()
    pinned = store.lease("alice")
    assert pinned.pin()  # by its twin's place
    served_llama.write_adapter(path, 16, 2)
    go.set()
    again.loaded.result(20)
    assert again.digest != digest == pinned.digest
    pinned.release()
    twin.release()
    assert store.stats().pinned == 0


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty", "config"])
def test_a_damaged_checkpoint_fails_who_asked_and_can_be_repaired(made, folder, tmp_path, damage):
    path = shutil.copytree(folder / "a0", tmp_path / "alice")
    store = made(folder)
    store.add("alice", path)
    weights = path / "adapter_model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "config":
        (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 1}')
    else:
        os.truncate(weights, 0 if damage == "empty" else weights.stat().st_size // 2)
    with store.pin("a1") as other:
        for _ in range(2):
            with pytest.raises(CheckpointError):
                store.pin("alice")
        torch.testing.assert_close(logits(store, other), expected(folder / "a1"))
    assert store.stats().failures == 2
    shutil.copytree(folder / "a0", path, dirs_exist_ok=True)
    with store.pin("alice") as lease:
        torch.testing.assert_close(logits(store, lease), expected(folder / "a0"))


def test_a_file_that_is_truncated_while_it_is_read_fails_who_asked(made, folder, tmp_path, monkeypatch):
    """If it was mapped, the next look at its tensors would end the process."""
    path = shutil.copytree(folder / "a0", tmp_path / "alice")
    store, read = made(tmp_path), files.read_weights

    def read_and_truncate(*args, **kwargs):
        tensors = read(*args, **kwargs)
        os.truncate(path / "adapter_model.safetensors", 0)
        return tensors

    monkeypatch.setattr(files, "read_weights", read_and_truncate)
    with pytest.raises(CheckpointError):
        store.pin("alice")
    monkeypatch.undo()
    shutil.copytree(folder / "a0", path, dirs_exist_ok=True)
    with store.pin("alice") as lease:
        os.truncate(path / "adapter_model.safetensors", 0)
        torch.testing.assert_close(logits(store, lease), expected(folder / "a0"))


def test_remove_waits_for_requests(made, folder):
    store = made(folder)
    lease = store.pin("a0")
    with pytest.raises(TimeoutError, match="1 left"):
        store.remove("a0", timeout=0.05)
    with pytest.raises(ValueError, match="registered"):
        store.lease("a0")
    torch.testing.assert_close(logits(store, lease), expected(folder / "a0"))
    lease.release()
    second = store.pin("a1")
    threading.Timer(0.1, second.release).start()
    store.remove("a1", timeout=10)
    assert store.stats().resident == 1  # a0, which nobody waited for
    with pytest.raises(ValueError, match="registered"):
        store.remove("a1")


def test_remove_can_cancel_requests(made, folder):
    store = made(folder)
    cancelled = []
    lease = store.lease("a0", on_cancel=lambda: (cancelled.append(1), lease.release()))
    store.remove("a0", cancel=True, timeout=10)
    assert cancelled == [1]


def test_scan_finds_new_folders_and_forgets_old_ones(made, folder, tmp_path):
    shutil.copytree(folder / "a0", tmp_path / "one")
    (tmp_path / "no checkpoint").mkdir()
    store = made(tmp_path)
    store.add("two", folder / "a1")
    assert store.names == ["one", "two"]
    os.rename(tmp_path / "one", tmp_path / "three")
    store.scan()
    assert store.names == ["three", "two"]


@pytest.mark.parametrize("name", ["../a0", "a0/", "/etc", "a0/../a1", "", "a0\n", None, 3])
def test_a_name_is_never_a_path(made, folder, name):
    store = made(folder)
    with pytest.raises(ValueError, match="registered"):
        store.lease(name)


def test_bad_arguments_are_refused(made, folder, tmp_path):
    store = made(folder)
    with pytest.raises(CheckpointError, match="adapter_config"):
        store.add("alice", tmp_path)
    with pytest.raises(TypeError, match="name"):
        store.add("", folder / "a0")
    with pytest.raises(ValueError, match="folder"):
        made(tmp_path / "none")
    with pytest.raises(ValueError, match="host_bytes"):
        made(folder, host_bytes=0)
    lease = store.pin("a0")
    lease.release()
    lease.release()
    with pytest.raises(RuntimeError, match="released"):
        lease.pin()
    store.close()
    with pytest.raises(RuntimeError, match="closed"):
        store.lease("a0")

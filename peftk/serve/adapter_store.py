"""AdapterStore: the adapters of one model, in three tiers: on disk, in host memory, in the bank."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from peftk.adapters import checks
from peftk.checkpoints import files
from peftk.checkpoints import peft as peft_checkpoint
from peftk.checkpoints.files import CONFIG_FILE, CheckpointError
from peftk.models.server import HeldAdapter, MultiAdapter, PreparedAdapter

_Stamp = tuple[tuple[int, int, int], ...]
_KEPT_TIMES = 1024


@dataclasses.dataclass(frozen=True)
class StoreStats:
    """What a store has done and holds. Times in milliseconds, of the last 1024 loads; 0 if there were none.

    hits: pins that found their adapter in the bank. loads: adapters that were put into it. reads: checkpoints that were
    read from disk. failures: reads that failed. evictions, host_evictions: adapters that left bank and host memory for
    others. registered: names. resident, pinned: adapters in the bank, and those of them in use. load_*: from host
    memory into the bank. read_*: from disk into host memory.
    """

    hits: int
    loads: int
    reads: int
    failures: int
    evictions: int
    host_evictions: int
    registered: int
    resident: int
    pinned: int
    bank_bytes: int
    host_bytes: int
    load_p50_ms: float
    load_p99_ms: float
    read_p50_ms: float
    read_p99_ms: float


class _Version:
    """The checkpoint of a name with one content. Names whose contents are equal share a place in memory by `digest`."""

    def __init__(self, path: Path, stamp: _Stamp | None) -> None:
        self.path, self.stamp = path, stamp
        self.digest: str | None = None  # known once it was read
        self.reading: concurrent.futures.Future[PreparedAdapter | None] | None = None
        self.leases: set[Lease] = set()


@dataclasses.dataclass
class _Resident:
    """An adapter in the bank."""

    nbytes: int
    pins: int = 0


class Lease:
    """One request's claim on an adapter: first on its version, then, once pinned, on its place in the bank.

    The version is that which the name had when the lease was made; a later replacement does not change it. `loaded` is
    a Future that is done when the adapter is in memory, or has the exception with which its load failed.
    """

    def __init__(self, store: AdapterStore, name: str, version: _Version, on_cancel: Callable[[], None] | None) -> None:
        self.store, self.name, self.version, self.on_cancel = store, name, version, on_cancel
        self.loaded: concurrent.futures.Future[PreparedAdapter | None] = concurrent.futures.Future()
        self.held: HeldAdapter | None = None  # once it is pinned
        self._pinned: str | None = None  # its digest

    @property
    def number(self) -> int:
        """The adapter's number in the bank. Raises RuntimeError if it is not pinned."""
        if self.held is None:
            raise RuntimeError("lease: expected a pinned one, got one without a place in the bank")
        return self.held.number

    @property
    def digest(self) -> str | None:
        """sha256 of the checkpoint's contents; None before it was read."""
        return self._pinned or self.version.digest

    def pin(self) -> bool:
        """Gives the adapter a place in the bank and keeps it there until `release`.

        False if it is not in memory yet, or if others have the whole bank pinned: try again after a release. Raises the
        exception with which its load failed, and RuntimeError after `release`.
        """
        return self.store._pin(self)

    def release(self) -> None:
        """Ends the claim. Does nothing the second time."""
        self.store._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class AdapterStore:
    """Keeps any number of LoRA checkpoints of HF PEFT for one model, those in use in the bank of a `MultiAdapter`.

        store = peftk.serve.AdapterStore(model, "adapters/")   # every folder in it is an adapter of that name
        store.add("alice", "elsewhere/alice/")
        with store.pin("alice") as lease:                      # in the bank until the `with` ends
            ...

    On disk: registering reads no weights. In host memory: read and checked, up to `host_bytes`; what was not used
    longest leaves first. In the bank: up to `bank_slots` adapters and `bank_bytes`; what is pinned stays. A checkpoint
    whose files have changed since they were read is read anew at the next lease. All methods may be called in any
    thread; files are read in a thread of the store.

    Args:
        model: as for `MultiAdapter`; every linear that it calls is replaced by a MultiLoRALinear at once.
        folder: of checkpoints; `scan` looks at it again. None: only what `add` names.
        bank_slots: how many adapters can be in the bank. bank_bytes: their total size, None for any.
        host_bytes: of the checkpoints in host memory. The one that was read last stays, whatever its size.
        adapter_dtype, max_rank: as for `MultiAdapter`.

    Raises TypeError or ValueError for a bad argument; the model is unchanged then.

    Source: Sheng et al. 2023 (S-LoRA) keep adapters in main memory and fetch those of the running batch.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str] | None = None,
        *,
        bank_slots: int = 64,
        bank_bytes: int | None = None,
        host_bytes: int = 4 << 30,
        adapter_dtype: torch.dtype | None = None,
        max_rank: int | None = None,
    ) -> None:
        for name, value in (("bank_bytes", bank_bytes), ("host_bytes", host_bytes)):
            if value is not None:
                checks.positive(name, value)
        self.folder = None if folder is None else files.folder(folder)
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"folder: expected a folder of checkpoints, got {self.folder}, which is none")
        self.server = MultiAdapter(model, max_adapters=bank_slots, adapter_dtype=adapter_dtype, max_rank=max_rank)
        self.server.adapt()
        self.bank_slots, self.bank_bytes, self.host_bytes = bank_slots, bank_bytes, host_bytes
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # a load ended, or a lease was released
        self._paths: dict[str, Path] = {}
        self._found: set[str] = set()  # the names that `scan` found
        self._versions: dict[str, _Version] = {}
        self._host: collections.OrderedDict[str, PreparedAdapter] = collections.OrderedDict()
        self._bank: collections.OrderedDict[str, _Resident] = collections.OrderedDict()
        self._counts: collections.Counter[str] = collections.Counter()
        self._load_times: collections.deque[float] = collections.deque(maxlen=_KEPT_TIMES)
        self._read_times: collections.deque[float] = collections.deque(maxlen=_KEPT_TIMES)
        self._readers = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="peftk-adapters")
        self._closed = False
        self.scan()

    # ---- names

    @property
    def names(self) -> list[str]:
        """The registered adapters, sorted."""
        with self._lock:
            return sorted(self._paths)

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def add(self, name: str, path: str | os.PathLike[str]) -> None:
        """Registers a checkpoint under a name, or replaces the one that has it, without reading weights.

        Requests that have a lease finish on the content that they began with; later ones get the new one.

        Raises TypeError for a bad name or path, CheckpointError if there is no checkpoint in the folder.
        """
        if not isinstance(name, str) or not name or not name.isprintable():
            raise TypeError(f"name: expected a non-empty printable string, got {name!r}")
        folder = files.folder(path)
        if _stamp(folder) is None:
            raise CheckpointError(
                f"{folder}: expected {CONFIG_FILE} and {peft_checkpoint.WEIGHTS_FILE}, got no such files"
            )
        with self._lock:
            self._check_open()
            self._paths[name] = folder
            self._found.discard(name)

    def remove(self, name: str, *, cancel: bool = False, timeout: float | None = None) -> None:
        """Unregisters a name at once, then waits until no request uses what it named, and frees the memory.

        Args:
            cancel: cancel the requests that use it instead of letting them finish.
            timeout: seconds to wait; None for as long as it takes.

        Raises ValueError for an unknown name, TimeoutError if requests still use it after the timeout: they go on, and
        the memory is freed as others need it.
        """
        with self._lock:
            self._check_registered(name)
            del self._paths[name]
            self._found.discard(name)
            version = self._versions.pop(name, None)
            if version is None:
                return
            leases = list(version.leases) if cancel else []
        for lease in leases:  # without the lock, which the engine may need
            if lease.on_cancel is not None:
                lease.on_cancel()
        with self._changed:
            if not self._changed.wait_for(lambda: not version.leases, timeout):
                raise TimeoutError(
                    f"{name}: expected its requests to end within {timeout} s, got {len(version.leases)} left"
                )
            shared = any(other.digest == version.digest for other in self._versions.values())
            if version.digest is not None and not shared:
                self._host.pop(version.digest, None)
                resident = self._bank.get(version.digest)
                if resident is not None and resident.pins == 0:
                    del self._bank[version.digest]
                    self.server.unload(version.digest)

    def scan(self) -> None:
        """Registers the folders with a checkpoint in `folder`, and unregisters those found before that are gone.

        Names that `add` gave stay as they are. Raises OSError if the folder cannot be read.
        """
        if self.folder is None:
            return
        with os.scandir(self.folder) as entries:
            found = {
                e.name: Path(e.path)
                for e in entries
                if e.name.isprintable() and os.path.isfile(f"{e.path}/{CONFIG_FILE}")
            }
        with self._lock:
            for name in self._found - found.keys():
                del self._paths[name]
                self._versions.pop(name, None)
            new = {name: path for name, path in found.items() if name not in self._paths or name in self._found}
            self._paths.update(new)
            self._found = set(new)

    # ---- leases

    def lease(self, name: str, *, on_cancel: Callable[[], None] | None = None) -> Lease:
        """A claim on the adapter that the name has now; if it is not in memory, a thread begins to read it.

        Leases of one adapter share one read. on_cancel: called, in any thread, when `remove` cancels its requests.

        Raises ValueError for an unknown name.
        """
        with self._lock:
            self._check_open()
            path = self._check_registered(name)
            stamp = _stamp(path)
            version = self._versions.get(name)
            if version is None or version.path != path or version.stamp != stamp:
                version = self._versions[name] = _Version(path, stamp)
            lease = Lease(self, name, version, on_cancel)
            version.leases.add(lease)
            lease.loaded = self._loading(version)
            return lease

    def pin(self, name: str, timeout: float | None = None) -> Lease:
        """A lease that is pinned in the bank; waits for its load and for a place.

        Raises ValueError for an unknown name, CheckpointError if the load fails, TimeoutError after `timeout` seconds.
        """
        lease = self.lease(name)
        end = None if timeout is None else time.monotonic() + timeout
        try:
            with self._changed:
                while not lease.pin():
                    # a slot may also become free when a step of the engine ends, which nobody is told
                    left = 0.01 if end is None else min(0.01, end - time.monotonic())
                    if left <= 0:
                        raise TimeoutError(f"{name}: expected a place in the bank within {timeout} s, got none")
                    self._changed.wait(left)
        except BaseException:
            lease.release()
            raise
        return lease

    def stats(self) -> StoreStats:
        """What the store has done and holds now."""
        with self._lock:
            counts, residents = self._counts, self._bank.values()
            return StoreStats(
                hits=counts["hits"],
                loads=counts["loads"],
                reads=counts["reads"],
                failures=counts["failures"],
                evictions=counts["evictions"],
                host_evictions=counts["host_evictions"],
                registered=len(self._paths),
                resident=len(self._bank),
                pinned=sum(resident.pins > 0 for resident in residents),
                bank_bytes=sum(resident.nbytes for resident in residents),
                host_bytes=sum(prepared.nbytes for prepared in self._host.values()),
                load_p50_ms=_percentile(self._load_times, 50),
                load_p99_ms=_percentile(self._load_times, 99),
                read_p50_ms=_percentile(self._read_times, 50),
                read_p99_ms=_percentile(self._read_times, 99),
            )

    def residency(self) -> dict[str, str]:
        """For each name whose adapter is in memory, as far as it was read: "bank" or "host"."""
        with self._lock:
            digests = {name: version.digest for name, version in self._versions.items()}
            tiers = {**dict.fromkeys(self._host, "host"), **dict.fromkeys(self._bank, "bank")}
            return {name: tiers[digest] for name, digest in digests.items() if digest in tiers}

    def close(self) -> None:
        """Ends the store's thread. Leases stay valid; no new ones are made."""
        with self._lock:
            self._closed = True
        self._readers.shutdown(wait=True, cancel_futures=True)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("store: expected an open one, got one that was closed")

    def _check_registered(self, name: str) -> Path:
        path = self._paths.get(name) if isinstance(name, str) else None
        if path is None:
            raise ValueError(f"name: expected a registered adapter ({len(self._paths)} are), got {name!r}")
        return path

    # ---- from disk to host memory

    def _loading(self, version: _Version) -> concurrent.futures.Future[PreparedAdapter | None]:
        """A Future for a version's load: done if it is in memory, else that of a read that runs or begins."""
        if version.digest is not None:
            if version.digest in self._host:
                self._host.move_to_end(version.digest)
            if version.digest in self._host or version.digest in self._bank:
                done: concurrent.futures.Future[PreparedAdapter | None] = concurrent.futures.Future()
                done.set_result(self._host.get(version.digest))
                return done
        if version.reading is None:
            version.reading = self._readers.submit(self._read, version)
        return version.reading

    def _read(self, version: _Version) -> PreparedAdapter | None:
        begin = time.perf_counter()
        try:
            digest, prepared = self._content(version)
            if self.bank_bytes is not None and prepared.nbytes > self.bank_bytes:
                raise CheckpointError(
                    f"{version.path}: expected at most bank_bytes = {self.bank_bytes} bytes, got {prepared.nbytes}"
                )
        except BaseException:
            with self._changed:
                version.reading = None  # the next lease tries again
                self._counts["failures"] += 1
                self._changed.notify_all()
            raise
        with self._changed:
            version.digest, version.reading = digest, None
            self._host[digest] = prepared
            self._host.move_to_end(digest)
            self._counts["reads"] += 1
            self._read_times.append(time.perf_counter() - begin)
            total = sum(kept.nbytes for kept in self._host.values())
            while total > self.host_bytes and len(self._host) > 1:
                total -= self._host.popitem(last=False)[1].nbytes
                self._counts["host_evictions"] += 1
            self._changed.notify_all()
        return prepared

    def _content(self, version: _Version) -> tuple[str, PreparedAdapter]:
        """Digest and tensors of a version's files, which are read again if they change meanwhile."""
        for _ in range(3):
            stamp = _stamp(version.path)
            try:
                digest = files.digest(version.path, peft_checkpoint.WEIGHTS_FILE)
            except OSError:
                digest = ""  # `prepare` says what is wrong
            with self._lock:
                prepared = self._host.get(digest)
            if prepared is None:
                prepared = self.server.prepare(version.path)
            if stamp is not None and _stamp(version.path) == stamp:
                version.stamp = stamp
                return digest, prepared
        raise CheckpointError(f"{version.path}: expected files that stay as they are while they are read, got changes")

    # ---- from host memory to the bank

    def _pin(self, lease: Lease) -> bool:
        with self._lock:
            version = lease.version
            if lease not in version.leases:
                raise RuntimeError("lease: expected one that was not released, got one that was")
            if lease.held is not None:
                return True
            if not lease.loaded.done():
                return False
            prepared, digest = lease.loaded.result(), version.digest
            assert digest is not None
            resident = self._bank.get(digest)
            if resident is not None:
                self._counts["hits"] += 1
            else:
                prepared = prepared or self._host.get(digest)
                if prepared is None:  # it was in the bank, and has left it since
                    lease.loaded = self._loading(version)
                    return False
                if not self._make_room(prepared.nbytes):
                    return False
                begin = time.perf_counter()
                self.server.place(digest, prepared)
                self._load_times.append(time.perf_counter() - begin)
                resident = self._bank[digest] = _Resident(prepared.nbytes)
                self._counts["loads"] += 1
            resident.pins += 1
            self._bank.move_to_end(digest)
            lease.held, lease._pinned = self.server.hold(digest), digest
            lease.loaded = concurrent.futures.Future()  # which does not keep the tensors in host memory
            lease.loaded.set_result(None)
            return True

    def _make_room(self, nbytes: int) -> bool:
        """Evicts adapters that are not pinned until one of this size has a place; False if there is none."""
        used = sum(resident.nbytes for resident in self._bank.values())
        while len(self._bank) >= self.bank_slots or (self.bank_bytes is not None and used + nbytes > self.bank_bytes):
            digest = next((digest for digest, resident in self._bank.items() if resident.pins == 0), None)
            if digest is None:
                return False
            used -= self._bank.pop(digest).nbytes
            self.server.unload(digest)
            self._counts["evictions"] += 1
        return self.server.free_slots > 0  # else a step that is running still reads the evicted one

    def _release(self, lease: Lease) -> None:
        with self._changed:
            if lease not in lease.version.leases:
                return
            lease.version.leases.remove(lease)
            if lease.held is not None:
                assert lease.digest is not None
                self._bank[lease.digest].pins -= 1
                lease.held = None
            self._changed.notify_all()


def _stamp(path: Path) -> _Stamp | None:
    """What of a checkpoint's files changes when they are written; None if one is missing."""
    try:
        found = [os.stat(path / name) for name in (CONFIG_FILE, peft_checkpoint.WEIGHTS_FILE)]
    except OSError:
        return None
    return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in found)


def _percentile(seconds: collections.deque[float], percent: int) -> float:
    if len(seconds) < 2:
        return 1e3 * sum(seconds)
    return 1e3 * statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1]

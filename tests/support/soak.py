"""A server under everything that may happen to it at once, for as long as one likes, with every output checked.

A tiny Llama, adapters that are replaced, removed and damaged while requests for them run, requests that are cancelled,
overdue or left by their owners, a bank and a queue that are full, reads that fail.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import gc
import os
import pathlib
import random
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Iterator

import torch

import peftk
from peftk.checkpoints import files
from peftk.checkpoints.files import CheckpointError
from peftk.checkpoints.peft import WEIGHTS_FILE
from peftk.serve import AdapterStore, Completion, Engine, Generation, QueueFullError, Request
from tests.support import served_llama

PROMPTS = ((5, 6, 7), tuple(range(3, 30)), (90, 3) * 20, (42,))
NEW_TOKENS = 12
RANKS = (4, 5, 8, 16, 20)
BROKEN = "broken"
NEAR_TIE = 1e-3  # of two logits: such an output may fall either way


class Contents:
    """Checkpoints on disk, and what each generates alone for each prompt, by digest."""

    def __init__(self, folder: pathlib.Path, count: int) -> None:
        self.paths = [folder / f"content{number}" for number in range(count)]
        self.digests: list[str] = []
        self.alone: dict[tuple[str | None, int], tuple[int, ...] | None] = {}
        self._keep(None, served_llama.model())
        models = [served_llama.model() for _ in RANKS]
        for rank, model in zip(RANKS, models, strict=True):
            peftk.inject(model, peftk.LoraConfig(r=rank, target_modules=served_llama.EVERY_LINEAR))
        for number, path in enumerate(self.paths):
            model = models[number % len(RANKS)]
            served_llama.randomise(model, number)
            peftk.save_adapter(model, path)
            self.digests.append(files.digest(path, WEIGHTS_FILE))
            self._keep(self.digests[-1], model)

    def _keep(self, digest: str | None, model: torch.nn.Module) -> None:
        for number, tokens in enumerate(_generated(model)):
            self.alone[digest, number] = tokens


def _generated(model: torch.nn.Module) -> list[tuple[int, ...] | None]:
    """What all prompts give greedily, computed anew for each token; None if there was a near tie."""
    rows = [list(prompt) for prompt in PROMPTS]
    closest = torch.full((len(rows),), float("inf"))
    for _ in range(NEW_TOKENS):
        longest = max(map(len, rows))  # what follows a token changes nothing of it
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[range(len(rows)), [len(row) - 1 for row in rows]]
        best = logits.topk(2)
        closest = torch.minimum(closest, best.values[:, 0] - best.values[:, 1])
        for row, token in zip(rows, best.indices[:, 0].tolist(), strict=True):
            row.append(token)
    return [
        None if gap < NEAR_TIE else tuple(row[-NEW_TOKENS:]) for row, gap in zip(rows, closest.tolist(), strict=True)
    ]


@dataclasses.dataclass
class Asked:
    """A request that was handed in."""

    generation: Generation
    name: str | None
    prompt: int
    began: float
    ended: float | None = None


@dataclasses.dataclass
class Report:
    """wrong: what must not happen, in words; empty if all was well. resident_mb: by second."""

    asked: int
    outcomes: Counter[str]
    actions: Counter[str]
    wrong: list[str]
    resident_mb: list[float]
    stats: str

    @property
    def growth_mb(self) -> float:
        """From the second third of the time to the last one."""
        third = len(self.resident_mb) // 3
        if third == 0:
            return 0.0
        return statistics.mean(self.resident_mb[-third:]) - statistics.mean(self.resident_mb[third : 2 * third])


class Soak:
    """seconds: how long requests come. bank_slots: fewer than the requests that run at a time."""

    def __init__(self, folder: pathlib.Path, contents: Contents, *, seconds: float, bank_slots: int, seed: int) -> None:
        self.folder, self.contents, self.seconds = folder, contents, seconds
        self.random = random.Random(seed)
        self.store = AdapterStore(served_llama.model(), bank_slots=bank_slots, host_bytes=100 * 40_000)
        self.engine = Engine(self.store.server.model, self.store, max_running=2 * bank_slots, max_waiting=60)
        self.actions: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.count = 0
        self.open: list[Asked] = []
        self.names = [f"name{number}" for number in range(len(contents.paths))]
        # what each name meant, and since when; None: nothing
        self.meant: dict[str, list[tuple[float, str | None]]] = {name: [] for name in self.names}
        self.owners = concurrent.futures.ThreadPoolExecutor(4)
        self.waits: list[concurrent.futures.Future[None]] = []
        self.failing = False  # reads fail now

    def run(self) -> Report:
        for name, number in zip(self.names, range(len(self.names)), strict=True):
            self._name(name, number)
        choices = {
            self._ask: 60, self._cancel: 6, self._leave: 4, self._overdue: 4, self._replace: 6, self._remove: 3,
            self._broken: 2, self._truncate: 2, self._fail_reads: 1, self._burst: 1,
        }  # fmt: skip
        resident: list[float] = []
        end = time.monotonic() + self.seconds
        next_sample = 0.0
        with self._reads_that_may_fail():
            for action in choices:  # each at least once, however busy the machine is
                action()
            while (now := time.monotonic()) < end:
                self.random.choices(list(choices), list(choices.values()))[0]()
                self._collect()
                if now >= next_sample:
                    gc.collect()
                    resident.append(_resident_mb())
                    next_sample = now + 1
                if len(self.open) > 150:
                    time.sleep(0.01)
            self._finish()
        return Report(
            self.count, self.outcomes, self.actions, self.wrong, resident, f"{self.store.stats()} {self.engine.stats()}"
        )

    # ---- what may happen

    def _ask(self, name: str | None = None, **options: float) -> Asked | None:
        name = name or self.random.choice([None, *self.random.choices(self.names, k=9)])
        prompt = self.random.randrange(len(PROMPTS))
        began = time.monotonic()
        request = Request(PROMPTS[prompt], name, NEW_TOKENS, ignore_eos=True, **options)
        try:
            generation = self.engine.submit(request)
        except QueueFullError:
            self.outcomes["queue full"] += 1
            time.sleep(0.005)
            return None
        except ValueError as error:
            if name in self.meant and not self._meant(name, began, time.monotonic()) & {None}:
                self.wrong.append(f"{name}: is registered, and was refused: {error}")
            self.outcomes["unknown name"] += 1
            return None
        self.count += 1
        asked = Asked(generation, name, prompt, began)
        self.open.append(asked)
        return asked

    def _cancel(self) -> None:
        if self.open:
            self.random.choice(self.open).generation.cancel()
            self.actions["cancelled"] += 1

    def _leave(self) -> None:
        """A client reads some tokens and is gone."""
        asked = self._ask()
        if asked is not None:
            self.waits.append(self.owners.submit(self._read_some, asked.generation, self.random.randrange(3)))
            self.actions["left"] += 1

    @staticmethod
    def _read_some(generation: Generation, count: int) -> None:
        with contextlib.suppress(Exception):
            for _, _ in zip(range(count + 1), generation, strict=False):
                pass

    def _overdue(self) -> None:
        self._ask(timeout=self.random.choice((1e-4, 0.01, 0.1)))
        self.actions["deadlines"] += 1

    def _replace(self) -> None:
        name = self.random.choice(self.names)
        if self.meant[name][-1][1] is not None:
            self._name(name, self.random.randrange(len(self.contents.paths)))
            self.actions["replaced"] += 1

    def _remove(self) -> None:
        """Takes a name away, and gives it back at once under another content: what ran goes on, or is cancelled."""
        name = self.random.choice(self.names)
        if self.meant[name][-1][1] is None:
            return
        self.meant[name].append((time.monotonic(), None))
        self.actions["removed"] += 1
        self.waits.append(self.owners.submit(self._remove_now, name, self.random.random() < 0.5))

    def _remove_now(self, name: str, cancel: bool) -> None:
        self.store.remove(name, cancel=cancel, timeout=60)
        self._name(name, self.random.randrange(len(self.contents.paths)))

    def _broken(self) -> None:
        """A checkpoint with half a file."""
        path = self._copy()
        os.truncate(path / WEIGHTS_FILE, os.path.getsize(path / WEIGHTS_FILE) // self.random.choice((2, 3, 1000)))
        self._ask_once(path)
        self.actions["truncated"] += 1

    def _truncate(self) -> None:
        """A checkpoint whose file becomes shorter while it is read."""
        path = self._copy()
        size = os.path.getsize(path / WEIGHTS_FILE)
        self._ask_once(path)
        with contextlib.suppress(FileNotFoundError):  # it is done with already
            os.truncate(path / WEIGHTS_FILE, self.random.randrange(size))
        self.actions["truncated while read"] += 1

    def _copy(self) -> pathlib.Path:
        path = self.folder / f"{BROKEN}{self.actions.total()}-{time.monotonic_ns()}"
        shutil.copytree(self.random.choice(self.contents.paths), path)
        return path

    def _ask_once(self, path: pathlib.Path) -> None:
        self.store.add(path.name, path)
        asked = self._ask(path.name)
        if asked is None:
            self.store.remove(path.name)
            shutil.rmtree(path)
        else:
            self.waits.append(self.owners.submit(self._forget, asked, path))

    def _forget(self, asked: Asked, path: pathlib.Path) -> None:
        with contextlib.suppress(CheckpointError, OSError):
            asked.generation.result(60)
        self.store.remove(path.name, timeout=60)
        shutil.rmtree(path)

    def _fail_reads(self) -> None:
        """The disk gives errors for a while."""
        self.failing = not self.failing
        self.actions["disk errors"] += 1

    def _burst(self) -> None:
        for _ in range(100):
            self._ask()
        self.actions["bursts"] += 1

    @contextlib.contextmanager
    def _reads_that_may_fail(self) -> Iterator[None]:
        prepare = self.store.server.prepare

        def failing(path: str) -> object:
            if self.failing and self.random.random() < 0.3:
                raise OSError(self.random.choice((errno.EIO, errno.ENOSPC, errno.EMFILE)), "soak: the disk fails")
            return prepare(path)

        self.store.server.prepare = failing  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.store.server.prepare = prepare  # type: ignore[method-assign]

    # ---- what must come of it

    def _name(self, name: str, content: int) -> None:
        # from before the call on, since it may be seen at any moment within it
        self.meant[name].append((time.monotonic(), self.contents.digests[content]))
        self.store.add(name, self.contents.paths[content])

    def _meant(self, name: str, began: float, ended: float) -> set[str | None]:
        """What a name meant at any time between the two."""
        history = list(self.meant[name])
        last = max(n for n, (since, _) in enumerate(history) if since <= began)
        # the one before too: a replacement begins a moment before it is seen
        return {digest for since, digest in history[max(0, last - 1) :] if since <= ended}

    def _collect(self) -> None:
        for asked in [one for one in self.open if one.generation.done]:
            self.open.remove(asked)
            self._check(asked)

    def _check(self, asked: Asked) -> None:
        try:
            completion = asked.generation.result(0)
        except Exception as error:
            self._check_failure(asked, error)
            return
        self.outcomes[completion.finish_reason] += 1
        self._check_tokens(asked, completion)

    def _check_failure(self, asked: Asked, error: Exception) -> None:
        self.outcomes[f"failed: {type(error).__name__}"] += 1
        damaged = asked.name is not None and asked.name.startswith(BROKEN)
        disk = isinstance(error, OSError) and "soak" in str(error)
        removed = isinstance(error, ValueError) and asked.name in self.meant
        if removed and None in self._meant(asked.name or "", asked.began, time.monotonic()):
            return
        if not (disk or (damaged and isinstance(error, CheckpointError))):
            self.wrong.append(f"{asked.name}: failed with {error!r}")

    def _check_tokens(self, asked: Asked, completion: Completion) -> None:
        digest = completion.digest
        if asked.name is None and digest is not None:
            self.wrong.append("a request without an adapter got one")
        if not completion.tokens:
            return
        if asked.name in self.meant and digest not in self._meant(asked.name, asked.began, time.monotonic()):
            self.wrong.append(f"{asked.name}: got a content that it did not mean while the request ran")
        if (digest, asked.prompt) not in self.contents.alone:
            self.wrong.append(f"{asked.name}: got a content that no checkpoint has")
            return
        expected = self.contents.alone[digest, asked.prompt]
        if expected is not None and expected[: len(completion.tokens)] != completion.tokens:
            self.wrong.append(f"{asked.name}: {completion.tokens} are not its adapter's {expected}")
        if completion.finish_reason == "length" and len(completion.tokens) != NEW_TOKENS:
            self.wrong.append(f"{asked.name}: {len(completion.tokens)} tokens instead of {NEW_TOKENS}")

    def _finish(self) -> None:
        """All that was asked must come to an end, and nothing may stay pinned."""
        self.failing = False
        end = time.monotonic() + 120
        while self.open and time.monotonic() < end:
            self._collect()
            time.sleep(0.01)
        if self.open:
            self.wrong.append(f"{len(self.open)} requests have no end: {[one.name for one in self.open][:5]}")
        for wait in self.waits:
            try:
                wait.result(120)
            except Exception as error:
                self.wrong.append(f"an owner failed: {error!r}")
        self.owners.shutdown()
        stats = self.engine.stats()
        ended = stats.finished + stats.cancelled + stats.timed_out + stats.failed
        if ended != self.count or stats.running or stats.waiting:
            self.wrong.append(f"{self.count} requests were asked, {stats}")
        if self.store.stats().pinned:
            self.wrong.append(f"{self.store.stats().pinned} adapters stay pinned")
        self.engine.close(timeout=10)
        self.store.close()


def _resident_mb() -> float:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

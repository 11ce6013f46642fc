"""How a route travels: from the `with` that enters it to the layers that run inside.

A context variable holds it, so threads and asyncio tasks that serve different batches do not see each other's. Where a
context variable falls short, a few lines each make up for it (docs/routes.md):

- A generator shares its caller's context, and may be resumed in another one. So a route that a generator's frame enters
  belongs to that frame, and counts while the frame is on the stack.
- A thread that is started begins with an empty context, and one of a pool serves everybody. So a started thread takes
  along the route of its starter, and what is handed to a pool that of whoever hands it in, never the pool's thread.
- A context that is copied for another task or thread has no frame on its stack. So a copy takes a generator's route.
- Activation checkpointing runs layers again during the backward, when the `with` may have ended or another batch may be
  routed. So a forward leaves its route with the checkpoints that it runs in, and the recomputation finds it there.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import inspect
import multiprocessing.pool
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.utils.checkpoint

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Link(NamedTuple):
    """One route that was entered, and the one around it."""

    entered: object  # who entered it, and leaves it
    key: object  # whose layers it is for
    value: Any
    outer: Link | None  # what held when it was entered
    previous: Link | None  # what was in its place
    frame: FrameType | None  # the generator that ran, and in which it is innermost

    def value_for(self, key: object) -> Any:
        """The value of the innermost route of this key, or None."""
        link: Link | None = self
        while link is not None and link.key is not key:
            link = link.outer
        return None if link is None else link.value


_current: contextvars.ContextVar[Link | None] = contextvars.ContextVar("peftk_route", default=None)
_of_generators: dict[FrameType, Link] = {}


def innermost() -> Link | None:
    """The route that holds here and now."""
    link = _current.get()
    if not _of_generators and (link is None or link.frame is None):
        return link
    frame = _running_generator()
    while link is not None and link.frame is not None and link.frame is not frame:
        link = link.previous  # of a generator that is not running
    if frame is not None and (link is None or link.frame is None):
        return _of_generators[frame]
    return link


def held_for(key: object) -> Any:
    """The value of the innermost route of this key, or None."""
    link = innermost()
    return None if link is None else link.value_for(key)


def _running_generator() -> FrameType | None:
    """The innermost frame on the stack that has entered a route as a generator."""
    frame = sys._getframe(1)
    while frame is not None and frame not in _of_generators:
        frame = frame.f_back  # type: ignore[assignment]
    return frame


def _without(link: Link | None, entered: object) -> Link | None:
    """The chain without what `entered` entered; those within it stay."""
    if link is None:
        return None
    if link.entered is entered:
        return link.previous
    outer, previous = _outer_without(link.outer, entered), _without(link.previous, entered)
    return link if outer is link.outer and previous is link.previous else link._replace(outer=outer, previous=previous)


def _outer_without(link: Link | None, entered: object) -> Link | None:
    if link is None:
        return None
    if link.entered is entered:
        return link.outer
    outer = _outer_without(link.outer, entered)
    return link if outer is link.outer else link._replace(outer=outer)


class Entered(contextlib.ContextDecorator):
    """The `with` of a route. As a decorator of a function, generator or coroutine it is entered whenever that runs.

    key: whose layers the route is for. make: gives the route, when the `with` begins. left: called when it has ended.
    """

    def __init__(self, key: object, make: Callable[[], Any], left: Callable[[Any], None]) -> None:
        self._key, self._make, self._left = key, make, left
        self._inside, self._value = False, None
        self._frame: FrameType | None = None

    def __enter__(self) -> None:
        if self._inside:
            raise RuntimeError("route: expected a new one for every `with`, got one that is entered already")
        _install()
        self._value = self._make()
        self._frame = _enter(self, self._key, self._value, innermost(), _owner(sys._getframe(1)))
        self._inside = True

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        frame, value = self._frame, self._value
        self._inside, self._value, self._frame = False, None, None
        _leave(self, frame)
        self._left(value)

    def __call__(self, function: F) -> F:
        return _within(function, lambda: Entered(self._key, self._make, self._left))


def carry_route(function: F) -> F:
    """`function`, to be called elsewhere: it runs within the routes that hold now, and no others.

    Threads that are started inside of a route, thread pools and asyncio take the route along by themselves. This is for
    what they do not know of: a queue that other threads serve, a callback, `_thread`, an event loop in C.

        with server.route(["alice"]):
            queue.put(peftk.carry_route(functools.partial(model.generate, **inputs)))

    A generator or coroutine function gives generators and coroutines that run so. The adapters of the routes stay as
    long as what is returned.
    """
    if not callable(function):
        raise TypeError(f"function: expected something to call, got {type(function).__name__}")
    link = innermost()
    return _within(function, lambda: _Carried(link))


class _Carried:
    """Within the `with`, the routes that held elsewhere."""

    def __init__(self, link: Link | None) -> None:
        self._link = link
        self._frame: FrameType | None = None

    def __enter__(self) -> None:
        key, value, outer = (None, None, None) if self._link is None else self._link[1:4]
        self._frame = _enter(self, key, value, outer, _owner(sys._getframe(1)))

    def __exit__(self, *error: object) -> None:
        _leave(self, self._frame)


def _within(function: Any, manager: Callable[[], Any]) -> Any:
    """`function`, which runs in a `with` of its own whenever it runs."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with manager():
            return function(*args, **kwargs)

    def step(*args: Any, **kwargs: Any) -> Any:
        with manager():
            return (yield from function(*args, **kwargs))

    async def wait(*args: Any, **kwargs: Any) -> Any:
        with manager():
            return await function(*args, **kwargs)

    async def wait_for_each(*args: Any, **kwargs: Any) -> Any:
        with manager():
            async for each in function(*args, **kwargs):
                yield each

    kinds: list[tuple[Callable[[Any], bool], Any]] = [
        (inspect.isgeneratorfunction, step),
        (inspect.iscoroutinefunction, wait),
        (inspect.isasyncgenfunction, wait_for_each),
    ]
    return functools.wraps(function)(next((run for is_one, run in kinds if is_one(function)), call))


def _enter(entered: object, key: object, value: Any, outer: Link | None, owner: FrameType | None) -> FrameType | None:
    """Puts a route in place, for a generator's frame or for all that goes on in this context."""
    if owner is not None and owner.f_code.co_flags & _GENERATORS:
        _install_for_generators()
        _of_generators[owner] = Link(entered, key, value, outer, _of_generators.get(owner), None)
        return owner
    frame = _running_generator() if _of_generators else None
    _current.set(Link(entered, key, value, outer, _current.get(), frame))
    return None


def _leave(entered: object, frame: FrameType | None) -> None:
    """In whatever order, context or thread (where a generator is collected): what another one entered stays."""
    if frame is None:
        link = _current.get()
        left = _without(link, entered)
        if left is not link:
            _current.set(left)
        return
    left = _without(_of_generators.get(frame), entered)
    if left is None:
        _of_generators.pop(frame, None)
    else:
        _of_generators[frame] = left


_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
# They run a generator up to its yield on behalf of somebody's `with`, or of a test.
_DRIVERS = ("contextlib", "_pytest.fixtures")


def _owner(frame: FrameType | None) -> FrameType | None:
    """The frame whose `with` this is: not `__enter__`s of managers that enter it in turn, nor generators that are such
    managers (contextlib.contextmanager)."""
    while frame is not None:
        manages = frame.f_code.co_name in ("__enter__", "__aenter__")
        if not manages and not _drives(frame) and not (frame.f_code.co_flags & _GENERATORS and _drives(frame.f_back)):
            return frame
        frame = frame.f_back
    return None


def _drives(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_globals.get("__name__") in _DRIVERS


# ---------------------------------------------------------------------------------------------------------------------
# Threads, pools, tasks. All is put in place when a first route is entered.


@functools.cache
def _install() -> None:
    threading.Thread.start = _starting(threading.Thread.start)  # type: ignore[method-assign]
    concurrent.futures.ThreadPoolExecutor.submit = _handing_in(  # type: ignore[method-assign]
        concurrent.futures.ThreadPoolExecutor.submit
    )
    pool = multiprocessing.pool.ThreadPool
    for name in ("apply_async", "map", "map_async", "starmap", "starmap_async", "imap", "imap_unordered"):
        setattr(pool, name, _handing_in(getattr(pool, name)))
    function = torch.utils.checkpoint.CheckpointFunction
    function.forward = staticmethod(_checkpointing(function.forward))  # type: ignore[method-assign]


@functools.cache
def _install_for_generators() -> None:
    """A generator's frame is on no other stack, so what copies the context takes its route along."""
    asyncio.BaseEventLoop.create_task = _copying(asyncio.BaseEventLoop.create_task)  # type: ignore[method-assign]
    copy_context = contextvars.copy_context
    for module in list(sys.modules.values()):  # some have imported it by name
        if module.__name__ != "_contextvars" and vars(module).get("copy_context") is copy_context:
            module.copy_context = _copying(copy_context)  # type: ignore[attr-defined]


# Modules whose threads work for everybody.
_POOLS = ("concurrent.futures", "multiprocessing.pool", "anyio", "tqdm")


def _starting(start: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(start)
    def wrapped(thread: threading.Thread) -> None:
        if innermost() is None:
            return start(thread)
        makers = (type(thread).__module__, getattr(getattr(thread, "_target", None), "__module__", None) or "")
        if not any(maker == pool or maker.startswith(f"{pool}.") for maker in makers for pool in _POOLS):
            run = carry_route(thread.run)

            def once() -> None:
                del thread.run
                run()

            thread.run = once  # type: ignore[method-assign]
        with _holding(None):  # from 3.14 on a thread may begin with its starter's context
            return start(thread)

    return wrapped


def _handing_in(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that takes a function for a thread of a pool."""

    @functools.wraps(method)
    def wrapped(pool: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return method(pool, function if innermost() is None else carry_route(function), *args, **kwargs)

    return wrapped


def _copying(function: F) -> F:
    """A function that copies the context."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        link = innermost() if _of_generators else None
        with contextlib.nullcontext() if link is None else _holding(link):
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


@contextlib.contextmanager
def _holding(link: Link | None) -> Iterator[None]:
    token = _current.set(None if link is None else link._replace(previous=None, frame=None))
    try:
        yield
    finally:
        _current.reset(token)


# ---------------------------------------------------------------------------------------------------------------------
# Activation checkpointing


_checkpointed: contextvars.ContextVar[bool] = contextvars.ContextVar("peftk_checkpointed", default=False)


def _checkpointing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A reentrant checkpoint runs its function without gradients, as inference does, but will run it again."""

    @functools.wraps(forward)
    def wrapped(*args: Any) -> Any:
        token = _checkpointed.set(True)
        try:
            return forward(*args)
        finally:
            _checkpointed.reset(token)

    return wrapped


def remembers(*, trains: bool) -> bool:
    """Whether checkpoints may be on the way. trains: whether a backward may follow."""
    return trains or torch._C._current_graph_task_id() != -1 or _checkpointed.get()


def remembered(value: T | None, *, name: str) -> T | None:
    """`value`, left under `name` with the checkpoints on the way; within a recomputation, what the forward left there.

    It looks at the whole stack: to be asked for where `remembers` says so.
    """
    checkpoints = list(_checkpoints())
    if torch._C._current_graph_task_id() != -1:
        value = next((getattr(c, name) for c in checkpoints if hasattr(c, name)), value)
    for checkpoint in checkpoints:
        setattr(checkpoint, name, value)
    return value


def _checkpoints() -> Iterator[object]:
    """The checkpoints that the caller runs in, innermost first: objects that torch keeps from forward to backward.

    torch offers no way to hang state of one's own on a checkpoint, so they are looked up on the stack.
    """
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        code = frame.f_code
        if code.co_filename != torch.utils.checkpoint.__file__:
            continue
        if code.co_name in ("forward", "backward"):  # of CheckpointFunction, use_reentrant=True
            yield frame.f_locals["ctx"]
        elif code.co_name == "unpack_hook" and "frame" in frame.f_locals:  # use_reentrant=False, recomputing
            yield frame.f_locals["frame"]
        elif code.co_name == "checkpoint" and "gen" in frame.f_locals:  # use_reentrant=False, running forward
            yield frame.f_locals["gen"].gi_frame.f_locals["new_frame"]

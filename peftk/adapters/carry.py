"""Carries a route from the `with` that enters it to the layers that run inside, through threads, tasks and checkpoints.

A mode (`peftk.deterministic`) travels in the same way, as a route with a key of its own.

A context variable holds the route, so threads and asyncio tasks that run different batches do not see each other's.
There are cases that a context variable does not cover; each has its own solution here (docs/routes.md):

- A generator shares its caller's context and may be resumed in a different one. A route that is entered in a
  generator's frame therefore belongs to that frame, and applies while the frame is on the stack.
- A new thread begins with an empty context, and a pool's thread works for many callers. A started thread therefore gets
  the route of its starter. Work submitted to a pool gets the route of its submitter; the pool's thread gets none.
- In a context that is copied for another task or thread, the generator's frame is not on the stack. The copy therefore
  contains the generator's route.
- Activation checkpointing runs layers again during the backward, when the `with` may have ended or another batch may be
  routed. A forward therefore stores its route on the checkpoints that it runs in, and the recomputation reads it there.
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
    """A route that was entered, linked to the routes around it."""

    manager: object  # the context manager that entered it and will leave it
    key: object  # the server whose layers it is for
    value: Any  # the route
    outer: Link | None  # the innermost route when it was entered
    previous: Link | None  # the link that it replaced, in the context or the generator
    frame: FrameType | None  # the generator that was running, if any: the link applies only while it runs

    def value_for(self, key: object) -> Any:
        """The innermost route with this key, or None."""
        link: Link | None = self
        while link is not None and link.key is not key:
            link = link.outer
        return None if link is None else link.value


_current: contextvars.ContextVar[Link | None] = contextvars.ContextVar("peftk_route", default=None)
_generator_routes: dict[FrameType, Link] = {}


def innermost() -> Link | None:
    """The innermost route that applies at this point, or None."""
    link = _current.get()
    if not _generator_routes and (link is None or link.frame is None):
        return link
    frame = _running_generator()
    while link is not None and link.frame is not None and link.frame is not frame:
        link = link.previous  # its generator is not running
    if frame is not None and (link is None or link.frame is None):
        return _generator_routes[frame]
    return link


def route_for(key: object) -> Any:
    """The innermost route with this key, or None."""
    link = innermost()
    return None if link is None else link.value_for(key)


def _running_generator() -> FrameType | None:
    """The innermost generator frame on the stack that has entered a route."""
    frame = sys._getframe(1)
    while frame is not None and frame not in _generator_routes:
        frame = frame.f_back  # type: ignore[assignment]
    return frame


def _without(link: Link | None, manager: object) -> Link | None:
    """The chain without the link of the context manager; links inside of it stay."""
    if link is None:
        return None
    if link.manager is manager:
        return link.previous
    outer, previous = _outer_without(link.outer, manager), _without(link.previous, manager)
    return link if outer is link.outer and previous is link.previous else link._replace(outer=outer, previous=previous)


def _outer_without(link: Link | None, manager: object) -> Link | None:
    if link is None:
        return None
    if link.manager is manager:
        return link.outer
    outer = _outer_without(link.outer, manager)
    return link if outer is link.outer else link._replace(outer=outer)


class RouteContext(contextlib.ContextDecorator):
    """The context manager of a route. As a decorator, it is entered whenever the function, generator or coroutine runs.

    key: the server whose layers the route is for, or what else may ask for the value. make: called when the `with`
    begins, returns the route. on_exit: called with the route when the `with` has ended.
    """

    def __init__(self, key: object, make: Callable[[], Any], on_exit: Callable[[Any], None]) -> None:
        self._key, self._make, self._on_exit = key, make, on_exit
        self._inside, self._value = False, None
        self._frame: FrameType | None = None

    def __enter__(self) -> None:
        if self._inside:
            raise RuntimeError("context manager: expected a new one for each `with`, got one that is already entered")
        _install()
        self._value = self._make()
        self._frame = _enter(self, self._key, self._value, innermost(), _owning_frame(sys._getframe(1)))
        self._inside = True

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        frame, value = self._frame, self._value
        self._inside, self._value, self._frame = False, None, None
        _leave(self, frame)
        self._on_exit(value)

    def __call__(self, function: F) -> F:
        return _run_in(function, lambda: RouteContext(self._key, self._make, self._on_exit))


def carry_route(function: F) -> F:
    """Wraps `function` so that, wherever it is called, it runs within the routes that apply now, and no others.

    Threads that are started within a route, thread pools and asyncio carry the route already. This is for everything
    else: a queue that other threads work on, a callback, `_thread`, an event loop in C.

        with server.route(["alice"]):
            queue.put(peftk.carry_route(functools.partial(model.generate, **inputs)))

    For a generator function or coroutine function, the generators and coroutines that it returns run within the routes.
    The adapters of the routes stay loaded as long as the wrapped function exists.

    Raises TypeError if `function` is not callable.
    """
    if not callable(function):
        raise TypeError(f"function: expected a callable, got {type(function).__name__}")
    link = innermost()
    return _run_in(function, lambda: _CarriedRoutes(link))


class _CarriedRoutes:
    """A context manager that applies the routes of another place."""

    def __init__(self, link: Link | None) -> None:
        self._link = link
        self._frame: FrameType | None = None

    def __enter__(self) -> None:
        key, value, outer = (None, None, None) if self._link is None else self._link[1:4]
        self._frame = _enter(self, key, value, outer, _owning_frame(sys._getframe(1)))

    def __exit__(self, *error: object) -> None:
        _leave(self, self._frame)


def _run_in(function: Any, make_manager: Callable[[], Any]) -> Any:
    """`function`, wrapped so that every call runs in a `with make_manager():`, whatever kind of function it is."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with make_manager():
            return function(*args, **kwargs)

    def step(*args: Any, **kwargs: Any) -> Any:
        with make_manager():
            return (yield from function(*args, **kwargs))

    async def wait(*args: Any, **kwargs: Any) -> Any:
        with make_manager():
            return await function(*args, **kwargs)

    async def wait_for_each(*args: Any, **kwargs: Any) -> Any:
        with make_manager():
            async for item in function(*args, **kwargs):
                yield item

    kinds: list[tuple[Callable[[Any], bool], Any]] = [
        (inspect.isgeneratorfunction, step),
        (inspect.iscoroutinefunction, wait),
        (inspect.isasyncgenfunction, wait_for_each),
    ]
    return functools.wraps(function)(next((wrapper for is_kind, wrapper in kinds if is_kind(function)), call))


def _enter(manager: object, key: object, value: Any, outer: Link | None, owner: FrameType | None) -> FrameType | None:
    """Enters a route for `owner` if that is a generator's frame, else for this context. Returns that frame or None."""
    if owner is not None and owner.f_code.co_flags & _GENERATORS:
        _install_for_generators()
        _generator_routes[owner] = Link(manager, key, value, outer, _generator_routes.get(owner), None)
        return owner
    frame = _running_generator() if _generator_routes else None
    _current.set(Link(manager, key, value, outer, _current.get(), frame))
    return None


def _leave(manager: object, frame: FrameType | None) -> None:
    """Removes the link of the context manager, and no other.

    Managers may be left in any order, context or thread (the thread in which a generator is collected).
    """
    if frame is None:
        link = _current.get()
        remaining = _without(link, manager)
        if remaining is not link:
            _current.set(remaining)
        return
    remaining = _without(_generator_routes.get(frame), manager)
    if remaining is None:
        _generator_routes.pop(frame, None)
    else:
        _generator_routes[frame] = remaining


_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
# Modules that run a generator up to its yield for a `with` or a test elsewhere.
_DRIVERS = ("contextlib", "_pytest.fixtures")


def _owning_frame(frame: FrameType | None) -> FrameType | None:
    """The frame that contains the `with` statement.

    Skipped are the `__enter__` methods of managers that enter the route in turn, and generators that are such managers
    (contextlib.contextmanager).
    """
    while frame is not None:
        manages = frame.f_code.co_name in ("__enter__", "__aenter__")
        if (
            not manages
            and not _is_driver(frame)
            and not (frame.f_code.co_flags & _GENERATORS and _is_driver(frame.f_back))
        ):
            return frame
        frame = frame.f_back
    return None


def _is_driver(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_globals.get("__name__") in _DRIVERS


# ---------------------------------------------------------------------------------------------------------------------
# Threads, pools, tasks. The patches are installed when the first route is entered.


@functools.cache
def _install() -> None:
    threading.Thread.start = _wrap_start(threading.Thread.start)  # type: ignore[method-assign]
    concurrent.futures.ThreadPoolExecutor.submit = _wrap_submit(  # type: ignore[method-assign]
        concurrent.futures.ThreadPoolExecutor.submit
    )
    pool = multiprocessing.pool.ThreadPool
    for name in ("apply_async", "map", "map_async", "starmap", "starmap_async", "imap", "imap_unordered"):
        setattr(pool, name, _wrap_submit(getattr(pool, name)))
    function = torch.utils.checkpoint.CheckpointFunction
    function.forward = staticmethod(_wrap_checkpoint(function.forward))  # type: ignore[method-assign]


@functools.cache
def _install_for_generators() -> None:
    """A generator's frame is not on the stack of another task or thread, so copies of the context get its route."""
    asyncio.BaseEventLoop.create_task = _wrap_copy(asyncio.BaseEventLoop.create_task)  # type: ignore[method-assign]
    copy_context = contextvars.copy_context
    for module in list(sys.modules.values()):  # some have imported the function by name
        if module.__name__ != "_contextvars" and vars(module).get("copy_context") is copy_context:
            module.copy_context = _wrap_copy(copy_context)  # type: ignore[attr-defined]


# Modules whose threads work for many callers.
_POOLS = ("concurrent.futures", "multiprocessing.pool", "anyio", "tqdm")


def _wrap_start(start: Callable[..., None]) -> Callable[..., None]:
    """Wraps Thread.start so that the thread runs within the route of its starter, unless it belongs to a pool."""

    @functools.wraps(start)
    def wrapped(thread: threading.Thread) -> None:
        if innermost() is None:
            return start(thread)
        makers = (type(thread).__module__, getattr(getattr(thread, "_target", None), "__module__", None) or "")
        if not any(maker == pool or maker.startswith(f"{pool}.") for maker in makers for pool in _POOLS):
            run = carry_route(thread.run)

            def run_carried() -> None:
                del thread.run
                run()

            thread.run = run_carried  # type: ignore[method-assign]
        with _set_current(None):  # from Python 3.14 on, a thread may begin with its starter's context
            return start(thread)

    return wrapped


def _wrap_submit(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a method of a pool that takes a function to run in one of its threads."""

    @functools.wraps(method)
    def wrapped(pool: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return method(pool, function if innermost() is None else carry_route(function), *args, **kwargs)

    return wrapped


def _wrap_copy(function: F) -> F:
    """Wraps a function that copies the context, so that the copy contains the route of the running generator."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        link = innermost() if _generator_routes else None
        with contextlib.nullcontext() if link is None else _set_current(link):
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


@contextlib.contextmanager
def _set_current(link: Link | None) -> Iterator[None]:
    """Within the `with`, the context variable holds `link`."""
    token = _current.set(None if link is None else link._replace(previous=None, frame=None))
    try:
        yield
    finally:
        _current.reset(token)


# ---------------------------------------------------------------------------------------------------------------------
# Activation checkpointing


_checkpointed: contextvars.ContextVar[bool] = contextvars.ContextVar("peftk_checkpointed", default=False)


def _wrap_checkpoint(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the forward of a reentrant checkpoint: it runs without gradients, as inference does, but will run again."""

    @functools.wraps(forward)
    def wrapped(*args: Any) -> Any:
        token = _checkpointed.set(True)
        try:
            return forward(*args)
        finally:
            _checkpointed.reset(token)

    return wrapped


def may_be_checkpointed(*, trains: bool) -> bool:
    """Whether the caller may run in a checkpoint, forward or recomputation. trains: whether a backward may follow."""
    return trains or torch._C._current_graph_task_id() != -1 or _checkpointed.get()


def stored_in_checkpoints(value: T | None, *, name: str) -> T | None:
    """Stores `value` as attribute `name` of the enclosing checkpoints and returns it.

    Within a recomputation, returns what the forward stored there instead. It walks the whole stack, so call it only if
    `may_be_checkpointed` says so.
    """
    checkpoints = list(_checkpoints())
    if torch._C._current_graph_task_id() != -1:
        value = next((getattr(c, name) for c in checkpoints if hasattr(c, name)), value)
    for checkpoint in checkpoints:
        setattr(checkpoint, name, value)
    return value


def _checkpoints() -> Iterator[object]:
    """The checkpoints that the caller runs in, innermost first: objects that torch keeps from forward to backward.

    torch has no API to attach state to a checkpoint, so these objects are looked up on the stack.
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

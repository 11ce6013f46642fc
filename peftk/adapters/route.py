"""Which adapter serves which sequence of the batch at hand: what `MultiAdapter.route` gives to layers.

How a route reaches them is `peftk.adapters.carry`'s; here is what a layer makes of it: an id for every row of its
input. The rows are whole sequences in the order of the batch, or they are refused (`Forward`,
`peftk.adapters.row_order`).
"""

from __future__ import annotations

import contextvars
import sys
import uuid
from collections.abc import Callable, Hashable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from peftk.adapters import carry
from peftk.adapters.row_order import RowOrder
from peftk.adapters.table import AdapterTable

if TYPE_CHECKING:
    from peftk.adapters.bank import AdapterBank

T = TypeVar("T")
_Key = tuple[torch.Size, torch.device, int, int | None]


class Route:
    """The ids of one batch, per sequence [B] or per token [B, T], and all that layers derive from them, made once.

    `given` is copied when the `with` begins. Nobody else has the copy, so it never changes, and what is derived from it
    (`once`) serves every layer and the backward. That is no more than an activation: it belongs to the stream that
    made it, or to the CUDA graph.

    CUDA graphs read `given` at every replay, so it must outlive them, like each input of a graph, and may be changed in
    place between replays. A route that is entered *inside* of a capture copies and derives once a replay, for all
    layers. For a route that was entered before, each captured layer reads `given` and derives by itself, since nothing
    made outside of a capture may be used within it or the reverse: its copy is old by the time of a replay, and its
    memory somebody else's.

    Args:
        slots: what makes slots of the numbers in `given`; None where they are slots.
        holds: the adapters, which stay as long as the route.
        batch_dim: of x, in which the sequences lie; None: 0, except where a layer knows better.
        lengths: of the sequences, int64 [B] on given's device, where x has them one after the other in one row.
        alike: whether all ids are known to be the same, so that any order of rows is right.
    """

    def __init__(
        self,
        given: Tensor,
        *,
        slots: Callable[[Tensor], Tensor] | None = None,
        holds: object = None,
        batch_dim: int | None = None,
        lengths: Tensor | None = None,
        alike: bool = False,
    ) -> None:
        self.given, self.holds, self.batch_dim, self.alike = given, holds, batch_dim, alike
        self.capturing = _capturing(given.device)
        self._slots, self._lengths = slots, lengths
        self.tokens = None if lengths is None else int(lengths.sum())
        with torch.inference_mode(False):  # a forward that is trained may follow, and saves them
            self.ids = self.read(given.clone())
        self._laid_out: dict[_Key, Tensor] = {}
        # No forwards: they hold the route, and a circle would hold its adapters until the next garbage collection.
        self._accepted: dict[tuple[int, int | None, bool], dict[_Key, Tensor]] = {}
        if self.capturing:
            _read_by_graphs[id(given)] = self

    def read(self, given: Tensor) -> Tensor:
        """The slots that `given` names now: per sequence, per token, or [ΣT] for sequences one after the other."""
        slots = given if self._slots is None else self._slots(given)
        if self._lengths is None:
            return slots
        return slots.repeat_interleave(self._lengths, output_size=self.tokens)

    def forward(self, expand: int = 1, length: int | None = None, matched: bool = False) -> Forward:
        """Of a model whose input is [B · expand, length, …]; without arguments, of a layer that no model called."""
        return Forward(self, expand, length, matched, self._accepted.setdefault((expand, length, matched), {}))

    def dim(self, batch_dim: int | None) -> int:
        """Where the sequences lie in x of a layer that may know it itself."""
        return batch_dim if batch_dim is not None else self.batch_dim or 0

    def once(self, lay_out: Callable[..., Tensor], x: Tensor, dim: int, stream: int) -> Tensor:
        """The ids laid out for x, the same tensor for all forwards."""
        key = (x.shape[:-1], x.device, stream, dim)
        with torch.inference_mode(False):
            flat = flatten(lay_out(self.ids, x.shape[:-1], dim).to(x.device))  # or it raises
        if key not in self._laid_out:
            setattr(flat, _DERIVED, (self.capturing, {}))
            self._laid_out[key] = flat.view(x.shape[:-1])
            setattr(self._laid_out[key], _FLAT, flat)
        return self._laid_out[key]


class Forward:
    """A route as one forward sees it: which rows x of a linear may have, and their ids.

    expand: how many rows generate() made of each sequence. length: T of a model that was called with [B, T, …]; None
    where that is not known. matched: whether the model was called with B (times expand) sequences.
    """

    def __init__(
        self, route: Route, expand: int, length: int | None, matched: bool, accepted: dict[_Key, Tensor]
    ) -> None:
        self.route, self.expand, self.length, self.matched, self._rows = route, expand, length, matched, accepted

    def rows(self, x: Tensor, batch_dim: int | None = None) -> Tensor:
        """Slots of shape x.shape[:-1]. batch_dim: where the layer knows it.

        Raises ValueError for rows that are not the route's sequences.
        """
        route, device = self.route, x.device
        if _capturing(device) != route.capturing:
            _read_by_graphs[id(route.given)] = route
            return self._laid_out(route.read(route.given), x.shape[:-1], route.dim(batch_dim)).to(device)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (x.shape, device, stream, batch_dim)
        found = self._rows.get(key)
        if found is None:
            found = self._rows[key] = route.once(self._laid_out, x, route.dim(batch_dim), stream)
        return found

    def _laid_out(self, ids: Tensor, shape: torch.Size, dim: int) -> Tensor:
        """ids expanded to `shape`."""
        route, flat = self.route, len(shape) == 1
        if route.tokens is not None:
            if shape in ((route.tokens,), (1, route.tokens)):
                return ids.view(shape)
        elif ids.dim() == 2:
            count, length = ids.shape[0] * self.expand, ids.shape[1]
            if shape in ((count, length), (count * length,)):
                return ids.repeat_interleave(self.expand, dim=0).reshape(shape)
        elif flat or len(shape) > dim:
            count, length = ids.shape[0], self.length if flat and self.length is not None else 1
            # rows of x for each sequence: one, one for each beam, and in flattened rows the same for each token
            each = {count * n * t: (n, t) for n in (1, self.expand) for t in (1, length)}.get(shape[0 if flat else dim])
            if each is not None:
                n, t = each
                ids = ids.repeat_interleave(n * t) if dim == 0 else ids.repeat_interleave(n).repeat(t)
                return ids if flat else ids.reshape(-1, *[1] * (len(shape) - 1 - dim)).expand(shape)
        if route.alike and self.matched and ids.numel():
            return ids.reshape(-1)[:1].expand(shape)  # whatever rows these are, they are rows of this batch
        raise ValueError(self._refusal(shape, dim))

    def _refusal(self, shape: torch.Size, dim: int) -> str:
        route, got = self.route, ", ".join(map(str, (*shape, "K")))
        count = route.given.shape[0] * self.expand
        if route.tokens is not None:
            return f"route: expected x [1, {route.tokens}, K], as long as all lengths together, got x [{got}]"
        if route.given.dim() == 2:
            length = route.given.shape[1]
            return f"route: expected x [{count}, {length}, K], as ids per token, got x [{got}]"
        leading = f"{count}, …, K" if dim == 0 else f"T, {count}, …, K"
        flat = "" if self.length is None else f" or [{count * self.length}, K]"
        return (
            f"route: expected x [{leading}]{flat}, whole sequences in the order of the {route.given.shape[0]} routed "
            f"ones, got x [{got}]. Time-major x: batch_dim=1. Sequences one after the other in one row: lengths= or "
            "cu_seqlens=. Rows that the model picks or sorts, as experts get them, can't be told apart: route batches "
            "of one adapter there"
        )


# Kept for good: a graph that reads them does not say when it ends. With them stay the adapters that it may read.
_read_by_graphs: dict[int, Route] = {}

# A tensor that a route made carries what was made of it.
_FLAT = "_peftk_flat"
_DERIVED = "_peftk_derived"


def flat(ids: Tensor) -> Tensor | None:
    """int32 [M] for the ids that `Forward.rows` gave out, the same tensor for every layer; None for any other ids."""
    return getattr(ids, _FLAT, None)


def flatten(ids: Tensor) -> Tensor:
    """int32 [M]. What int32 cannot hold stays outside of every bank."""
    if ids.dtype == torch.int64:
        ids = ids.clamp(-2, 2**31 - 1)
    return ids.reshape(-1).to(torch.int32)


def once(ids: Tensor, key: Hashable, derive: Callable[[], T]) -> T:
    """derive(), kept with ids that came from `flat`, which never change. Any others may: they are derived from anew."""
    kept: tuple[bool, dict[Hashable, T]] | None = getattr(ids, _DERIVED, None)
    if kept is None or kept[0] != _capturing(ids.device):
        return derive()
    derived = kept[1]
    if key not in derived:
        derived[key] = derive()
    return derived[key]


def _capturing(device: torch.device) -> bool:
    """Whether what happens now on the device is recorded into a CUDA graph, and doesn't happen yet."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# ---------------------------------------------------------------------------------------------------------------------
# From a model to its layers


class Serving:
    """What a server, its layers and the hooks on its model share: routes are for the layers that have the same one.

    A copy of the model is no longer this server's, and a copy of the server has one of its own.
    """

    def __init__(self, origin: str | None = None) -> None:
        self.left = f"_peftk_route_{uuid.uuid4().hex}"  # the name under which checkpoints remember
        self.origin = origin or self.left
        self.looks = LOOKS

    def __reduce__(self) -> tuple[type[Serving], tuple[str]]:
        return Serving, (self.origin,)


LOOKS = 4  # forwards in a row in which the order of rows is looked at where a layer has not been called yet


class Call(NamedTuple):
    """A module of a server's model that runs within a route."""

    module: nn.Module
    forward: Forward
    order: RowOrder | None  # in the first forwards
    outer: Call | None
    begins: bool  # whether this call began to look at the order

    def leave(self) -> None:
        if self.begins and self.order is not None:
            self.order.leave()


_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar("peftk_call", default=None)


class Entrance:
    """The hooks on a server's model, and on those of its parts that it may be entered by (an encoder): they see what
    batch it is called with."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            from peftk.system.eagerly import eagerly  # torch's compiler takes seconds to import, and is there now

            return eagerly(self._before, module, args, kwargs, watched=False)
        self._before(module, args, kwargs, watched=True)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            from peftk.system.eagerly import eagerly

            return eagerly(self._after, module)
        self._after(module)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, watched: bool) -> None:
        route = carry.held_for(self.serving)
        if route is None:
            return
        outer = _call.get()
        if outer is not None and outer.forward.route is not route:
            outer = None
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and not t.is_nested]
        forward = _seen(route, tensors, None if outer is None else outer.forward)
        order = None if outer is None else outer.order
        begins = watched and order is None and self._looks(module, forward)
        if begins:
            dim = batch_dim_of([module])[0]
            dim = route.batch_dim or 0 if dim is None else dim
            order = RowOrder(tensors, route.given.shape[0] * forward.expand, dim)
            order.__enter__()
        _call.set(Call(module, forward, order, outer, begins))

    def _after(self, module: nn.Module) -> None:
        call = _call.get()
        if call is not None and call.module is module:
            _call.set(call.outer)
            call.leave()

    def _looks(self, module: nn.Module, forward: Forward) -> bool:
        """Whether there are layers whose rows nobody has looked at."""
        if self.serving.looks == 0 or forward.route.alike or not forward.matched:
            return False
        self.serving.looks -= 1
        return any(
            getattr(m, "served", None) is self.serving and not getattr(m, "rows_seen", True) for m in module.modules()
        )


def _seen(route: Route, tensors: Sequence[Tensor], outer: Forward | None) -> Forward:
    """The route in a module that is called with these tensors, by another one or not."""
    if route.tokens is not None:
        return route.forward()
    batch, shapes = route.given.shape[0], [t.shape for t in tensors]
    if route.batch_dim == 1:  # the model may be called with [B, T] all the same
        both = next((shape[:2] for shape in shapes if len(shape) > 1 and batch in shape[:2]), None)
        if both is not None:
            return route.forward(1, both[0] if both[1] == batch else both[1], True)
        return route.forward() if outer is None else outer
    expand, matched, length = (1, False, None) if outer is None else (outer.expand, outer.matched, outer.length)
    if outer is None:
        first = next((s[0] for s in shapes if len(s) > 1), shapes[0][0] if shapes and shapes[0] else None)
        if first is not None:
            expand = 1 if first == batch else _expanded()
            matched = first == batch * expand
    for t, shape in zip(tensors, shapes, strict=True):
        if len(shape) == (3 if t.is_floating_point() else 2) and shape[0] == batch * expand:
            length = shape[1]
            break
    return route.forward(expand, length, matched)


def _expanded() -> int:
    """How many rows the generate() that is running makes of each sequence: beams, or sequences to return."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and "generation_config" in frame.f_code.co_varnames:
            config = frame.f_locals.get("generation_config")
            counts = [getattr(config, name, None) for name in ("num_beams", "num_return_sequences")]
            return max(count if isinstance(count, int) else 1 for count in counts)
        frame = frame.f_back
    return 1


def current(serving: Serving) -> tuple[Forward | None, RowOrder | None]:
    """The route of the enclosing `with`, or None outside of one. And who looks at the order of rows."""
    link = carry.innermost()
    if link is None:
        return None, None
    route: Route | None = link.value_for(serving)
    if route is None:
        _no_copy(link, serving)
        return None, None
    call = _call.get()
    if call is None or call.forward.route is not route:
        return route.forward(), None
    return call.forward, call.order


def _no_copy(link: carry.Link | None, serving: Serving) -> None:
    while link is not None:
        if isinstance(link.key, Serving) and link.key.origin == serving.origin:
            raise ValueError(
                "route: expected the server's own model, got a copy of it, which later adapters don't reach; copy the "
                "server (copy.deepcopy(server)) and use its model and its routes"
            )
        link = link.outer


class Served(Protocol):
    """What a route knows of a layer that it serves (`peftk.nn.MultiLoRALinear`)."""

    bank: AdapterBank
    training: bool
    batch_dim: int | None
    doubt: str | None  # a module around it of which it is not clear where sequences lie in x
    rows_seen: bool


class Rows(NamedTuple):
    """What a served layer computes x with: a slot for each row of x, the bank or the table of another time."""

    slots: Tensor
    bank: AdapterBank | AdapterTable
    order: RowOrder | None  # who looks at the order of rows


def rows(layer: Served, serving: Serving, x: Tensor) -> Rows | None:
    """For the input of a served layer; None outside of a route.

    In a recomputation it is what the forward had: its route, and its table, since what is saved for the backward is as
    large as that.
    """
    if torch.compiler.is_compiling():
        from peftk.system.eagerly import eagerly

        slots = eagerly(_slots, layer, serving, x)
        return None if slots is None else Rows(slots, layer.bank, None)
    forward, order = current(serving)
    bank: AdapterBank | AdapterTable = layer.bank
    if carry.remembers(trains=layer.training or torch.is_grad_enabled()):
        now: tuple[Forward, AdapterBank | AdapterTable] | None
        now = None if forward is None else (forward, layer.bank.table() or layer.bank)
        then = carry.remembered(now, name=f"{serving.left}_{id(layer)}")
        forward, bank = (None, layer.bank) if then is None else then
        order = order if then is now else None
    if forward is None:
        return None
    slots = forward.rows(x, layer.batch_dim)
    if (order is not None or not layer.rows_seen) and not forward.route.alike:
        _look(layer, serving, x, forward, order)
    return Rows(slots, bank, order)


def _slots(layer: Served, serving: Serving, x: Tensor) -> Tensor | None:
    """In a compiled graph, which other graphs interrupt, order is not looked at."""
    forward, _ = current(serving)
    if carry.remembers(trains=layer.training or torch.is_grad_enabled()):
        forward = carry.remembered(forward, name=serving.left)
    return None if forward is None else forward.rows(x, layer.batch_dim)


def _look(layer: Served, serving: Serving, x: Tensor, forward: Forward, order: RowOrder | None) -> None:
    """Raises ValueError where the order of rows is not that of the batch, or nobody knows."""
    if layer.doubt is not None and forward.route.batch_dim is None:
        raise ValueError(
            f"batch_dim: expected 0 or 1, where sequences lie in x of the linears, got None for one in a {layer.doubt}"
        )
    if order is not None:
        order.look(x, forward.route.dim(layer.batch_dim))
        layer.rows_seen = layer.doubt is None
    elif x.dim() == 2 and forward.matched:
        serving.looks = LOOKS
        raise ValueError(
            f"route: expected a layer that had been called in the first forwards, in which the order of rows is looked "
            f"at, got another one, called with x {list(x.shape)}; call the model again, and it is looked at"
        )


def batch_dim_of(around: Sequence[nn.Module]) -> tuple[int | None, str | None]:
    """Where x of a linear within these modules, the innermost first, has its sequences: as torch's Transformer layers
    say; None where nobody does. And a module that says something of which it is not clear what it means for x."""
    for module in around:
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            return (0 if module.self_attn.batch_first else 1), None
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)) and len(module.layers):
            return batch_dim_of([module.layers[0]])
        if isinstance(module, nn.Transformer):
            return (0 if module.batch_first else 1), None
        if getattr(module, "batch_first", True) is False:
            return None, f"{type(module).__name__} with batch_first=False"
    return None, None


def left(route: Route) -> None:
    """Its `with` has ended. An interrupt (Ctrl-C) may have kept a model's hooks from running."""
    call = _call.get()
    while call is not None and call.forward.route is route:
        call.leave()
        call = call.outer
    _call.set(call)

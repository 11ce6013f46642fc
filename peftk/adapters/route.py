"""Routes: which adapter each sequence of a batch uses. Turns a route into an id for every row of a layer's input.

`MultiAdapter.route` makes a `Route`, and `peftk.adapters.carry` brings it to the layers. The rows of a layer's input
must be whole sequences in the order of the batch; anything else is refused (`RoutedForward` and
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
from peftk.system import streams
from peftk.system.lasting import keep_for_graphs

if TYPE_CHECKING:
    from peftk.adapters.bank import AdapterBank

T = TypeVar("T")
_Key = tuple[torch.Size, torch.device, int, int | None]


class Route:
    """The ids of one batch, per sequence [B] or per token [B, T], with everything that layers derive from them.

    `user_ids`, the caller's tensor, is copied when the `with` begins. Nothing else refers to the copy, so it does not
    change, and what is derived from it is computed once and used by every layer and the backward. Like an activation,
    it belongs to the stream that computed it, or to the CUDA graph.

    CUDA graphs read `user_ids` again at every replay. So, like every input of a graph, it must outlive the graph, and
    it may be changed in place between replays. If the route is entered *inside* the capture, ids are copied and derived
    once per replay, for all layers. If it was entered before the capture, each captured layer reads `user_ids` and
    derives for itself, because a capture may not use tensors made outside of it, or the reverse: at a replay the copy
    would be outdated, and its memory may have been reused.

    Args:
        user_ids: int32 or int64, [B] or [B, T].
        slots: function that turns the numbers in `user_ids` into slots; None if they are slots already.
        keep_alive: the adapters, kept alive as long as the route.
        constant: whether nobody changes `user_ids`, so that a graph which reads it needs these adapters for good.
            Otherwise it follows the ids, and the adapters that there are when it is replayed.
        batch_dim: the dimension of x with the sequences; None means 0, unless a layer knows it.
        lengths: of the sequences, int64 [B] on user_ids' device, if x has them one after the other in one row.
        uniform: whether all ids are known to be equal, so that any order of rows is right.
        picked: of an engine that packs requests into one row, with ids [1, T]: slots of the tokens for which there are
            logits, int32 [P]. Layers get x [1, T, K], or [1, P, K] behind the last block. Their order is the engine's.
    """

    def __init__(
        self,
        user_ids: Tensor,
        *,
        slots: Callable[[Tensor], Tensor] | None = None,
        keep_alive: object = None,
        constant: bool = True,
        batch_dim: int | None = None,
        lengths: Tensor | None = None,
        uniform: bool = False,
        picked: Tensor | None = None,
    ) -> None:
        self.user_ids, self.keep_alive, self.batch_dim, self.uniform = user_ids, keep_alive, batch_dim, uniform
        self.picked = picked
        self.capturing = streams.capturing(user_ids.device)
        self._slots, self._lengths, self._constant = slots, lengths, constant
        self.tokens = None if lengths is None else int(lengths.sum())
        with torch.inference_mode(False):  # a training forward may follow, and saves the ids
            self.ids = self.read(user_ids.clone())
        self._layouts: dict[_Key, Tensor] = {}
        # Not the Forwards themselves: they refer to the route, and a reference cycle would keep its adapters alive
        # until the next garbage collection.
        self._accepted: dict[tuple[int, int | None, bool], dict[_Key, Tensor]] = {}
        if self.capturing:
            self.hold_for_graphs()

    @property
    def order_is_known(self) -> bool:
        """Whether the order of rows needs no check."""
        return self.uniform or self.picked is not None

    def hold_for_graphs(self) -> None:
        """Keeps what a graph reads that is being captured."""
        adapters = self.keep_alive if self._constant else None
        keep_for_graphs(id(self.user_ids), (self.user_ids, self._lengths, self._slots, adapters))

    def read(self, user_ids: Tensor) -> Tensor:
        """The slots for the current values of `user_ids`: per sequence, per token, or [ΣT] if there are lengths."""
        slots = user_ids if self._slots is None else self._slots(user_ids)
        if self._lengths is None:
            return slots
        return slots.repeat_interleave(self._lengths, output_size=self.tokens)

    def forward(self, expand: int = 1, length: int | None = None, matched: bool = False) -> RoutedForward:
        """The forward of a model with input [B · expand, length, …]; without arguments, of a layer called directly."""
        return RoutedForward(self, expand, length, matched, self._accepted.setdefault((expand, length, matched), {}))

    def dim(self, batch_dim: int | None) -> int:
        """The dimension of x with the sequences. batch_dim: the layer's own, which takes precedence."""
        return batch_dim if batch_dim is not None else self.batch_dim or 0

    def cached_layout(self, lay_out: Callable[..., Tensor], x: Tensor, dim: int, stream: int) -> Tensor:
        """The ids laid out for x, cached: the same tensor for all forwards."""
        key = (x.shape[:-1], x.device, stream, dim)
        with torch.inference_mode(False):
            flat = flatten(lay_out(self.ids, x.shape[:-1], dim).to(x.device))  # raises if x does not fit
        if key not in self._layouts:
            setattr(flat, _DERIVED, (self.capturing, {}))
            self._layouts[key] = flat.view(x.shape[:-1])
            setattr(self._layouts[key], _FLAT, flat)
        return self._layouts[key]


class RoutedForward:
    """A route in one forward of the model: which rows the input x of a linear may have, and their ids.

    expand: how many rows generate() made of each sequence. length: T if the model was called with [B, T, …], None if
    that is not known. matched: whether the model was called with B (times expand) sequences.
    """

    def __init__(
        self, route: Route, expand: int, length: int | None, matched: bool, accepted: dict[_Key, Tensor]
    ) -> None:
        self.route, self.expand, self.length, self.matched, self._rows = route, expand, length, matched, accepted

    def rows(self, x: Tensor, batch_dim: int | None = None) -> Tensor:
        """Slots of shape x.shape[:-1]. batch_dim: the dimension of x with the sequences, if the layer knows it.

        Raises ValueError if the rows of x are not the route's sequences.
        """
        route, device = self.route, x.device
        if streams.capturing(device) != route.capturing:
            route.hold_for_graphs()
            return self._lay_out(route.read(route.user_ids), x.shape[:-1], route.dim(batch_dim)).to(device)
        stream = streams.handle(device)
        key = (x.shape, device, stream, batch_dim)
        found = self._rows.get(key)
        if found is None:
            found = self._rows[key] = route.cached_layout(self._lay_out, x, route.dim(batch_dim), stream)
        return found

    def _lay_out(self, ids: Tensor, shape: torch.Size, dim: int) -> Tensor:
        """ids expanded to `shape`."""
        route, flat = self.route, len(shape) == 1
        if route.tokens is not None:
            if shape in ((route.tokens,), (1, route.tokens)):
                return ids.view(shape)
        elif ids.dim() == 2:
            count, length = ids.shape[0] * self.expand, ids.shape[1]
            if route.picked is not None:  # [T, K] may be rows that an expert picked
                if shape == (1, length):
                    return ids
                if shape == (1, route.picked.numel()):
                    return route.picked[None]
            elif shape in ((count, length), (count * length,)):
                return ids.repeat_interleave(self.expand, dim=0).reshape(shape)
        elif flat or len(shape) > dim:
            count, length = ids.shape[0], self.length if flat and self.length is not None else 1
            # rows per sequence: one, or one per beam; in flattened x, that many per token
            factors = {count * n * t: (n, t) for n in (1, self.expand) for t in (1, length)}
            repeats = factors.get(shape[0 if flat else dim])
            if repeats is not None:
                n, t = repeats
                ids = ids.repeat_interleave(n * t) if dim == 0 else ids.repeat_interleave(n).repeat(t)
                return ids if flat else ids.reshape(-1, *[1] * (len(shape) - 1 - dim)).expand(shape)
        if route.uniform and self.matched and ids.numel():
            return ids.reshape(-1)[:1].expand(shape)  # all rows are of this batch, in whatever order
        raise ValueError(self._refusal(shape, dim))

    def _refusal(self, shape: torch.Size, dim: int) -> str:
        route, got = self.route, ", ".join(map(str, (*shape, "K")))
        count = route.user_ids.shape[0] * self.expand
        if route.tokens is not None:
            return f"route: expected x [1, {route.tokens}, K], the sum of the lengths, got x [{got}]"
        if route.user_ids.dim() == 2:
            length = route.user_ids.shape[1]
            return f"route: expected x [{count}, {length}, K], like the ids per token, got x [{got}]"
        leading = f"{count}, …, K" if dim == 0 else f"T, {count}, …, K"
        flat = "" if self.length is None else f" or [{count * self.length}, K]"
        return (
            f"route: expected x [{leading}]{flat}, the {route.user_ids.shape[0]} routed sequences whole and in order, "
            f"got x [{got}]. For time-major x pass batch_dim=1; for sequences one after the other in one row, lengths= "
            "or cu_seqlens=. If the model selects or sorts rows (experts), route batches with one adapter only"
        )


# Names of attributes on the tensors that a route makes: the flat ids, and what is derived from flat ids.
_FLAT = "_peftk_flat"
_DERIVED = "_peftk_derived"


def flat(ids: Tensor) -> Tensor | None:
    """int32 [M] for ids that `Forward.rows` returned, the same tensor for every layer; None for any other ids."""
    return getattr(ids, _FLAT, None)


def flatten(ids: Tensor) -> Tensor:
    """The ids as int32 [M]. int64 values beyond int32 are clamped to numbers that no bank has."""
    if ids.dtype == torch.int64:
        ids = ids.clamp(-2, 2**31 - 1)
    return ids.reshape(-1).to(torch.int32)


def flat_ids(ids: Tensor, x: Tensor) -> Tensor:
    """int32 [M], one id per row of x flattened to [M, K]."""
    if ids.shape != x.shape[:-1]:
        ids = ids.reshape(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
    return flatten(ids)


def derive_once(ids: Tensor, key: Hashable, derive: Callable[[], T]) -> T:
    """derive(), cached on ids that came from `flat`, which do not change. For any other ids it is called every time."""
    kept: tuple[bool, dict[Hashable, T]] | None = getattr(ids, _DERIVED, None)
    if kept is None or kept[0] != streams.capturing(ids.device):
        return derive()
    derived = kept[1]
    if key not in derived:
        derived[key] = derive()
    return derived[key]


# ---------------------------------------------------------------------------------------------------------------------
# From a model to its layers


class ServerKey:
    """The identity of a server, shared by its layers and the hooks on its model. Routes apply to layers with the same.

    Copying gives a new identity with the same origin, so a copy of the model does not follow the server's routes, and a
    copy of the server has routes of its own.
    """

    def __init__(self, origin: str | None = None) -> None:
        self.checkpoint_attribute = f"_peftk_route_{uuid.uuid4().hex}"  # in which checkpoints store the route
        self.origin = origin or self.checkpoint_attribute
        self.checks_left = ORDER_CHECKS

    def __reduce__(self) -> tuple[type[ServerKey], tuple[str]]:
        return ServerKey, (self.origin,)


ORDER_CHECKS = 4  # in how many forwards row order is checked after a load that adapts new layers


class RunningCall(NamedTuple):
    """A running call, within a route, of a server's model or of a part of it."""

    module: nn.Module
    forward: RoutedForward
    order: RowOrder | None  # in the first forwards
    outer: RunningCall | None
    begins: bool  # whether this call started `order`

    def leave(self) -> None:
        if self.begins and self.order is not None:
            self.order.stop()


_call: contextvars.ContextVar[RunningCall | None] = contextvars.ContextVar("peftk_call", default=None)


class BatchHooks:
    """The hooks on a server's model, and on the parts of it that may be called directly (an encoder).

    They see what batch it is called with.
    """

    def __init__(self, server_key: ServerKey) -> None:
        self.server_key = server_key

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            from peftk.system.eagerly import eagerly  # here, as importing torch's compiler takes seconds

            return eagerly(self._before, module, args, kwargs, watched=False)
        self._before(module, args, kwargs, watched=True)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            from peftk.system.eagerly import eagerly

            return eagerly(self._after, module)
        self._after(module)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, watched: bool) -> None:
        route = carry.route_for(self.server_key)
        if route is None:
            return
        outer = _call.get()
        if outer is not None and outer.forward.route is not route:
            outer = None
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and not t.is_nested]
        forward = _forward_for(route, tensors, None if outer is None else outer.forward)
        order = None if outer is None else outer.order
        begins = watched and order is None and self._should_check_order(module, forward)
        if begins:
            dim = batch_dim_of([module])[0]
            dim = route.batch_dim or 0 if dim is None else dim
            order = RowOrder(tensors, route.user_ids.shape[0] * forward.expand, dim)
            order.__enter__()
        _call.set(RunningCall(module, forward, order, outer, begins))

    def _after(self, module: nn.Module) -> None:
        call = _call.get()
        if call is not None and call.module is module:
            _call.set(call.outer)
            call.leave()

    def _should_check_order(self, module: nn.Module, forward: RoutedForward) -> bool:
        """Whether to check row order in this call: there are layers for which it has not been checked."""
        if self.server_key.checks_left == 0 or forward.route.order_is_known or not forward.matched:
            return False
        self.server_key.checks_left -= 1
        return any(
            getattr(m, "server_key", None) is self.server_key and not getattr(m, "row_order_checked", True)
            for m in module.modules()
        )


def _forward_for(route: Route, tensors: Sequence[Tensor], outer: RoutedForward | None) -> RoutedForward:
    """The RoutedForward for a module that is called with these tensors. outer: that of the enclosing module, if any."""
    if route.tokens is not None:
        return route.forward()
    batch, shapes = route.user_ids.shape[0], [t.shape for t in tensors]
    if route.batch_dim == 1:  # even so, the model may be called with [B, T]
        both = next((shape[:2] for shape in shapes if len(shape) > 1 and batch in shape[:2]), None)
        if both is not None:
            return route.forward(1, both[0] if both[1] == batch else both[1], True)
        return route.forward() if outer is None else outer
    expand, matched, length = (1, False, None) if outer is None else (outer.expand, outer.matched, outer.length)
    if outer is None:
        first = next((s[0] for s in shapes if len(s) > 1), shapes[0][0] if shapes and shapes[0] else None)
        if first is not None:
            expand = 1 if first == batch else _rows_per_sequence()
            matched = first == batch * expand
    for t, shape in zip(tensors, shapes, strict=True):
        if len(shape) == (3 if t.is_floating_point() else 2) and shape[0] == batch * expand:
            length = shape[1]
            break
    return route.forward(expand, length, matched)


def _rows_per_sequence() -> int:
    """How many rows the running generate() makes of each sequence, for beams or sequences to return; 1 without one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and "generation_config" in frame.f_code.co_varnames:
            config = frame.f_locals.get("generation_config")
            counts = [getattr(config, name, None) for name in ("num_beams", "num_return_sequences")]
            return max(count if isinstance(count, int) else 1 for count in counts)
        frame = frame.f_back
    return 1


def current_forward(server_key: ServerKey) -> tuple[RoutedForward | None, RowOrder | None]:
    """The RoutedForward for the enclosing route, None outside of one; and the running check of row order, if any."""
    link = carry.innermost()
    if link is None:
        return None, None
    route: Route | None = link.value if link.key is server_key else link.value_for(server_key)
    if route is None:
        _check_not_a_copy(link, server_key)
        return None, None
    call = _call.get()
    if call is None or call.forward.route is not route:
        return route.forward(), None
    return call.forward, call.order


def _check_not_a_copy(link: carry.Link | None, server_key: ServerKey) -> None:
    """Raises ValueError within a route of a server of which this is a copy."""
    while link is not None:
        if isinstance(link.key, ServerKey) and link.key.origin == server_key.origin:
            raise ValueError(
                "route: expected the server's own model, got a copy of it, which gets no later adapters; copy the "
                "server (copy.deepcopy(server)) and use its model and its routes"
            )
        link = link.outer


class RoutedLayer(Protocol):
    """What this module needs of a layer with many adapters (`peftk.nn.MultiLoRALinear`)."""

    bank: AdapterBank
    training: bool
    batch_dim: int | None  # the dimension of x with the sequences, if the modules around the layer say so
    unclear_module: str | None  # a module around the layer that leaves this dimension unclear
    row_order_checked: bool  # whether row order has been checked for this layer


class Rows(NamedTuple):
    """What a routed layer computes with: a slot per row of x, and the bank, or in a recomputation its old table."""

    slots: Tensor
    bank: AdapterBank | AdapterTable
    order: RowOrder | None  # the running check of row order


def rows(layer: RoutedLayer, server_key: ServerKey, x: Tensor) -> Rows | None:
    """The Rows for the input x of a layer; None outside of a route.

    In a recomputation these are the route and the table of the forward, because the tensors saved for the backward have
    the sizes of that table.
    """
    if torch.compiler.is_compiling():
        from peftk.system.eagerly import eagerly

        slots = eagerly(_slots, layer, server_key, x)
        return None if slots is None else Rows(slots, layer.bank, None)
    forward, order = current_forward(server_key)
    bank: AdapterBank | AdapterTable = layer.bank
    if carry.may_be_checkpointed(trains=layer.training or torch.is_grad_enabled()):
        now: tuple[RoutedForward, AdapterBank | AdapterTable] | None
        now = None if forward is None else (forward, layer.bank.table() or layer.bank)
        then = carry.stored_in_checkpoints(now, name=f"{server_key.checkpoint_attribute}_{id(layer)}")
        forward, bank = (None, layer.bank) if then is None else then
        order = order if then is now else None
    if forward is None:
        return None
    slots = forward.rows(x, layer.batch_dim)
    if (order is not None or not layer.row_order_checked) and not forward.route.order_is_known:
        _check_row_order(layer, server_key, x, forward, order)
    return Rows(slots, bank, order)


def _slots(layer: RoutedLayer, server_key: ServerKey, x: Tensor) -> Tensor | None:
    """The slots of x's rows in a compiled graph. Row order is not checked there."""
    forward, _ = current_forward(server_key)
    if carry.may_be_checkpointed(trains=layer.training or torch.is_grad_enabled()):
        forward = carry.stored_in_checkpoints(forward, name=server_key.checkpoint_attribute)
    return None if forward is None else forward.rows(x, layer.batch_dim)


def _check_row_order(
    layer: RoutedLayer, server_key: ServerKey, x: Tensor, forward: RoutedForward, order: RowOrder | None
) -> None:
    """Raises ValueError if the order of rows is not that of the batch, or cannot be known."""
    if layer.unclear_module is not None and forward.route.batch_dim is None:
        raise ValueError(
            "batch_dim: expected 0 or 1, the dimension of the sequences in the linears' x, got None for a linear in a "
            f"{layer.unclear_module}"
        )
    if order is not None:
        order.check(x, forward.route.dim(layer.batch_dim))
        layer.row_order_checked = layer.unclear_module is None
    elif x.dim() == 2 and forward.matched:
        server_key.checks_left = ORDER_CHECKS
        raise ValueError(
            f"route: expected a layer that was called in the first forwards, in which row order is checked, got one "
            f"that was not, with x {list(x.shape)}; call the model again, and the layer is checked"
        )


def batch_dim_of(around: Sequence[nn.Module]) -> tuple[int | None, str | None]:
    """The batch dimension of a linear's x, from the modules around it (innermost first), and what leaves it unclear.

    torch's Transformer layers tell the dimension; otherwise it is None. Any other module with `batch_first=False`
    leaves it unclear, and is named in the second value.
    """
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


def clean_up(route: Route) -> None:
    """Cleans up when the route's `with` has ended: an interrupt (Ctrl-C) may have kept a model's hooks from running."""
    call = _call.get()
    while call is not None and call.forward.route is route:
        call.leave()
        call = call.outer
    _call.set(call)

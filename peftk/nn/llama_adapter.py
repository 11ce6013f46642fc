"""LlamaAdapter: a learnt prompt that an attention layer also attends to, behind a gate that starts at zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftk.adapters import checks
from peftk.nn.attached import Attached, HookState, submodule
from peftk.system.lasting import lasting


class Projections(NamedTuple):
    """Where an attention layer has its parts: their names relative to the layer.

    query, key, value: linears; or the same name three times, for one linear whose outputs are q, k and v side by side.
    output: the projection applied to the heads' results. query_norm, key_norm: normalisations within each head, as in
    Qwen 3; "" for none. rotary: whether queries are rotated, by the cos and sin in the layer's argument
    `position_embeddings`.
    """

    query: str
    key: str
    value: str
    output: str
    query_norm: str = ""
    key_norm: str = ""
    rotary: bool = False


class LlamaAdapter(Attached):
    """o(heads + tanh(g) · softmax(c · q (P W_kᵀ)ᵀ) (P W_vᵀ)): zero-initialised attention to a prompt P [L, d].

    q are the layer's queries (rotated if the layer rotates them; the prompt's keys have no position). W_k and W_v are
    the layer's projections, with their biases and any adapters on them. c is the layer's factor: 1/√(width of a head),
    or 1 in T5. The prompt has a softmax of its own, so attention to the text is unchanged. Its result is added to the
    heads' results before the output projection o. The prompt P and the gates g [heads] train; with g = 0 the layer
    computes what it did before.

    There is one gate per head, passed through tanh as in the paper, so the prompt's result never weighs more than the
    head's own attention. (HF PEFT has one plain number a per layer, a = tanh(g).) P starts as standard normal, the
    scale of normalised hidden states.

    The attention to the prompt is torch's scaled_dot_product_attention in the layer's dtype. The sum is computed in the
    adapter's dtype (fp32 by default) and rounded once to the layer's. k and v of the prompt are recomputed in every
    call, since projections may train or be merged. Works with key-value caches, gradient checkpointing and
    torch.compile.

    Source: Zhang et al. 2023 (LLaMA-Adapter).
    """

    name = "llama_adapter"
    adapter_parameters = ("prompt", "gate")

    @lasting()
    def __init__(
        self,
        width: int,
        num_heads: int,
        projections: Projections,
        *,
        adapter_len: int = 10,
        scaling: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """width: d of the hidden states. num_heads: heads of the queries. adapter_len: L, tokens in the prompt.
        scaling: c, no unit; None means the layer's own (its attribute `scaling`, else 1/√(width of a head)).

        Raises ValueError or TypeError for a bad number or dtype.
        """
        super().__init__()
        for name, size in (("width", width), ("num_heads", num_heads), ("adapter_len", adapter_len)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}: expected an integer of 1 or more, got {size!r}")
        checks.adapter_dtype(dtype)
        self.projections, self.scaling, self.num_heads = projections, scaling, num_heads
        self.prompt = nn.Parameter(torch.empty(adapter_len, width, dtype=dtype, device=device))
        self.gate = nn.Parameter(torch.empty(num_heads, dtype=dtype, device=device))
        self.hook_state = HookState()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets P to standard normal and the gates to zero: the layer computes what it did without the adapter."""
        nn.init.normal_(self.prompt)
        nn.init.zeros_(self.gate)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q [B, H, T, D], the prompt's k and v [H', L, D] with H' dividing H → tanh(g)·softmax(c·qkᵀ)v [B, H, T, D]."""
        checks.for_torch(q=q, k=k, v=v, gate=self.gate)
        groups = self.num_heads // k.shape[0]
        k, v = (t.repeat_interleave(groups, dim=0).expand(q.shape[0], -1, -1, -1) for t in (k, v))
        found = nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling)
        return self.gate.tanh()[:, None, None] * found

    def _hooks(self, module: nn.Module) -> list[Callable[[], RemovableHandle]]:
        names = self.projections
        query, output = submodule(module, names.query), submodule(module, names.output)
        for name in names[1:6]:
            submodule(module, name)
        return [
            lambda: module.register_forward_pre_hook(self._enter, with_kwargs=True),
            lambda: query.register_forward_hook(self._catch),
            lambda: output.register_forward_pre_hook(self._add),
        ]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.hook_state.kept = (module, _rotation(args, kwargs) if self.projections.rotary else None)

    def _catch(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.hook_state.kept is not None:  # None: it is the prompt that runs through the packed projection
            self.hook_state.kept = (*self.hook_state.kept[:2], output)

    def _add(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        attention, rotation, query = self.hook_state.take(self.projections.query)
        heads, *rest = args
        return (heads + self._attend(attention, rotation, query, heads.shape[-1])).to(heads.dtype), *rest

    def _attend(
        self, attention: nn.Module, rotation: tuple[Tensor, Tensor] | None, query: Tensor, inner: int
    ) -> Tensor:
        """The gated attention of the queries [B, T, inner] (packed: [B, T, inner + …]) to the prompt: [B, T, inner]."""
        names, width = self.projections, inner // self.num_heads
        checks.for_torch(query=query, prompt=self.prompt)
        prompt = self.prompt.to(query.dtype)[None]
        key = attention.get_submodule(names.key)(prompt)
        if names.key == names.query:
            query, key = query[..., :inner], key[..., inner:]
            key, value = key.chunk(2, dim=-1)
        else:
            value = attention.get_submodule(names.value)(prompt)
        q = query.unflatten(-1, (self.num_heads, width)).transpose(1, 2)
        k, v = (t[0].unflatten(-1, (-1, width)).transpose(0, 1) for t in (key, value))
        if names.query_norm:
            q, k = attention.get_submodule(names.query_norm)(q), attention.get_submodule(names.key_norm)(k)
        if rotation is not None:
            q = _rotate(q, *rotation)
        scaling = self.scaling
        if scaling is None:
            owner = attention.get_submodule(names.query.rpartition(".")[0])
            scaling = getattr(owner, "scaling", None) or width**-0.5
        return self(q, k.to(q.dtype), v.to(q.dtype), scaling).transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        return f"adapter_len={self.prompt.shape[0]}, width={self.prompt.shape[1]}, num_heads={self.num_heads}"


def _rotation(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, D'] of the positions, which transformers' rotary models pass to their attention layers."""
    found = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
    if not isinstance(found, tuple) or len(found) != 2:
        raise TypeError(
            f"position_embeddings: expected (cos, sin) among the attention's arguments, got {type(found).__name__}"
        )
    return found


def _rotate(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q [B, H, T, D] with the first D' values of each head rotated, in pairs (i, i + D'/2)."""
    rotated, rest = q.split([cos.shape[-1], q.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated

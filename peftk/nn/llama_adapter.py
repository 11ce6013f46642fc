"""LlamaAdapter: a learnt prompt that an attention layer also attends to, behind a gate that starts at zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftk.adapters import checks
from peftk.nn.attached import Attached, Caught, part
from peftk.system.lasting import lasting


class Projections(NamedTuple):
    """The parts of an attention layer, by their names below it.

    query, key, value: linears; or all three the same name, one linear whose outputs are q, k and v side by side.
    output: the projection that takes the heads' results. query_norm, key_norm: normalisations of each head, "" for
    none (Qwen 3). rotary: whether queries are rotated, by cos and sin that the layer gets as `position_embeddings`.
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

    q are the layer's own queries (rotated where it rotates them; the prompt's keys have no position), W_k and W_v its
    own projections (with their biases, and with whatever adapters stand there), c its own factor (1/√(head's width),
    1 in T5). The prompt has a softmax of its own, so attention to the text is untouched; its result is added to the
    heads' before the output projection o. Prompt P and the gates g [heads] train; g = 0 leaves the layer as it was.

    One gate a head under tanh, as in the paper: a head opens as far as it needs to, never beyond its own attention
    (HF PEFT has one plain number a layer, a = tanh(g)). P starts standard normal, as normed hidden states are.

    The additional attention is torch's scaled_dot_product_attention in the layer's dtype; the sum is made in the
    adapter's dtype (fp32 unless told otherwise) and rounded once to the layer's. k and v of the prompt are computed
    anew in every call, since projections may train or be merged. Works with key-value caches, gradient checkpointing
    and torch.compile.

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
        """width: d of the hidden states; num_heads: of the queries; adapter_len: L; scaling: c, None for what the
        layer says (its `scaling`, else 1/√(head's width)). Raises ValueError or TypeError for a bad number or dtype."""
        super().__init__()
        for name, size in (("width", width), ("num_heads", num_heads), ("adapter_len", adapter_len)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}: expected an integer of 1 or more, got {size!r}")
        checks.adapter_dtype(dtype)
        self.projections, self.scaling, self.num_heads = projections, scaling, num_heads
        self.prompt = nn.Parameter(torch.empty(adapter_len, width, dtype=dtype, device=device))
        self.gate = nn.Parameter(torch.empty(num_heads, dtype=dtype, device=device))
        self.caught = Caught()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """P standard normal, gates closed: the layer as it was."""
        nn.init.normal_(self.prompt)
        nn.init.zeros_(self.gate)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q [B, H, T, D], k and v [H', L, D] of the prompt, H' dividing H → tanh(g)·softmax(c·qkᵀ)v [B, H, T, D]."""
        checks.for_torch(q=q, k=k, v=v, gate=self.gate)
        groups = self.num_heads // k.shape[0]
        k, v = (t.repeat_interleave(groups, dim=0).expand(q.shape[0], -1, -1, -1) for t in (k, v))
        found = nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling)
        return self.gate.tanh()[:, None, None] * found

    def _hooks(self, module: nn.Module) -> list[Callable[[], RemovableHandle]]:
        names = self.projections
        query, output = part(module, names.query), part(module, names.output)
        for name in names[1:6]:
            part(module, name)
        return [
            lambda: module.register_forward_pre_hook(self._enter, with_kwargs=True),
            lambda: query.register_forward_hook(self._catch),
            lambda: output.register_forward_pre_hook(self._add),
        ]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.caught.kept = (module, _rotation(args, kwargs) if self.projections.rotary else None)

    def _catch(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.caught.kept is not None:  # else the prompt is in the packed projection
            self.caught.kept = (*self.caught.kept[:2], output)

    def _add(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        attention, rotation, query = self.caught.take(self.projections.query)
        heads, *rest = args
        return (heads + self._attend(attention, rotation, query, heads.shape[-1])).to(heads.dtype), *rest

    def _attend(
        self, attention: nn.Module, rotation: tuple[Tensor, Tensor] | None, query: Tensor, inner: int
    ) -> Tensor:
        """What the queries [B, T, inner] (or packed [B, T, inner + …]) find in the prompt: [B, T, inner]."""
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
    """cos and sin [B, T, D'] of the positions, as transformers' rotary models give them to their attention layers."""
    found = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
    if not isinstance(found, tuple) or len(found) != 2:
        raise TypeError(
            f"position_embeddings: expected (cos, sin) among the attention's arguments, got {type(found).__name__}"
        )
    return found


def _rotate(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q [B, H, T, D] with its first D' of each head's values turned in pairs half of D' apart."""
    turned, kept = q.split([cos.shape[-1], q.shape[-1] - cos.shape[-1]], dim=-1)
    one, other = turned.chunk(2, dim=-1)
    turned = turned * cos.unsqueeze(1) + torch.cat([-other, one], dim=-1) * sin.unsqueeze(1)
    return torch.cat([turned, kept], dim=-1) if kept.shape[-1] else turned

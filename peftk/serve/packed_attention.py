"""Attention for a row of packed requests on a CPU: each request attends to its own keys.

transformers' own form there is one masked product of all queries with all keys, whose cost grows with the square of the
number of requests. And bits of a request in it depend on where the others' keys lie; here they depend on nothing else.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

NAME = "peftk_packed"


def serves(model: nn.Module) -> bool:
    """Whether it can stand in for the model's attention: on a CPU, with full attention and no sinks or soft caps."""
    config: Any = model.config
    config = config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    special = any(getattr(config, name, None) for name in ("attn_logit_softcapping", "sliding_window"))
    device = next(model.parameters()).device
    return (
        device.type == "cpu" and layers == {"full_attention"} and not special and config._attn_implementation == "sdpa"
    )


def use(model: Any) -> None:
    """Makes it the model's attention."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.set_attn_implementation(NAME)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function. query [1, H, T, D]; key, value [1, G, S, D] with H a multiple of G.

    Request i has queries cu_seq_lens_q[i] … cu_seq_lens_q[i + 1], the last of its keys in cu_seq_lens_k. Returns
    [1, T, H, D].
    """
    queries, keys = cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist()
    _, H, T, D = query.shape
    G = key.shape[1]
    out = query.new_empty(1, H, T, value.shape[-1])
    for number in range(len(queries) - 1):
        q = query[:, :, queries[number] : queries[number + 1]]
        k = key[:, :, keys[number] : keys[number + 1]]
        v = value[:, :, keys[number] : keys[number + 1]]
        n = q.shape[2]
        if n == 1:  # heads that share keys are rows of one product
            found = scaled_dot_product_attention(q.reshape(1, G, H // G, D), k, v, scale=scaling)
            found = found.reshape(1, H, 1, -1)
        else:
            mask = causal_lower_right(n, k.shape[2])
            found = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=G != H)
        out[:, :, queries[number] : queries[number + 1]] = found
    return out.transpose(1, 2), None

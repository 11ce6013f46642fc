"""decode: one decoding step of a small Llama with a cache, every sequence with an adapter of its own.

The model has random weights: hidden size 512, 8 layers, 8 heads, and every linear layer of its blocks has a LoRA. It is
compared with the same model without adapters, and with HF PEFT's `adapter_names` for up to eight adapters.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftk
from peftk.system import extras
from peftk.tools import minilm
from peftk.tools.benchmark import peers
from peftk.tools.benchmark.common import PEFT, Case, Shape, Side
from peftk.tools.benchmark.model import REST, linears_work, probes_of, without_linears
from peftk.tools.benchmark.roofline import Row, add
from peftk.tools.benchmark.targets import PEFTK, PLAIN_MODEL

PROMPT = 32  # tokens that are in the cache
_MOST_OF_PEFT = 8  # adapters: PEFT runs them one after another

# Of the logits, relative to the largest: 56 products in a row, as argued for MiniLM in `peftk.tools.minilm`.
BOUNDS = {"fp32": 3e-6, "bf16": 3e-2}


def row(shape: Shape) -> Row:
    """shape: M sequences, with as many adapters. Raises extras.MissingExtraError without transformers."""
    extras.require("demo", "a Llama", ["transformers"])
    names = [f"user{number}" for number in range(shape.adapters)]
    exact_plain = _Decoding(_llama().double(), shape.M)
    with tempfile.TemporaryDirectory() as folder:
        paths = _adapters(names, shape.rank, Path(folder))
        exact, ours = _served(torch.float64, paths), _served(shape.torch_dtype, paths)
        expected, expected_plain = exact().double(), exact_plain().double()
        bound = BOUNDS[shape.dtype] * float(expected.abs().max())

        def side(name: str, step: _Decoding, wanted: Tensor) -> Side:
            return Side(name, step, lambda: _error(step, wanted) / bound, step.reset)

        sides = [side(PLAIN_MODEL, _Decoding(_llama(shape.torch_dtype), shape.M), expected_plain)]
        if peers.has_peft() and len(names) <= _MOST_OF_PEFT:
            peft = minilm.load_hf_peft(_llama(shape.torch_dtype), paths)
            sides.append(side(PEFT, _Decoding(peft, shape.M, adapter_names=names), expected))
        sides.append(side(PEFTK, ours, expected))
    rest = _Decoding(without_linears(_llama(shape.torch_dtype)), shape.M)  # the head, too, adds nothing
    linears = {name: linear for name, linear in minilm.linears(_llama()).items() if name != "lm_head"}
    work = add(*linears_work(linears, shape, shape.torch_dtype))
    limit, probing = probes_of(linears, work, shape)
    effect = float((expected - expected_plain).abs().max()) / bound
    case = Case(shape, (*sides, Side(REST, rest, lambda: 0.0, rest.reset), *probing), effect)
    return Row(case, limit, rest=REST)


class _Decoding:
    """The step of a model whose cache holds a prompt of every sequence. `reset` takes the step out of the cache."""

    def __init__(
        self,
        model: nn.Module,
        sequences: int,
        route: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        **kwargs: Any,
    ) -> None:
        import transformers

        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, _VOCABULARY, (sequences, PROMPT + 1), generator=generator)
        self.model, self.route, self.kwargs, self.last = model, route, kwargs, ids[:, -1:]
        self.cache: Any = transformers.DynamicCache()
        with torch.inference_mode():
            self._forward(ids[:, :-1])

    def __call__(self) -> Tensor:
        with torch.inference_mode():
            return self._forward(self.last)

    def _forward(self, ids: Tensor) -> Tensor:
        with self.route():
            logits: Tensor = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **self.kwargs).logits
        return logits

    def reset(self) -> None:
        more = self.cache.get_seq_length() - PROMPT
        if more:
            self.cache.crop(-more)


_VOCABULARY = 2048


def _llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights in every call, exact in bf16."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=_VOCABULARY,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config)
    return model.bfloat16().to(dtype).eval().requires_grad_(False)


def _adapters(names: list[str], rank: int, folder: Path) -> dict[str, Path]:
    """A checkpoint for each name."""
    model = _llama()
    peftk.inject(model, peftk.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    paths = {name: folder / name for name in names}
    for seed, path in enumerate(paths.values()):
        minilm.randomise(model, seed)
        peftk.save_adapter(model, path)
    return paths


def _served(dtype: torch.dtype, paths: dict[str, Path]) -> _Decoding:
    model = _llama(dtype)
    server = peftk.MultiAdapter(model, max_adapters=len(paths))
    for name, path in paths.items():
        server.load(name, path)
    return _Decoding(model, len(paths), lambda: server.route(list(paths)))


def _error(step: _Decoding, expected: Tensor) -> float:
    found = step().double()
    return float((found - expected).abs().max())

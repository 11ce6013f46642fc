"""The ways of answering the same jobs that are compared: peftk's engine, transformers alone, HF PEFT.

Each keeps its model ready between runs. All models share one set of base weights in memory.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from peftk.models.server import MultiAdapter
from peftk.serve import AdapterStore, Engine, Request
from peftk.tools.benchmark.serving.traffic import Job
from peftk.tools.smollm2 import Language

Tokens = tuple[int, ...]
CACHE_TOKENS, STEP_TOKENS = 16384, 1024


@dataclasses.dataclass(frozen=True)
class Side:
    """answer: the new tokens of each job. close: frees what it holds. processor: the processor time in seconds that the
    process which answers has used so far."""

    name: str
    answer: Callable[[Sequence[Job]], list[Tokens]]
    close: Callable[[], object] = lambda: None
    processor: Callable[[], float] = time.process_time


def copied(model: Any) -> Any:
    """A model of its own with the same weights in memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def engine(language: Language, folder: Path, bank_slots: int) -> Engine:
    """peftk's engine on a copy of the model, with the adapters in `folder`."""
    model = copied(language.model)
    store = AdapterStore(model, folder, bank_slots=bank_slots)
    return Engine(model, store, cache_tokens=CACHE_TOKENS, step_tokens=STEP_TOKENS, max_running=64)


def asked_of(served: Engine, jobs: Sequence[Job]) -> list[Tokens]:
    requests = [Request(job.prompt, job.adapter, job.new_tokens, ignore_eos=True) for job in jobs]
    return [completion.tokens for completion in served.generate(requests)]


def continuous(name: str, language: Language) -> Side:
    """transformers' own continuous batching of the unmodified model; jobs' adapters are not looked at."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = copied(language.model)
    sizes = ContinuousBatchingConfig(
        page_size=32,
        num_blocks=CACHE_TOKENS // 32,
        max_batch_tokens=STEP_TOKENS,
        max_requests_per_batch=64,
        allow_block_sharing=False,  # a repetition asks the same again
        use_cuda_graph=False,
    )
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1)
    manager = model.init_continuous_batching(greedy, sizes)
    manager.start()

    def answer(jobs: Sequence[Job]) -> list[Tokens]:
        ids = [manager.add_request(list(job.prompt), max_new_tokens=job.new_tokens) for job in jobs]
        found: dict[str, Tokens] = {}
        while len(found) < len(ids):
            output = manager.get_result(timeout=1)
            if output is not None and output.is_finished():
                found[output.request_id] = tuple(output.generated_tokens)
            elif not manager.is_running():
                raise RuntimeError("transformers' continuous batching has ended")
        return [found[id] for id in ids]

    return Side(name, answer, lambda: manager.stop(block=True))


def padded(name: str, language: Language, folder: Path, names: Sequence[str]) -> Side:
    """`generate` of one batch, within a route of peftk."""
    server = MultiAdapter(copied(language.model), max_adapters=len(names))
    for adapter in names:
        server.load(adapter, folder / adapter)

    def answer(jobs: Sequence[Job]) -> list[Tokens]:
        with server.route([job.adapter for job in jobs]):
            return _generate(server.model, jobs)

    return Side(name, answer)


def hf_peft(name: str, language: Language, folder: Path, names: Sequence[str]) -> Side:
    """`generate(adapter_names=…)` of HF PEFT, of one batch."""
    import peft

    model: Any = peft.PeftModel.from_pretrained(copied(language.model), folder / names[0], names[0])
    for adapter in names[1:]:
        model.load_adapter(folder / adapter, adapter)
    model.eval()

    def answer(jobs: Sequence[Job]) -> list[Tokens]:
        return _generate(model, jobs, adapter_names=[job.adapter or "__base__" for job in jobs])

    return Side(name, answer)


def _generate(model: Any, jobs: Sequence[Job], **options: Any) -> list[Tokens]:
    """Greedily, all at once; shorter prompts have padding before them."""
    longest = max(len(job.prompt) for job in jobs)
    pad = [[0] * (longest - len(job.prompt)) for job in jobs]
    ids = torch.tensor([[*before, *job.prompt] for before, job in zip(pad, jobs, strict=True)])
    mask = torch.tensor([[0] * len(before) + [1] * len(job.prompt) for before, job in zip(pad, jobs, strict=True)])
    new = max(job.new_tokens for job in jobs)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
    return [tuple(row[longest : longest + job.new_tokens].tolist()) for row, job in zip(out, jobs, strict=True)]

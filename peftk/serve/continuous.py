"""transformers' continuous batching, with a word in each of its steps.

This is the one file that touches names of transformers that are not part of its public API; `PRIVATE` lists them, and
`changed_names` says which of them an installed version lacks. Written against transformers 5.24.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from peftk.serve import packed_attention

PRIVATE = (
    "ContinuousBatchingManager._generation_step()",
    "ContinuousBatchingManager.batch_processor",
    "ContinuousBatchProcessor.inputs_and_outputs",
    "ContinuousBatchProcessor.model_runner",
    "ContinuousBatchingIOs.requests_in_batch",
    "ContinuousBatchingIOs.logits_indices",
    "ContinuousBatchingIOs.num_request_in_batch",
    "FutureRequestState.state",
    "FutureRequestState.query_length",
    "FutureRequestState.has_new_token",
    "ModelRunner._sample(scores, output_ids)",
)


class StepRequest(NamedTuple):
    """A request in the step that is about to run: how many of its tokens are in it, and whether a new one comes out."""

    id: str
    tokens: int
    samples: bool


class Step(NamedTuple):
    """The requests of a step in the order of their tokens. picked: int32 [P], the tokens for which there are logits."""

    requests: Sequence[StepRequest]
    picked: Tensor


class Output(NamedTuple):
    """What a request has generated so far. error: why it failed, None if it did not."""

    id: str
    tokens: list[int]
    finished: bool
    error: str | None


class Sizes(NamedTuple):
    """cache_tokens: how many tokens the KV cache holds. step_tokens, step_requests: the most that one step computes."""

    cache_tokens: int
    step_tokens: int
    step_requests: int


PAGE_TOKENS = 32  # the KV cache is given out in pages of that many tokens


class ContinuousBatching:
    """Runs a causal language model of transformers on requests that come and go.

    Args:
        around: called in the thread that runs the model with each step; the model runs within what it returns.
        sample: called with the logits [n, V] in fp32 and the ids of the n requests, returns the next tokens, int64 [n].

    Raises ImportError if transformers is missing or has other names than this file knows, and whatever transformers
    raises for a model that it cannot serve.
    """

    def __init__(
        self,
        model: Any,
        sizes: Sizes,
        around: Callable[[Step], contextlib.AbstractContextManager[None]],
        sample: Callable[[Tensor, Sequence[str]], Tensor],
    ) -> None:
        check_transformers()
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self._config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=-(-sizes.cache_tokens // PAGE_TOKENS),
            max_batch_tokens=sizes.step_tokens,
            max_requests_per_batch=sizes.step_requests,
            allow_block_sharing=False,  # blocks are found by their tokens, whatever adapter computed them
            use_async_batching=False,
            use_cuda_graph=False,
            safety_margin=0.0,
        )
        self._generation = GenerationConfig(do_sample=False, eos_token_id=-1)
        self._around, self._sample = around, sample
        self._model = model
        self._attention: str = self._model.config._attn_implementation
        if self._attention == packed_attention.NAME:
            raise ValueError("model: expected one that no open engine uses, got one that another Engine serves")
        self._manager: Any = None
        self.start()

    def start(self) -> None:
        """Starts the model's thread, anew after one that has ended; none of its requests are left then."""
        try:
            self._manager = self._model.init_continuous_batching(self._generation, self._config)
            if packed_attention.serves(self._model):
                packed_attention.use(self._model)
            self._manager.warmup()  # makes the batch processor
            self._step = self._manager._generation_step
            self._manager._generation_step = self._run_step
            self._manager.batch_processor.model_runner._sample = self._sample_rows
            self._manager.start()
        except BaseException:
            self._restore()
            raise

    def add(self, id: str, tokens: Sequence[int], max_new_tokens: int, eos_token_ids: Iterable[int]) -> None:
        """Hands in a request. Its outputs come from `next_output`, one for each new token."""
        added = self._manager.add_request(
            list(tokens), id, max_new_tokens=max_new_tokens, streaming=True, eos_token_id=list(eos_token_ids)
        )
        if added is None:
            raise RuntimeError(f"engine: expected to run, got {self.failure() or 'one that is stopping'}")

    def cancel(self, id: str) -> None:
        """Takes a request out before the next step. There is no output for it from then on."""
        self._manager.cancel_request(id)

    def next_output(self, timeout: float) -> Output | None:
        """The next output of any request; None after `timeout` seconds, or if the model's thread has ended."""
        found = self._manager.get_result(timeout=timeout)
        if found is None:
            return None
        return Output(found.request_id, found.generated_tokens, found.is_finished(), found.error)

    def failure(self) -> BaseException | None:
        """The error with which the model's thread has ended, if it has."""
        return self._manager.background_thread_status.fatal_error

    @property
    def running(self) -> bool:
        """Whether the model's thread is alive."""
        return self._manager.is_running()

    def stop(self) -> None:
        """Ends the model's thread; requests that are left get an output with an error. The model is as it was."""
        self._manager.stop(block=True, hard_stop=True)
        self._restore()

    def _restore(self) -> None:
        self._model.set_attn_implementation(self._attention)

    def _run_step(self) -> None:
        inputs = self._manager.batch_processor.inputs_and_outputs
        requests = [StepRequest(r.state.request_id, r.query_length, r.has_new_token) for r in inputs.requests_in_batch]
        step = Step(requests, inputs.logits_indices[: inputs.num_request_in_batch])
        with self._around(step):
            self._step()

    def _sample_rows(self, scores: Tensor, output_ids: Tensor) -> None:
        """Instead of ModelRunner._sample: scores [1, n, V] fp32; writes the new tokens into output_ids [1, ≥ n]."""
        requests = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        ids = [request.state.request_id for request in requests if request.has_new_token]
        if ids:
            output_ids[0, : len(ids)].copy_(self._sample(scores[0, : len(ids)], ids))


def changed_names() -> list[str]:
    """The names in `PRIVATE` that the installed transformers does not have, or has with other arguments.

    Raises ImportError if there is no continuous batching in it at all.
    """
    from transformers.generation.continuous_batching import continuous_api, input_outputs, model_runner, requests

    owners = {
        owner: getattr(module, owner, None)
        for module, names in (
            (continuous_api, ("ContinuousBatchingManager", "ContinuousBatchProcessor")),
            (input_outputs, ("ContinuousBatchingIOs",)),
            (model_runner, ("ModelRunner",)),
            (requests, ("FutureRequestState",)),
        )
        for owner in names
    }
    return [name for name in PRIVATE if not _has(owners[name.partition(".")[0]], name.partition(".")[2])]


def _has(owner: type | None, name: str) -> bool:
    """Whether a class has a method with these arguments (`method(a, b)`), or sets such an attribute."""
    if owner is None:
        return False
    method, parenthesis, rest = name.partition("(")
    if not parenthesis:
        made = inspect.getsource(owner)
        return f"self.{name} = " in made or f"self.{name}: " in made
    found = getattr(owner, method, None)
    return callable(found) and ", ".join(list(inspect.signature(found).parameters)[1:]) == rest.rstrip(")")


def check_transformers() -> None:
    """Raises ImportError if transformers is missing, or is one that this file was not written for."""
    try:
        import transformers

        changed = changed_names()
    except ImportError as error:
        raise ImportError(f"peftk.serve: expected transformers 5.24 or newer, got {error}") from error
    if changed:
        raise ImportError(
            f"peftk.serve: expected transformers as of 5.24, got {transformers.__version__}, which has changed "
            f"{', '.join(changed)}"
        )

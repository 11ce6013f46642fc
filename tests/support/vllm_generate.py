"""Generates with vLLM and prints a JSON; a process of its own, since vLLM is configured for good in each.

    python -m tests.support.vllm_generate FOLDER DTYPE

FOLDER holds `model` and one folder for each adapter. One batch with every adapter and the base model, twice; each of
its requests alone; and an adapter that takes the slot of another one (there are fewer slots than adapters).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

PROMPTS = [[5 + i, 9, 40 - i, 3, 17, 60, 2 + 2 * i] for i in range(7)]
IN_THE_MIX = [0, None, 1, 2, None, 0, 2]  # the adapter of each prompt


def main(folder: Path, dtype: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(folder / "model"),
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 26,
        enable_prefix_caching=False,
        enable_lora=True,
        max_loras=3,
        max_lora_rank=16,
        max_cpu_loras=8,
    )
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)

    def run(chosen: list[tuple[int, int | None]]) -> list[list[int]]:
        """The tokens for (prompt, adapter) of one batch."""
        loras = [None if a is None else LoRARequest(f"lora{a}", a + 1, str(folder / f"lora{a}")) for _, a in chosen]
        prompts = [{"prompt_token_ids": PROMPTS[p]} for p, _ in chosen]
        return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, greedy, lora_request=loras, use_tqdm=False)]

    mix = list(enumerate(IN_THE_MIX))
    found = {"mix": run(mix), "alone": [run([one])[0] for one in mix]}
    found["other"] = run([(0, 3), (1, None), (2, 1)])  # adapter 3 takes the slot of one of the three
    found["again"] = run(mix)
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""The process of `vllm_side.py`: reads lists of jobs, a line each, writes the new tokens. Imports nothing of peftk."""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked = json.loads(sys.argv[1])
    adapters = {name: LoRARequest(name, n + 1, path) for n, (name, path) in enumerate(asked["adapters"].items())}
    lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": 32} if adapters else {}
    llm = LLM(
        asked["model"],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_batched_tokens=1024,
        max_num_seqs=64,
        kv_cache_memory_bytes=1 << 29,
        enable_prefix_caching=False,
        **lora,
    )
    print("peftk:" + json.dumps({"plugin": "peftk" in sys.modules}), flush=True)
    for line in sys.stdin:
        jobs = json.loads(line)
        found = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _, _ in jobs],
            [SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False) for _, _, new in jobs],
            lora_request=[adapters.get(adapter) for _, adapter, _ in jobs] if adapters else None,
            use_tqdm=False,
        )
        print("peftk:" + json.dumps([list(one.outputs[0].token_ids) for one in found]), flush=True)


if __name__ == "__main__":
    main()

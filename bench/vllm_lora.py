"""vLLM with and without adapters, and with peftk's plug-in, side by side.

    python bench/vllm_lora.py MODEL ADAPTER... [--threads 1] [--rounds 3] [--dtype bfloat16]

Run it in an environment with vLLM (docs/vllm.md). MODEL and each ADAPTER are folders; every request of the batch has an
adapter of its own. Each side is a process, which stays; in every round each generates once, so that all meet the same
machine. Printed per round, and as medians: tokens per second, and tokens per second of processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SIDES = {
    "vLLM, no adapters": {"adapters": False, "plugins": ""},
    "vLLM": {"adapters": True, "plugins": ""},
    "vLLM + peftk": {"adapters": True, "plugins": "peftk"},
    "vLLM + peftk, base model only": {"adapters": None, "plugins": "peftk"},
}
PROMPT, TOKENS = 53, 32


def main() -> None:
    options = arguments()
    if options.side is not None:
        return serve(options)
    sides = {name: start(name, options) for name in options.only or SIDES}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, process in sides.items():
            rates[name].append(ask(process))
            print(f"{name:32} {rates[name][-1][0]:6.1f} tokens/s {rates[name][-1][1]:6.1f} per cpu second", flush=True)
    for process in sides.values():
        process.communicate("")
    print("\nmedians")
    for name, found in rates.items():
        wall, cpu = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"{name:32} {wall:6.1f} tokens/s {cpu:6.1f} per cpu second")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("adapter", nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", nargs="*", choices=SIDES, help="some of the sides")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def start(name: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    """The process of a side, when it is ready."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(options.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_PLUGINS": SIDES[name]["plugins"],
    }
    command = [sys.executable, __file__, options.model, *options.adapter, "--dtype", options.dtype, "--side", name]
    process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    ask(process)
    return process


def ask(process: subprocess.Popen[str]) -> tuple[float, float]:
    """One generation of a side."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("again\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):
            found = json.loads(line)
            return found["wall"], found["cpu"]
    raise SystemExit("vLLM has ended; what it said is above")


def serve(options: argparse.Namespace) -> None:
    """One side: generates each time it is asked."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapters = SIDES[options.side]["adapters"]
    lora = (
        {"enable_lora": True, "max_loras": len(options.adapter), "max_lora_rank": 32} if adapters is not False else {}
    )
    llm = LLM(
        options.model,
        dtype=options.dtype,
        max_model_len=512,
        max_num_batched_tokens=512,
        max_num_seqs=16,
        kv_cache_memory_bytes=1 << 29,
        enable_prefix_caching=False,
        **lora,
    )
    prompts = [{"prompt_token_ids": [100 + n, *range(1000, 1000 + PROMPT - 1)]} for n in range(len(options.adapter))]
    requests = [LoRARequest(path, n + 1, path) for n, path in enumerate(options.adapter)] if adapters else None
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        llm.generate(prompts, greedy, lora_request=requests, use_tqdm=False)
        tokens = TOKENS * len(prompts)
        rates = {"wall": tokens / (time.perf_counter() - wall), "cpu": tokens / (time.process_time() - cpu)}
        print("\n" + json.dumps(rates), flush=True)


if __name__ == "__main__":
    main()

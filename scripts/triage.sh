#!/bin/sh
# Builds peftk for the GPU of this machine and runs the triage (docs/gpu.md). Needs no network.
# Usage: scripts/triage.sh [arguments of `peftk selftest`, such as --out FOLDER, --kernels FOLDER, --full]
# PYTHON names the Python that has torch and triton; PEFTK_CUDA_ARCHS an architecture other than the GPU's own.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

build() { # 1: with the CUDA C++ kernels; 0: without
    PEFTK_BUILD_CUDA=$1 "$python" setup.py -q build_ext --inplace &&
        PEFTK_BUILD_CUDA=$1 "$python" -m pip install -q --no-index --no-deps --no-build-isolation -e .
}

: "${PEFTK_CUDA_ARCHS:=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)}"
export PEFTK_CUDA_ARCHS PIP_BREAK_SYSTEM_PACKAGES=1 # a lent machine's own Python will do
build 1 || { echo "The CUDA C++ kernels do not build here: their checks will not run." >&2; build 0; }
exec "$python" -m peftk.cli selftest --device cuda --triage "$@"

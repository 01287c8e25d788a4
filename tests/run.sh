#!/usr/bin/env bash
# All tests, from a fresh machine: makes .venv if it is missing, installs what the tests need, runs them.
# Arguments go to pytest: bash tests/run.sh -k sharded
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/venv.sh
ensure_venv train,test,deepspeed,mpi

export OMP_NUM_THREADS=1
# Ranks are forked, which a process that has used a GPU cannot do: everything runs on CPU first, then what is for GPUs.
CUDA_VISIBLE_DEVICES='' python -m pytest -q -p no:cacheprovider "$@"
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    python -m pytest -q -p no:cacheprovider tests/test_cuda.py tests/kernels tests/integrations/test_deepspeed_cuda.py
fi

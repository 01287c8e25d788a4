#!/usr/bin/env bash
# All tests, from a fresh machine: makes .venv if it is missing, installs what the tests need, runs them.
# Arguments go to pytest: bash tests/run.sh -k sharded
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/venv.sh
ensure_venv train,test

export OMP_NUM_THREADS=1
python -m pytest -q -p no:cacheprovider "$@"

#!/usr/bin/env bash
# muon-dist under mpirun, with a rank a GPU; the ranks find each other through mpi4py:
#     bash launch/mpirun.sh train --model 300m ...
# RANKS: another number of ranks. HOSTFILE: several machines, a line "host slots=8" each, with a rank a slot.
set -euo pipefail

if [[ -n ${HOSTFILE:-} ]]; then
    where=(--hostfile "$HOSTFILE")
else
    where=(-np "${RANKS:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}")
fi
exec mpirun "${where[@]}" python -m muon_dist.launch "$@"

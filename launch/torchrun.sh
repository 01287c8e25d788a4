#!/usr/bin/env bash
# muon-dist under torchrun, with a rank a GPU:
#     bash launch/torchrun.sh train --model 300m ...
# RANKS: another number of ranks on this machine. On several machines start it on each, with the same NODES, their
# number, and HEAD, host:port of one of them.
set -euo pipefail

ranks=${RANKS:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
meeting=(--standalone)
if ((${NODES:-1} > 1)); then
    head=${HEAD:?NODES is $NODES: set HEAD to host:port of one node, the same on all}
    meeting=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$head" --rdzv-id muon-dist)
fi
exec torchrun "${meeting[@]}" --nproc-per-node "$ranks" -m muon_dist.launch "$@"

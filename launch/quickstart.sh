#!/usr/bin/env bash
# From a fresh machine to a trained model in one command: a small Llama on the bytes of the Python standard library,
# sharded by FSDP2, once with 8-bit and once with fp32 Muon momentum, plus three steps of AdamW to measure its state.
# On CPU two ranks, on CUDA a rank a GPU. Leaves runs/quickstart/: summary.json, loss.png and a folder a run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/venv.sh
ensure_venv train

out=runs/quickstart
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if ((gpus > 0)); then
    ranks=$gpus
    batch_size=$((16 * gpus))
    dtype=bf16
else
    ranks=2
    batch_size=16
    dtype=fp32
    export OMP_NUM_THREADS=1 # one core a rank
fi

train() {
    local name=$1
    shift
    rm -rf "${out:?}/$name"
    printf '\n== %s\n' "$name"
    torchrun --standalone --nproc-per-node "$ranks" -m muon_dist.launch train \
        --engine fsdp2 --model tiny --dtype "$dtype" --batch-size "$batch_size" --out "$out/$name" "$@"
}

train linear8 --optimizer dist_muon --momentum-state linear8
train fp32 --optimizer dist_muon --momentum-state fp32
train adamw --optimizer adamw --steps 3

printf '\n'
python -m muon_dist.launch.summary "$out"

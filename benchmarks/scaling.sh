#!/usr/bin/env bash
# What matters of scaling.py, on 1, 2, 4, ... GPUs of this machine; the tables come last.
#     bash benchmarks/scaling.sh FOLDER [GPUS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=$1
gpus=${2:-$(python3 -c 'import torch; print(torch.cuda.device_count())')}
mkdir -p "$folder"

measure() {
    local ranks=$1
    shift
    torchrun --standalone --nproc-per-node "$ranks" benchmarks/scaling.py --at "$gpus" --seconds 2 \
        --out "$folder/scaling.json" "$@"
}

for ((ranks = 1; ranks <= gpus; ranks *= 2)); do
    measure "$ranks" --models llama-1b --measure step-strong step-weak --states linear8 fp32 --wires bf16 int8
    measure "$ranks" --models llama-8b --measure step-strong --wires bf16 int8
done
measure "$gpus" --models llama-1b --measure train-weak
# fp32 parameters, gradients and moments of AdamW would not fit on two GPUs of 80 GB.
measure "$gpus" --models llama-8b --measure train-weak --dtype bf16 --sequences 2 --length 4096 --only AdamW DistMuon

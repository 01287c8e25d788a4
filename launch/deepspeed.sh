#!/usr/bin/env bash
# muon-dist under DeepSpeed's launcher, with a rank a GPU:
#     bash launch/deepspeed.sh train --engine deepspeed --ds-config launch/configs/zero2.json ...
# RANKS: another number of ranks on a machine. HOSTFILE: several machines, a line "host slots=8" each; it is started on
# one of them, which reaches the others by ssh.
set -euo pipefail

exec deepspeed ${HOSTFILE:+--hostfile "$HOSTFILE"} ${RANKS:+--num_gpus "$RANKS"} --module muon_dist.launch "$@"

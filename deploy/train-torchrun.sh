#!/usr/bin/env bash
# Stage 1 on FLUX with the GPUs of one machine; the processes share the frozen networks.
#
#   deploy/train-torchrun.sh photos runs/flux_stage1
#
# On several machines, run it on each with NODES, NODE (from 0) and HEAD (address of node 0) set. All
# need the same folder of photos, and the run directory on a shared disk.
set -euo pipefail
photos=$1
run=$2

# seconds until torchrun kills processes that still save after Ctrl-C or SIGTERM
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
exec torchrun \
  --nnodes "${NODES:-1}" \
  --node-rank "${NODE:-0}" \
  --nproc-per-node gpu \
  --rdzv-backend c10d \
  --rdzv-endpoint "${HEAD:-localhost}:29500" \
  --no-python \
  pulid train flux_stage1 --data "$photos" --shard -o "$run"

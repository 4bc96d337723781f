#!/usr/bin/env bash
# LLaVA-1.5-7B on one host with 8 GPUs: one process takes all of them, and nothing has to be joined.
#   launch/gpu_host.sh DATA WORKDIR
set -euo pipefail
data=$1 workdir=$2

exec python train.py --config=configs/llava15.py --workdir="$workdir" \
    --config.data.dir="$data" --config.data.prepared \
    --config.stages.pretrain.sources.main.json=blip_laion_cc_sbu_558k.json \
    --config.stages.finetune.sources.main.json=llava_v1_5_mix665k.json \
    --config.mesh.data=1 --config.mesh.fsdp=8

#!/usr/bin/env bash
# Writes all data of LLaVA-1.5's recipe on a machine with many cores and no accelerator, and puts them into a bucket.
# Stopped, however hard, it is started again with the same command.
#   launch/prepare.sh RAW DATA gs://BUCKET/data/llava15
set -euo pipefail
raw=$1 data=$2 bucket=$3

mllm-jax prepare --config=configs/llava15.py --config.data.dir="$data" \
    --config.stages.pretrain.sources.main.json="$raw/blip_laion_cc_sbu_558k.json" \
    --config.stages.pretrain.sources.main.images="$raw/pretrain/images" \
    --config.stages.finetune.sources.main.json="$raw/llava_v1_5_mix665k.json" \
    --config.stages.finetune.sources.main.images="$raw/finetune/images"
gcloud storage rsync --recursive "$data" "$bucket"

#!/usr/bin/env bash
# What every host of a TPU slice runs: the prepared data come from a bucket onto its disk, then it trains.
#   launch/host.sh gs://BUCKET/data/llava15 gs://BUCKET/runs/llava15 [further options of train.py]
set -euo pipefail
data=$1 workdir=$2
shift 2
cd "$(dirname "$0")/.."

export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # the models are in HF_HOME: see docs/launch.md
gcloud storage rsync --recursive "$data" "$HOME/data"
exec python train.py --config=configs/llava15.py --workdir="$workdir" --distributed \
    --config.data.dir="$HOME/data" --config.data.prepared \
    --config.stages.pretrain.sources.main.json=blip_laion_cc_sbu_558k.json \
    --config.stages.finetune.sources.main.json=llava_v1_5_mix665k.json "$@"

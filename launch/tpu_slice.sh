#!/usr/bin/env bash
# LLaVA-1.5-7B, both stages, on one Cloud TPU slice: 64 chips of v5p (the name counts cores), 16 hosts of 4 chips.
#   launch/tpu_slice.sh NAME gs://BUCKET        creates the slice and trains; again: continues
set -euo pipefail
name=$1 bucket=$2
zone=${ZONE:-us-east5-a} type=${TYPE:-v5p-128} version=${VERSION:-v2-alpha-tpuv5}
tpu() { gcloud compute tpus tpu-vm "$@" --zone="$zone"; }

tpu describe "$name" >/dev/null 2>&1 || tpu create "$name" --accelerator-type="$type" --version="$version"
# The same command on every host. JAX finds the others by the slice's metadata.
tpu ssh "$name" --worker=all --command="
    set -e
    test -d mllm-jax || git clone '$REPOSITORY' mllm-jax
    pip install -q -e './mllm-jax[tpu,gcs]'
    test -d ~/models || gcloud storage cp -r '$bucket/models' ~/
    export HF_HOME=~/models
    bash mllm-jax/launch/host.sh '$bucket/data/llava15' '$bucket/runs/llava15'"

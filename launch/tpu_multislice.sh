#!/usr/bin/env bash
# The same on several slices, joined by the data center's network: rows are split over slices, parameters within one.
#   launch/tpu_multislice.sh NAME gs://BUCKET SLICES
set -euo pipefail
name=$1 bucket=$2 slices=$3
zone=${ZONE:-us-east5-a} type=${TYPE:-v5p-128} version=${VERSION:-v2-alpha-tpuv5}

gcloud compute tpus queued-resources describe "$name" --zone="$zone" >/dev/null 2>&1 ||
    gcloud compute tpus queued-resources create "$name" --zone="$zone" --node-count="$slices" \
        --node-prefix="$name" --accelerator-type="$type" --runtime-version="$version"
state=
until [[ $state == ACTIVE ]]; do
    state=$(gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)' || true)
    case $state in
    ACTIVE) ;;
    FAILED | SUSPENDED) echo "queued resource $name is $state; delete it and start again" >&2 && exit 1 ;;
    *) sleep 60 ;;
    esac
done

hosts=()
for ((slice = 0; slice < slices; slice++)); do
    gcloud compute tpus tpu-vm ssh "$name-$slice" --zone="$zone" --worker=all --command="
        set -e
        test -d mllm-jax || git clone '$REPOSITORY' mllm-jax
        pip install -q -e './mllm-jax[tpu,gcs]'
        test -d ~/models || gcloud storage cp -r '$bucket/models' ~/
        export HF_HOME=~/models
        bash mllm-jax/launch/host.sh '$bucket/data/llava15' '$bucket/runs/llava15' \
            --config.mesh.data=$slices --config.mesh.fsdp=-1" &
    hosts+=($!)
done
failed=0 # `wait` for all at once would tell of the last one only
for host in "${hosts[@]}"; do wait "$host" || failed=$?; done
exit "$failed"

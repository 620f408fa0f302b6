#!/usr/bin/env bash
# A TPU slice of several hosts, one process for each host. All hosts must see the shared
# folder, for example Filestore or a bucket mounted with Cloud Storage FUSE.
# TPU_NAME=... ZONE=... PROJECT=... bash docs/clusters/tpu_pod.sh
set -euo pipefail

: "${TPU_NAME:?name of the TPU VM}" "${ZONE:?zone of the TPU VM}"
: "${PROJECT:?project of the TPU VM}"
shared=${SHARED:-/mnt/shared}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" \
    --zone="$ZONE" --project="$PROJECT" --worker=all --command="$1"
}

# Once: the package, in an environment on each host.
on_all_hosts "cd $shared/l2rw_jax && python3 -m venv ~/venv &&
  ~/venv/bin/pip install --quiet '.[experiments,tpu]'"

on_all_hosts "cd $shared/l2rw_jax && ~/venv/bin/python -m experiments.cifar_noise \
  --distributed --initialization_timeout=300 \
  --preset=l2rw_background --methods=uniform,l2rw \
  --batch_size=128 --meta_batch_size=128 \
  --data_dir=$shared/tensorflow_datasets --workdir=$shared/runs/cifar_noise"

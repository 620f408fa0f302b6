#!/usr/bin/env bash
# Two processes on this machine, with four virtual CPU devices each, train one run
# together. Run it from a checkout: bash docs/clusters/two_processes.sh [FOLDER]
set -euo pipefail

workdir=${1:-runs/two_processes}
port=${PORT:-8476}
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4

pids=()
for process in 0 1; do
  python -m experiments.digits_noise \
    --coordinator_address="localhost:$port" --num_processes=2 \
    --process_id="$process" --initialization_timeout=60 \
    --methods=uniform,l2rw --num_seeds=1 --num_steps=40 --batch_size=40 \
    --workdir="$workdir" &
  pids+=($!)
done

# The status is that of the first process that failed.
status=0
for pid in "${pids[@]}"; do
  wait "$pid" || status=$?
done
exit "$status"

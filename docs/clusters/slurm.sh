#!/usr/bin/env bash
# Four machines with eight GPUs each, one process for each GPU: under Slurm, JAX gives
# a process the GPU with the local index of the process. Submit it from a checkout on
# a file system that all machines share: sbatch docs/clusters/slurm.sh
#SBATCH --job-name=l2rw_jax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%j.log
# Every process gets SIGTERM ten minutes before the time limit, and when the job is
# preempted. It saves a checkpoint then and ends with status 143.
#SBATCH --signal=TERM@600
#SBATCH --requeue
set -euo pipefail

# The virtual environment with the package, its experiments and CUDA:
# pip install '.[experiments,cuda12]'
source .venv/bin/activate

status=0
srun --kill-on-bad-exit=1 python -m experiments.cifar_noise \
  --distributed --initialization_timeout=300 \
  --preset=l2rw_background --methods=uniform,l2rw \
  --batch_size=128 --meta_batch_size=128 \
  --data_dir="$HOME/tensorflow_datasets" --workdir=runs/cifar_noise || status=$?
# The same command continues a run that was stopped, or that lost a process (75).
if [ "$status" = 143 ] || [ "$status" = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

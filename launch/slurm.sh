#!/bin/bash
# Trains on one node or on several:
#
#   sbatch launch/slurm.sh --config=finetune:resnet50 \
#     --workdir=runs/f1 --config.data=manifest.csv
#   sbatch --nodes=2 --ntasks-per-node=4 --cpus-per-task=4 launch/slurm.sh ...
#
# One task is one process with all GPUs of its node; several tasks are one
# process for each GPU (ntasks-per-node = gpus-per-node) and train together.
# Partition, account and modules are the cluster's own: add them here or to the
# command.

#SBATCH --job-name=jaxtransfer
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before its time is over the run is asked to save and end.
#SBATCH --signal=TERM@120

set -u

distributed=()
if ((SLURM_NTASKS > 1)); then
  distributed=(--distributed)
fi

# srun does not take over the cores of a task by itself.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  "${JAXTRANSFER:-jaxtransfer}" ${distributed[@]+"${distributed[@]}"} "$@"
code=$?

# Saved and not finished: the same command goes on.
if ((code == 143)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

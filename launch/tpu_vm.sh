#!/bin/bash
# Trains on every host of a Cloud TPU slice:
#
#   TPU_NAME=my-slice ZONE=europe-west4-b launch/tpu_vm.sh \
#     --config=finetune:resnet50 --workdir=runs/f1 \
#     --config.data=/data/manifest.csv --config.dtype=bfloat16
#
# Every host needs a clone of this repository in ~/jaxtransfer with its
# environment in .venv (and JAX's TPU build in it), and the images at the same
# path. The workdir is on the first host, or on a disk that it mounts.

set -euo pipefail

printf -v arguments '%q ' "$@"
exec gcloud compute tpus tpu-vm ssh \
  "${TPU_NAME:?the name of the slice}" --zone="${ZONE:?its zone}" \
  --worker=all \
  --command="cd ~/jaxtransfer && .venv/bin/jaxtransfer --distributed $arguments"

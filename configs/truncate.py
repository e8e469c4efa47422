"""Where to cut a network that is fine-tuned on your images, and what it gives.

jaxtransfer --config=truncate:resnet50 --workdir=runs/truncate \
  --config.data=manifest.csv

Trains the network cut after every block, then after every layer around the best
block, beside the whole network, other ways of fine-tuning and small networks
from scratch, each for three seeds. Ends with runs/truncate/report.html and
runs/truncate/export/model.safetensors. The same command again, after any stop,
goes on where it was; started several times at once, the processes share the
work.

A ResNet-50 is 90 to 129 trainings of 200 epochs at most: work for GPUs. A
laptop wants fewer and shorter ones, with `--config.seeds=1 --config.epochs=20
--config.methods=ttl --config.small=` 7 to 15. The same command with `--dry_run`
says how many they are and how long they take on the images and the machine at
hand.
"""

import ml_collections

from jaxtransfer import configuration


def get_config(network: str = "resnet50") -> ml_collections.ConfigDict:
  """Returns the job's config; the argument is the network's name."""
  config = configuration.shared("truncate", network)
  configuration.training(config)
  config.taps = "blocks"  # first stage; or layers with commas, or "layers"
  config.methods = "ttl,lwft,fat,tf"  # with ttl, which decides the cut
  config.layerwise = "ttl,lwft"  # methods with a second stage, layer by layer
  config.layer_step = 1  # of the second stage: 2 = every other layer
  config.small = "cbr_larget,cbr_largew,cbr_small,cbr_tiny"  # "" = none
  config.random = True  # also each method's best from random weights
  config.seeds = 3  # trainings of every cut
  config.folds = 0  # 3 or more: cross-validation in place of seeds
  config.metric = "auroc"  # of validation, chooses the cut
  config.epoch_metric = "loss"  # of validation, chooses the epoch
  config.tolerance = 0.01  # loss of the metric that a shallower cut may cost
  config.halving = 0  # rounds that drop the worse half of the cuts
  config.cost_batch_size = 64  # images a step when throughput is measured
  return config

"""Trains a pretrained network up to a cut, with a fresh head, on your images.

jaxtransfer --config=finetune:resnet50 --workdir=runs/finetune \
  --config.data=manifest.csv --config.network.until=layer3

The defaults are Peng et al.'s: Adam at 1e-4, halved when the validation loss
stays for five epochs, ended below 1e-6, class-weighted cross-entropy, random
resized crops and mirror images. Ends with runs/finetune/report.html and
runs/finetune/export/model.safetensors. The same command again, after any stop,
goes on where it was.

For orientation, the 917 cells of seven classes of the Herlev set at 64 pixels,
with ResNet-18 and the weights in the package:

jaxtransfer --config=finetune:resnet18 --workdir=runs/herlev \
  --config.data=herlev/manifest.csv --config.data.image_size=64 \
  --config.network.weights=cifar10-resnet18 --config.network.until=layer3 \
  --config.epochs=10

took 142 seconds of processor time on a machine with 2 cores, and came out at a
test AUROC of 0.860 [0.823, 0.892] after the last of the epochs: more of them
would help.
"""

import ml_collections

from jaxtransfer import configuration


def get_config(network: str = "resnet50") -> ml_collections.ConfigDict:
  """Returns the job's config; the argument is the network's name."""
  config = configuration.shared("finetune", network)
  configuration.training(config)
  config.train_from = ""  # "" = all; a layer = it and what follows; "head"
  config.metric = "loss"  # of validation, chooses the epoch; or auroc, ...
  return config

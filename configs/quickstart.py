"""The main job on drawn tissue, with the weights in the package: no download.

jaxtransfer --config=configs/quickstart.py --workdir=runs/quickstart

ResNet-18 up to layer3, trained on CIFAR-10's photographs, against three random
initialisations, on 1,500 synthetic tiles of 60 patients. Ends in under three
minutes on two cores with runs/quickstart/report.html.
"""

import ml_collections

from jaxtransfer import configuration


def get_config(network: str = "resnet18") -> ml_collections.ConfigDict:
  """Returns the `layers` job's config for the built-in data and weights."""
  config = configuration.shared("layers", network)
  return config

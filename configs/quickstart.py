"""The main job on drawn tissue, with the weights in the package: no download.

jaxtransfer --config=quickstart --workdir=runs/quickstart

ResNet-18 up to layer3, trained on CIFAR-10's photographs, against three random
initialisations, on 1,500 synthetic tiles of 60 patients. Ends in under three
minutes on two cores with runs/quickstart/report.html: cut after layer1.1, whose
AUROC is 0.928 [0.905, 0.948] with 6 % of the parameters, 0.049 above random
weights; layer3.1, the deepest, comes to 0.910.
"""

import pathlib
import runpy

import ml_collections


def get_config(network: str = "resnet18") -> ml_collections.ConfigDict:
  """Returns the `layers` job's config for the built-in data and weights."""
  defaults = runpy.run_path(str(pathlib.Path(__file__).with_name("layers.py")))
  config = defaults["get_config"](network)
  config.data.source = "synthetic:tissue"
  config.data.image_size = 96  # pixels; a tile is 96 x 96 micrometres
  config.network.weights = "cifar10-resnet18"  # in jaxtransfer/assets
  config.network.until = "layer3"  # the embedded weights end there
  config.taps = "layers"
  config.seeds = 3
  return config

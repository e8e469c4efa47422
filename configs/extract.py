"""Encodes the tiles of slides, or images, into feature files.

jaxtransfer --config=extract:resnet50 --workdir=runs/features \
  --config.data=slides/ --config.coords=runs/tiles

Of slides it needs coordinates: a workdir of `tile`, or a folder of TRIDENT's or
CLAM's. Ends with runs/features/features/<encoder>/<slide>.h5, which CLAM,
TRIDENT and torchmil read, and runs/features/report.html. Several networks and
several cuts of each take one pass over the tiles:

jaxtransfer --config=extract --workdir=runs/features --config.data=slides.csv \
  --config.coords=runs/tiles --config.taps=layer1,layer2,layer3,layer4 \
  --config.networks=resnet18@imagenet,resnet50@imagenet

CLAM's own encoder is resnet50 with --config.network.until=layer3 and
--config.data.image_size=224.
"""

import ml_collections

from jaxtransfer import configuration


def get_config(network: str = "resnet50") -> ml_collections.ConfigDict:
  """Returns the job's config; the argument is the network's name."""
  config = configuration.shared("extract", network)
  config.coords = ""  # of slides: a workdir of tile, TRIDENT's, CLAM's folder
  config.bag = ""  # of images: slide, group or folder; "" = the first known
  config.networks = (
    ""  # name@weights,name@weights; "" = network.name with network.weights
  )
  config.taps = "end"  # the network's own features; blocks, layers, or names
  config.features_dtype = "float16"  # or float32
  config.layout = "trident"  # which CLAM reads too; or stamp
  config.data.image_size = 0  # pixels of a tile; 0 = its own, of images 224
  config.data.max_failures = 0.01  # unreadable share with which a slide fails
  # Nothing is divided here.
  for key in ("split_fractions", "few_shot", "near_duplicates"):
    del config.data[key]
  return config

"""What a finished run's network says of new images, and how good it is there.

jaxtransfer --config=predict --workdir=runs/new --config.run=runs/finetune \
  --config.data=new_tiles

takes the network that `finetune` or `truncate` exported, and resizes, crops and
normalises images as it was trained with; nothing of this is to be said again.
Ends with runs/new/predictions.csv, calibrated, and runs/new/report.html. Where
labels are known (a column `label`, or folders named as the classes), the scores
with their intervals, too: an external validation.
"""

import ml_collections

from jaxtransfer import configuration


def get_config(run: str = "") -> ml_collections.ConfigDict:
  """Returns the job's config; the argument is the finished run's workdir."""
  config = configuration.shared("predict", "")
  # The finished run says all this.
  del config.network, config.data.image_size, config.data.split_fractions
  del config.data.few_shot, config.data.near_duplicates
  config.run = run  # workdir of a finished finetune or truncate, or its export
  config.data.features = ""  # of slides: the features of their tiles, a folder
  config.data.coords = ""  # of slides: a workdir of tile, to encode them here
  config.data.slides = ""  # their own files, for pictures; "" = data.source
  config.data.cache = 4.0  # GB of features kept in memory
  config.weights = ""  # of slides' encoder, where its files name no published
  config.heatmaps = 12  # slides on the page with their tiles; 0 = none
  config.resamples = 1000  # of the groups, for the intervals
  config.prevalence = 0.0  # of the positive among the tested; 0 = as in the run
  return config

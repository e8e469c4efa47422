"""Trains a pretrained network up to a cut, with a fresh head, on your images.

jaxtransfer --config=configs/finetune.py:resnet50 --workdir=runs/finetune \
  --config.data=manifest.csv --config.network.until=layer3

The defaults are Peng et al.'s: Adam at 1e-4, halved when the validation loss
stays for five epochs, ended below 1e-6, class-weighted cross-entropy, random
resized crops and mirror images. Ends with runs/finetune/report.html and
runs/finetune/export/model.safetensors. The same command again, after any stop,
goes on where it was.
"""

import ml_collections

from jaxtransfer import configuration


def get_config(network: str = "resnet50") -> ml_collections.ConfigDict:
  """Returns the job's config; the argument is the network's name."""
  config = configuration.shared("finetune", network)
  config.network.head = "gap"  # "flatten" = linear on the whole last map
  config.many_labels = False  # True: `a;b` and `a;?b`, see data/labels.py
  config.train_from = ""  # "" = all; a layer = it and what follows; "head"
  config.batch_norm = "train"  # or train_per_device, eval, frozen
  config.epochs = 200  # at most
  config.metric = "loss"  # of validation, chooses the epoch; or auroc, ...
  config.accumulate = 1  # parts of a batch, one after the other, for memory
  config.average = 0.0  # decay of averaged weights, e.g. 0.999; 0 = none
  config.resamples = 1000  # of the groups, for the intervals
  config.log_steps = 50
  config.checkpoint_steps = 500  # and after every epoch
  config.checkpoints = 2  # kept; each holds the best epoch's weights too

  config.optimiser = ml_collections.ConfigDict()
  config.optimiser.name = "adam"  # or adamw, sgd (Nesterov)
  config.optimiser.learning_rate = 1e-4  # of the head
  config.optimiser.backbone = 1.0  # of the rest, as a share; LWFT: 0.1
  config.optimiser.momentum = 0.9  # of sgd
  config.optimiser.weight_decay = 0.0  # of kernels
  config.optimiser.clip_norm = 0.0  # largest gradient norm; 0 = any

  config.schedule = ml_collections.ConfigDict()
  config.schedule.name = "plateau"  # or constant, cosine, one_cycle
  config.schedule.warmup_epochs = 0.0  # of cosine
  config.schedule.factor = 0.5  # of plateau
  config.schedule.patience = 5  # of plateau, epochs
  config.schedule.floor = 1e-6  # of plateau: training ends below it

  config.loss = ml_collections.ConfigDict()
  config.loss.class_weights = "balanced"  # or "none"
  config.loss.label_smoothing = 0.0

  config.augment = ml_collections.ConfigDict()
  config.augment.crop = 0.08  # smallest share of the area kept; 1 = no crop
  config.augment.flip_horizontal = True
  config.augment.flip_vertical = False
  config.augment.quarter_turns = False
  config.augment.stain = 0.0  # of hematoxylin and eosin; e.g. 0.05
  config.augment.brightness = 0.0
  config.augment.contrast = 0.0
  config.augment.saturation = 0.0
  config.augment.hue = 0.0  # share of the circle
  return config

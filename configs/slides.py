"""What a slide is, from the features of its tiles; encoders side by side.

jaxtransfer --config=slides --workdir=runs/slides \
  --config.data=labels.csv --config.data.features=runs/extract

`labels.csv` has the columns slide, label and, so that no patient is trained and
tested on, group; the folder holds one feature file for each slide, of `extract`
or of TRIDENT, CLAM or STAMP. Several folders, with commas between, are encoders
that are compared on the same slides. Every encoder is cross-validated by
patients with a pooling network of its own. Ends with runs/slides/report.html,
and the attention of every tile of every tested slide in runs/slides/attention/.
The same command again, after any stop, goes on where it was; started several
times at once, the processes share the work.

What follows the colon is a preset, a published network with its schedule:
`--config=slides:histotransfer` (the default), `ilse`, `clam` or `eva`. Every
key of it can be given another value; docs/slides.md has their sources.
"""

from typing import Any

import ml_collections

from jaxtransfer import configuration, errors

# What each preset says otherwise than histotransfer; see docs/slides.md.
PRESETS: dict[str, dict[str, Any]] = {
  "histotransfer": {},
  "ilse": {
    "pooling.embedding": (256, 128, 64),
    "pooling.attention": 64,
    "pooling.dropout": 0.5,
    "optimiser.name": "sgd",
    "optimiser.learning_rate": 5e-4,
    "optimiser.weight_decay": 5e-3,
    "epochs": 100,
  },
  "clam": {
    "pooling.name": "gated_attention",
    "pooling.embedding": (512,),
    "pooling.attention": 256,
    "pooling.dropout": 0.25,
    "pooling.attention_dropout": 0.25,
    "optimiser.learning_rate": 2e-4,
    "optimiser.weight_decay": 1e-5,
    "epochs": 200,
    "patience": 20,
    "least_epochs": 50,
    "epoch_metric": "loss",
    "ties": "first",
    "sampling": "balanced",
  },
  "eva": {
    "pooling.name": "gated_attention",
    "pooling.embedding": (128,),
    "pooling.attention": 128,
    "optimiser.name": "adamw",
    "batch_size": 32,
    "bag_size": 10_000,
    "epochs": 100,
    "epoch_metric": "balanced_accuracy",
    "ties": "first",
  },
}


def get_config(preset: str = "histotransfer") -> ml_collections.ConfigDict:
  """Returns the job's config; the argument is a preset's name."""
  if preset not in PRESETS:
    raise errors.UsageError(
      f"--config=slides:{preset}: there is no such preset"
      f"{errors.nearest(preset, PRESETS)}; there are {', '.join(PRESETS)}"
    )
  config = configuration.basics("slides")
  configuration.optimisation(config)
  config.data.source = ""  # CSV: slide,label and perhaps group (patient), split
  config.data.features = ""  # folders of feature files, with commas between
  config.data.max_failures = 0.1  # share of slides that may lack features
  config.data.few_shot = 0  # train slides of each class; 0 = all
  config.networks = ""  # name@weights,... to encode tiles here, in place of it
  config.taps = "end"  # of these networks; blocks, layers, or names
  config.data.coords = ""  # where their tiles are: a workdir of tile
  config.data.image_size = 0  # pixels of a tile for them; 0 = its own
  config.data.slides = ""  # their own files: a folder or CSV; "" = data.source
  config.data.workers = 0  # processes that read slides; 0 = threads
  config.data.max_pixels = 100_000_000  # of a picture decoded whole
  config.data.cache = 4.0  # GB of features kept in memory; the rest is reread
  config.batch_size = 1  # bags of a step
  config.bag_size = 0  # tiles drawn of a larger bag in training; 0 = all
  config.sampling = "shuffle"  # or "balanced": each class as often
  config.folds = (
    5  # cross-validation; 0 = the CSV's splits, or one that is drawn
  )
  config.seeds = 1  # trainings of each fold
  config.metric = "auroc"  # of validation, chooses the encoder
  config.epoch_metric = "accuracy"  # of validation, chooses the epoch
  config.ties = "last"  # which of equally good epochs; or "first"
  config.epochs = 20  # at most
  config.patience = 0  # epochs without a better one that end it; 0 = any
  config.least_epochs = 0  # those before patience ends it
  config.checkpoint_seconds = 30.0  # between two checkpoints, at least
  config.heatmaps = 12  # slides on the page with their tiles; 0 = none
  config.tile_scores = True  # writes attention/, of every tile of tested slides

  config.pooling = ml_collections.ConfigDict()
  config.pooling.name = "attention"  # or gated_attention, mean, max; commas
  config.pooling.embedding = (256, 64)  # widths of the layers before it
  config.pooling.attention = 32  # width of its hidden layer
  config.pooling.dropout = 0.0  # after each embedding layer
  config.pooling.attention_dropout = 0.0  # in its hidden layer

  config.topk = ml_collections.ConfigDict()
  config.topk.tiles = 0  # of each slide that train its encoder; 0 = none, or 64
  config.topk.weights = ""  # of the encoders; "" = as their files call them
  config.topk.epochs = 20  # at most
  config.topk.learning_rate = 1e-5  # of encoder and pooling network
  config.topk.batch_size = 1  # slides of a step
  config.topk.encode_batch_size = 64  # tiles at a time, when encoded again

  config.optimiser.learning_rate = 1e-3  # at the schedule's peak
  config.schedule.name = "constant"  # or cosine, one_cycle, plateau
  config.loss.class_weights = "none"  # or "balanced"
  config.update_from_flattened_dict(PRESETS[preset])
  return config

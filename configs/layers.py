"""What every layer of a pretrained network is worth on your images.

jaxtransfer --config=layers:resnet50 --workdir=runs/layers \
  --config.data=manifest.csv

Ends with runs/layers/report.html: score against depth for the pretrained
network and for the same network with random weights, the gain, the cost of
every cut, and the layer after which to cut.
"""

import ml_collections

from jaxtransfer import configuration


def get_config(network: str = "resnet50") -> ml_collections.ConfigDict:
  """Returns the job's config; the argument is the network's name."""
  config = configuration.shared("layers", network)
  config.taps = "blocks"  # "layers" = every one; or "layer1.0,layer2,layer3"
  config.seeds = 5  # networks with random weights to compare with
  config.tolerance = 0.02  # loss of the metric that a cut may cost
  config.metric = "auroc"  # or auprc, accuracy, balanced_accuracy
  config.probes = (
    "logistic,linear_svm,knn,nearest_mean"  # the first decides the cut
  )
  config.strengths = tuple(10.0**k for k in range(-6, 4))  # scikit-learn's C
  config.resamples = 1000  # of the groups, for the intervals
  config.cost_batch_size = 32  # images a step when speed is measured
  return config

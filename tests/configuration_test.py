"""Values that no job can mean, refused by name before any work."""

import pytest

from jaxtransfer import configuration, errors


def _config(**changes):
  config = configuration.shared("finetune", "resnet18")
  configuration.training(config)
  config.update_from_flattened_dict(changes)
  return config


def test_the_defaults_hold():
  configuration.check(_config())


@pytest.mark.parametrize(
  ("key", "values", "says"),
  [
    ("data.image_size", (-1, 0, 1, 7, 10**6), "7 x 7 pixels"),
    ("data.max_pixels", (-1, 0), "at least 1"),
    ("data.max_failures", (-0.1, 1.1, float("nan")), "0|finite"),
    ("data.few_shot", (-1,), "at least 0"),
    ("data.workers", (-1, 10**6), "at least 0"),
    ("batch_size", (-1, 0, 10**9), "at least 1"),
    ("epochs", (-1, 0, 10**9), "at least 1"),
    ("seed", (-1, 2**32), "4294967295"),
    ("average", (float("nan"),), "finite"),
    ("augment.hue", (float("inf"),), "finite"),
    ("loss.label_smoothing", (float("nan"),), "finite"),
    ("data.split_fractions", ((0.6, float("nan"), 0.2),), "finite"),
  ],
)
def test_values_out_of_range_are_refused_in_one_line(key, values, says):
  for value in values:
    with pytest.raises(errors.UsageError, match=says) as caught:
      configuration.check(_config(**{key: value}))
    assert str(caught.value).startswith(f"config.{key} is ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("data.image_size", 8),
    ("data.max_pixels", 10**12),
    ("data.max_failures", 0.0),
    ("data.max_failures", 1.0),
    ("data.few_shot", 0),
  ],
)
def test_the_ends_of_a_range_are_in_it(key, value):
  configuration.check(_config(**{key: value}))

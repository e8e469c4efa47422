"""What stands beside the numbers decides where the numbers cannot."""

import json

import pytest

from jaxtransfer import errors
from jaxtransfer.weights import hub


def check(tmp_path, network, config=None, **said):
  """Reads a config.json beside a file that need not be there."""
  if config is not None:
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
  return hub.check_architecture(network, tmp_path / "model.safetensors", said)


def refuses(tmp_path, network, *words, **options):
  with pytest.raises(errors.UsageError) as caught:
    check(tmp_path, network, **options)
  assert "\n" not in str(caught.value)
  for word in words:
    assert word in str(caught.value), str(caught.value)


SAME = [
  ("resnet50", "resnet50"),
  ("resnet50", "resnet50.a1_in1k"),
  ("resnet50", "timm/resnet50.tv_in1k"),
  ("resnet50", "tv_resnet50"),
  ("resnet18", "swsl_resnet18"),
  ("resnet50", "gluon_resnet50_v1b"),
  ("resnet50", "microsoft/resnet-50"),
  ("wide_resnet50_2", "wide_resnet50_2.tv_in1k"),
  ("resnext50_32x4d", "resnext50_32x4d"),
  ("densenet121", "densenet121.ra_in1k"),
]
OTHERS = [
  ("resnet50", "resnetaa50"),
  ("resnet50", "resnetaa50d.sw_in12k"),
  ("resnet50", "resnetblur50"),
  ("resnet50", "resnet50d"),
  ("resnet50", "resnet50_gn"),
  ("resnet50", "resnet50_v1c"),
  ("resnet50", "wide_resnet50_2"),
  ("resnet50", "resnext50_32x4d"),
  ("resnet50", "seresnet50"),
  ("resnet50", "ecaresnet50t"),
  ("resnet50", "resnetrs50"),
  ("resnet50", "resnest50d"),
  ("resnet50", "resnetv2_50"),
  ("resnet50", "resnet34"),
  ("resnet34", "resnet50"),
  ("resnext50_32x4d", "seresnext50_32x4d"),
  ("densenet121", "densenetblur121d"),
  ("densenet121", "densenet169"),
]


@pytest.mark.parametrize("network, name", SAME)
def test_the_networks_own_names(tmp_path, network, name):
  """As timm, transformers and people write them: its function is known."""
  assert check(tmp_path, network, {"architecture": name})
  assert not check(tmp_path / "none", network, arch=name)


@pytest.mark.parametrize("network, name", OTHERS)
@pytest.mark.parametrize("where", ["config", "inner", "said"])
def test_other_architectures_are_refused_by_name(
  tmp_path, network, name, where
):
  """In a config.json, and in what a file says of itself."""
  if where == "said":
    options = {"arch": name}
  else:
    config = {"architecture": name}
    options = {
      "config": config if where == "config" else {"pretrained_cfg": config}
    }
  refuses(tmp_path, network, name.split(".")[0], network, **options)


def test_one_of_ours_is_offered(tmp_path):
  config = {"architecture": "resnet34"}
  refuses(tmp_path, "resnet50", "give resnet34", config=config)
  config = {"architecture": "resnetaa50"}
  refuses(tmp_path, "resnet50", "known are", "resnet101", config=config)


@pytest.mark.parametrize(
  "name",
  [
    "my-best-run",
    "ResNet",
    "moco",
    "simclr_resnet50",
    "resnet50-fold3",
    "my_resnet_2024",
    "TumourNet",
    "",
  ],
)
def test_names_of_runs_are_no_architectures(tmp_path, name):
  """A script's own words refuse nothing, and assure of nothing."""
  assert not check(tmp_path, "resnet50", model_name=name, arch=name)
  assert not check(tmp_path, "resnet50", {"model_name": name})


@pytest.mark.parametrize(
  "config, word",
  [
    ({"model_type": "resnet", "downsample_in_bottleneck": True}, "bottleneck"),
    ({"model_type": "resnet", "downsample_in_first_stage": True}, "first"),
    ({"model_type": "resnet", "hidden_act": "gelu"}, "gelu"),
    ({"backbone_config": {"downsample_in_bottleneck": True}}, "bottleneck"),
    ({"architecture": "resnet50", "model_args": {"output_stride": 16}}, "16"),
    ({"model_args": {"aa_layer": "blurpool"}}, "aa_layer"),
    ({"model_args": {"act_layer": "silu"}}, "silu"),
    ({"replace_stride_with_dilation": [False, False, True]}, "dilation"),
  ],
)
def test_another_function_under_the_same_names_is_refused(
  tmp_path, config, word
):
  """What no tensor shows, and a config does."""
  refuses(tmp_path, "resnet50", word, "something else", config=config)


@pytest.mark.parametrize(
  "config",
  [
    {
      "model_type": "resnet",
      "downsample_in_bottleneck": False,
      "hidden_act": "relu",
    },
    {
      "architecture": "resnet50",
      "model_args": {"num_classes": 2, "output_stride": 32},
      "replace_stride_with_dilation": [False, False, False],
    },
  ],
)
def test_the_usual_function_is_known(tmp_path, config):
  assert check(tmp_path, "resnet50", config)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '"a"', "\xff"])
def test_a_broken_config_says_nothing(tmp_path, text):
  """The numbers are what counts; damaged words beside condemn none."""
  assert not check(tmp_path, "resnet50", text)


def test_statistics(tmp_path):
  path = tmp_path / "model.safetensors"
  assert hub.statistics(path) == {}
  (tmp_path / "preprocessor_config.json").write_text(
    json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
  )
  assert hub.statistics(path) == {
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
  }
  (tmp_path / "config.json").write_text(
    json.dumps({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})
  )
  assert hub.statistics(path)["mean"] == [0.5] * 3


def test_hostile_names_reach_no_terminal(tmp_path):
  refuses(tmp_path, "resnet50", "\\x1b", arch="\x1b[2Jresnet34\n")

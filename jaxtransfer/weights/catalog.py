"""Published weights by name: where they are, and how their images are made.

No digest and no revision here is a guess: where none is known the row says
None, the file's digest is stored on first use in the cache's `digests.json`,
and every later use is checked against it.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from jaxtransfer import errors, files
from jaxtransfer.weights import download

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ASSETS = pathlib.Path(__file__).parent.parent / "assets"


@dataclasses.dataclass(frozen=True)
class Row:
  """One published set of weights.

  Attributes:
    name: what `weights=` accepts; unique.
    network: the zoo's name of the network it fits.
    file: the file's name, here and in the cache.
    source: an https URL, `hub:owner/repository`, `asset` for a file of this
      package, or, where no stable address exists, a sentence that says where
      people get the file.
    revision: the hub commit; None where none is known.
    sha256: the file's digest, or the beginning of it that its publisher put
      into its name, or None where none is known.
    licence: as its publisher states it.
    mean: per RGB channel, for pixels scaled to [0, 1].
    std: likewise.
    final_relu: whether the features were made for torchvision's final ReLU
      of DenseNet; ResNets always end in theirs.
    note: what else a user should know.
  """

  name: str
  network: str
  file: str
  source: str
  revision: str | None = None
  sha256: str | None = None
  licence: str = "not stated"
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD
  final_relu: bool = True
  note: str = ""

  @property
  def where(self) -> str:
    """Where the file comes from, in words."""
    if self.source == "asset":
      return "in this package"
    if self.source.startswith("hub:"):
      at = f", revision {self.revision}" if self.revision else ""
      return f"https://huggingface.co/{self.source.removeprefix('hub:')}{at}"
    return self.source

  @property
  def known(self) -> str:
    """How much of the file's digest is known before it is first used."""
    if self.source == "asset":
      return ""
    if not self.sha256:
      return "not known; that of its first use is kept and checked"
    if len(self.sha256) < 64:
      return f"its first {len(self.sha256)} digits are known"
    return "known"


_TORCHVISION_LICENCE = "BSD-3-Clause (torchvision); ImageNet's terms apply"
_LUNIT_URL = (
  "https://github.com/lunit-io/benchmark-ssl-pathology/releases/download/"
  "pretrained-weights/"
)
_LUNIT = {
  "network": "resnet50",
  "licence": "Lunit's public licence: research only, non-commercial",
  # The publisher documents these statistics for its ViT-S of the same study.
  "mean": (0.70322989, 0.53606487, 0.66096631),
  "std": (0.21716536, 0.26081574, 0.20723464),
  "note": "no head; mean and std are unverified for its ResNet-50",
}


def _torchvision(file: str, version: str, digest: str | None = None) -> Row:
  """Makes the row of `<network>-<first 8 digits of its SHA-256>.pth`."""
  network, start = file.removesuffix(".pth").rsplit("-", 1)
  return Row(
    f"{network}.{version}",
    network,
    file,
    f"https://download.pytorch.org/models/{file}",
    sha256=digest or start,
    licence=_TORCHVISION_LICENCE,
  )


def _timm(
  name: str, revision: str | None, sha256: str | None, licence: str
) -> Row:
  """Makes the row of a model of timm's on the hub."""
  return Row(
    name,
    name.split(".")[0],
    "model.safetensors",
    f"hub:timm/{name}",
    revision=revision,
    sha256=sha256,
    licence=licence,
  )


_ROWS: Sequence[Row] = (
  _torchvision(
    "resnet18-f37072fd.pth",
    "imagenet",
    "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
  ),
  _torchvision("resnet34-b627a593.pth", "imagenet"),
  _torchvision(
    "resnet50-0676ba61.pth",
    "imagenet",
    "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
  ),
  _torchvision("resnet101-63fe2227.pth", "imagenet"),
  _torchvision("resnet152-394f9c45.pth", "imagenet"),
  _torchvision("wide_resnet50_2-95faca4d.pth", "imagenet"),
  _torchvision("resnext50_32x4d-7cdf4587.pth", "imagenet"),
  _torchvision("densenet121-a639ec97.pth", "imagenet"),
  _torchvision("densenet161-8d451a50.pth", "imagenet"),
  _torchvision("densenet169-b2777c0a.pth", "imagenet"),
  _torchvision("densenet201-c1103571.pth", "imagenet"),
  _torchvision("resnet50-11ad3fa6.pth", "imagenet-v2"),
  _torchvision("resnet101-cd907fc2.pth", "imagenet-v2"),
  _torchvision("resnet152-f82ba261.pth", "imagenet-v2"),
  _torchvision("wide_resnet50_2-9ba9bcbe.pth", "imagenet-v2"),
  _torchvision("resnext50_32x4d-1a0047aa.pth", "imagenet-v2"),
  _timm(
    "resnet18.tv_in1k",
    "bbd144b3e5565108aad885f145491d11bc6ce807",
    "694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81",
    _TORCHVISION_LICENCE,
  ),
  _timm(
    "resnet34.tv_in1k",
    "1b7b21cca82ff974d341713f777bf740c2db38c4",
    "0bb82595a564991a9d424708b33f5d843f5aaed7f6c0886ff10849ff97022235",
    _TORCHVISION_LICENCE,
  ),
  _timm(
    "resnet50.tv_in1k",
    "78f3ecfdb38e06d9b8397f662e7ab8fee96026fa",
    "5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888",
    _TORCHVISION_LICENCE,
  ),
  _timm(
    "resnet50.a1_in1k",
    "767268603ca0cb0bfe326fa87277f19c419566ef",
    "773525d5821de224f8f30c33377b7a795d7863e08522698200d3217d3f2a41bb",
    "Apache-2.0 (timm); ImageNet's terms apply",
  ),
  _timm(
    "densenet121.tv_in1k",
    "f0d0f2698a02cb133b09d48396db6e1e46fe9f3b",
    "c894c6d9caa317a8ca1942986dee7a16a86c77734a4d691d2abe05389cfef358",
    _TORCHVISION_LICENCE,
  ),
  _timm(
    "densenet121.ra_in1k",
    None,
    None,
    "Apache-2.0 (timm); ImageNet's terms apply",
  ),
  Row(
    "kimianet",
    "densenet121",
    "KimiaNetPyTorchWeights.pth",
    "Kimia Lab, https://kimialab.uwaterloo.ca/kimia/ (KimiaNet), after its"
    " agreement",
    licence="Kimia Lab's end-user agreement",
    final_relu=False,
    note="features are norm5 averaged without the final ReLU; head of 30",
  ),
  Row(
    "ciga-resnet18",
    "resnet18",
    "pytorchnative_tenpercent_resnet18.ckpt",
    "https://github.com/ozanciga/self-supervised-histopathology/releases/"
    "download/nativetenpercent/pytorchnative_tenpercent_resnet18.ckpt",
    licence="MIT",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    note="SimCLR; its projection head (fc.1, fc.3) is dropped",
  ),
  Row(
    "retccl",
    "resnet50",
    "best_ckpt.pth",
    "the Google Drive folder that https://github.com/Xiyue-Wang/RetCCL links",
    sha256="931956f31d3f1a3f6047f3172b9e59ee3460d29f7c0c2bb219cbc8e9207795ff",
    licence="GPL-3.0, non-commercial academic use",
    note="no head; its authors begin at 1.0 um/px, 256 px",
  ),
  Row(
    "lunit-bt",
    file="bt_rn50_ep200.torch",
    source=f"{_LUNIT_URL}bt_rn50_ep200.torch",
    **_LUNIT,
  ),
  Row(
    "lunit-mocov2",
    file="mocov2_rn50_ep200.torch",
    source=f"{_LUNIT_URL}mocov2_rn50_ep200.torch",
    **_LUNIT,
  ),
  Row(
    "lunit-swav",
    file="swav_rn50_ep200.torch",
    source=f"{_LUNIT_URL}swav_rn50_ep200.torch",
    **_LUNIT,
  ),
  Row(
    "mtdp-resnet50",
    "resnet50",
    "resnet50-mh-best-191205-141200.pth",
    "https://dox.uliege.be/index.php/s/kvABLtVuMxW8iJy/download",
    licence="see https://github.com/waliens/multitask-dipath",
    note="pretrained on many pathology tasks at once; task heads dropped",
  ),
  Row(
    "mtdp-densenet121",
    "densenet121",
    "densenet121-mh-best-191205-141200.pth",
    "https://dox.uliege.be/index.php/s/G72InP4xmJvOrVp/download",
    licence="see https://github.com/waliens/multitask-dipath",
    final_relu=False,
    note="pretrained on many pathology tasks at once; task heads dropped",
  ),
  Row(
    "cifar10-resnet18",
    "resnet18",
    "resnet18_cifar10_layer3.safetensors",
    "asset",
    note="to layer3, half precision, trained on CIFAR-10 at 64 px; for"
    " demonstration",
  ),
)


def rows() -> Sequence[Row]:
  """Returns every row, in the order of the table."""
  return _ROWS


def names() -> list[str]:
  """Returns the names that `weights=` accepts besides paths, sorted.

  `imagenet` and `imagenet-v2`, which mean the network's own, come first.
  """
  return ["imagenet", "imagenet-v2", *sorted(row.name for row in _ROWS)]


def find(name: str, network: str | None = None) -> Row:
  """Finds a row.

  Args:
    name: one of `names()`.
    network: the network that asks; needed for `imagenet` and `imagenet-v2`,
      and otherwise checked.

  Returns:
    The row.

  Raises:
    UsageError: no such row, or one of another network.
  """
  full = name
  if name in ("imagenet", "imagenet-v2"):
    if network is None:
      raise errors.UsageError(
        f"weights {name!r}: say of which network, e.g. 'resnet50.{name}'"
      )
    full = f"{network}.{name}"
  rows = {row.name: row for row in _ROWS}
  if full not in rows:
    fitting = [
      row.name for row in _ROWS if network is None or row.network == network
    ]
    if not fitting:
      raise errors.UsageError(
        f"no weights {full!r}: none are published for {network}; give a path,"
        " or None for random ones"
      )
    raise errors.UsageError(
      f"no weights {full!r}{errors.nearest(full, names())}"
      f" (a path, or one of: {', '.join(sorted(fitting))})"
    )
  row = rows[full]
  if network is not None and row.network != network:
    raise errors.UsageError(
      f"weights {name!r} are of {row.network}, not of {network}"
    )
  return row


def resolve(
  name: str | Row,
  network: str | None = None,
  *,
  loopback: str | None = None,
) -> pathlib.Path:
  """Returns the local file of a row, downloaded and verified.

  The file is looked for in the cache first, where people may also place it
  themselves; its digest is checked on every call.

  Args:
    name: one of `names()`, or a row.
    network: as for `find`.
    loopback: the address of a server on 127.0.0.1 that stands for the hub,
      and permits plain http from it: for tests.

  Returns:
    The path of the verified file.

  Raises:
    UsageError: no such row, or its file cannot be had or is not the one that
      was published; the message says which file to place where.
  """
  row = name if isinstance(name, Row) else find(name, network)
  if row.source == "asset":
    return ASSETS / row.file
  path = files.cache_root() / row.name / row.file
  return download.fetch(
    path,
    row.source,
    revision=row.revision,
    sha256=row.sha256,
    loopback=loopback,
  )

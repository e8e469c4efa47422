"""Finds the tissue of slides and cuts it into tiles.

jaxtransfer --config=tile --workdir=runs/tile --config.data=slides/

Every slide is a unit: the same command started several times, on one machine or
many, divides the slides, and after any stop goes on where it was. Ends with
runs/tile/coords/<slide>.h5, which `extract` takes and TRIDENT reads, and a
picture of every slide with its tissue and its tiles in runs/tile/overlays.

For orientation, four slides of up to 4,400 pixels a side took 1.6 seconds of
processor time, and one of 10,000 pixels a side without smaller levels 5: the
pixels of tiles are not read unless they are saved or looked at for blur.
"""

import ml_collections

from jaxtransfer import errors


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """Returns the job's config, which has no network."""
  if argument:
    raise errors.UsageError(
      f"--config=tile:{argument}: no network looks at slides to tile them;"
      " leave what follows the colon out, and give it to extract"
    )
  config = ml_collections.ConfigDict()
  config.job = "tile"
  config.tile = 256  # side of a tile in its own pixels
  config.mpp = 0.5  # micrometres of one; 0.5 is what is called 20x
  config.mag = 0.0  # another way to say it: 20 is mpp=0.5, 40 is 0.25
  config.default_mpp = 0.0  # of level 0 of slides that do not say; 0 = refused
  config.overlap = 0  # pixels that neighbouring tiles share
  config.min_tissue = 0.25  # least share of a tile that is tissue
  config.min_sharpness = 0.0  # least variance of its Laplacian; 0 = any
  config.save_tiles = False  # also as JPEG: tiles/<slide>/<x>_<y>.jpg
  config.thumbnails = 12  # slides that the page shows; 0 = none

  config.data = ml_collections.ConfigDict()
  config.data.source = ""  # a folder, a manifest.csv, synthetic:slides?...
  config.data.masks = ""  # a folder of <slide>.geojson or .png; "" = by colour
  config.data.workers = 0  # threads that read tiles; 0 = one for each processor
  config.data.max_pixels = 100_000_000  # of what can only be decoded whole

  config.tissue = ml_collections.ConfigDict()
  config.tissue.mpp = 8.0  # micrometres of the pixels that it is looked for in
  config.tissue.threshold = 0  # least saturation, 1 to 255; 0 = Otsu's
  config.tissue.median = 24.0  # micrometres; a filter against specks
  config.tissue.closing = 24.0  # micrometres; half the width of gaps closed
  config.tissue.min_area = 0.02  # mm2; smaller pieces are left out
  config.tissue.max_hole = 0.01  # mm2; smaller holes are filled
  config.tissue.pen = False  # True: blue, green and black ink is no tissue
  return config

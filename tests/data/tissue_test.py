import concurrent.futures
import pickle

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jaxtransfer.data import tissue
from jaxtransfer.errors import UsageError

TASKS = list(tissue.TASKS)


def _small(task="gland", **options):
  return tissue.open_tissue(
    task, **{"patients": 4, "tiles_per_patient": 6, "size": 48, **options}
  )


def _macro_auroc(features, labels, groups, strength):
  """Fits on the even patients, scores on the odd ones."""
  odd = np.array([int(group[-1]) % 2 for group in groups], bool)
  model = make_pipeline(
    StandardScaler(), LogisticRegression(C=strength, max_iter=500)
  )
  model.fit(features[~odd], labels[~odd])
  return roc_auc_score(
    labels[odd], model.predict_proba(features[odd]), multi_class="ovr"
  )


@pytest.mark.parametrize("task", TASKS)
def test_tile_depends_on_seed_and_row_alone(task):
  """Any order, any object and any number of neighbours draw the same tile."""
  tiles = _small(task)
  forward = [tiles.read(row) for row in range(8)]
  for row in (5, 0, 7, 5):
    np.testing.assert_array_equal(_small(task).read(row), forward[row])
  more_patients = _small(task, patients=9)
  np.testing.assert_array_equal(more_patients.read(7), forward[7])
  more_tiles = _small(task, tiles_per_patient=11)
  # Row 7 is patient 1's tile 1, which is now row 12.
  np.testing.assert_array_equal(more_tiles.read(12), forward[7])


def test_rows_seeds_and_tasks_differ():
  tiles = _small()
  drawn = [tiles.read(row).tobytes() for row in range(len(tiles))]
  assert len(set(drawn)) == len(tiles)
  assert _small(seed=1).read(0).tobytes() != drawn[0]
  assert _small("density").read(0).tobytes() != drawn[0]


def test_fingerprint_changes_with_whatever_changes_a_tile():
  base = _small()
  assert base.fingerprint() == _small().fingerprint()
  others = [
    _small("density"),
    _small(patients=5),
    _small(tiles_per_patient=7),
    _small(size=64),
    _small(seed=1),
  ]
  prints = {other.fingerprint() for other in others} | {base.fingerprint()}
  assert len(prints) == 6


# Mean light of the four quarters of row 0 at 48 px: [task][row][column][RGB].
GOLDEN = {
  "gland": [
    [[196.67, 136.37, 183.91], [199.31, 133.74, 183.11]],
    [[164.48, 123.54, 172.41], [165.49, 117.89, 169.05]],
  ],
  "density": [
    [[202.44, 134.71, 182.70], [199.12, 138.08, 184.39]],
    [[197.97, 130.44, 180.50], [195.30, 131.64, 180.97]],
  ],
  "pleomorphism": [
    [[156.11, 109.62, 164.03], [186.48, 138.80, 184.05]],
    [[197.91, 134.54, 181.52], [196.76, 139.41, 184.85]],
  ],
}


@pytest.mark.parametrize("task", TASKS)
def test_drawing_is_the_one_that_version_names(task):
  """A changed drawing would meet features cached from the old one.

  The tolerance leaves room for another platform's exp and rounding. Whoever
  breaks this on purpose raises tissue.VERSION and writes the new means here.
  """
  assert tissue.VERSION == 1
  quarters = _small(task).read(0).reshape(2, 24, 2, 24, 3).mean((1, 3))
  np.testing.assert_allclose(quarters, GOLDEN[task], atol=0.2)


def test_threads_draw_what_one_thread_draws():
  tiles = _small(patients=8)
  rows = list(range(len(tiles))) * 2
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    drawn = list(pool.map(tiles.read, rows))
  for row, image in zip(rows, drawn, strict=True):
    np.testing.assert_array_equal(image, tiles.read(row))


def test_pickles_as_its_recipe():
  """A worker process gets the parameters and not the names and labels."""
  tiles = tissue.open_tissue(patients=2000)
  packed = pickle.dumps(tiles)
  assert len(packed) < 300
  copy = pickle.loads(packed)
  assert copy.fingerprint() == tiles.fingerprint()
  np.testing.assert_array_equal(copy.read(49_999), tiles.read(49_999))


@pytest.mark.parametrize("task", TASKS)
def test_labels_are_balanced_and_every_patient_has_every_class(task):
  tiles = tissue.open_tissue(task)
  assert len(tiles) == 1500 == len(tiles.names) == len(set(tiles.names))
  assert tiles.labels.dtype == np.int32
  np.testing.assert_array_equal(np.bincount(tiles.labels), [500, 500, 500])
  groups = np.array(tiles.groups)
  assert len(set(tiles.groups)) == 60
  for group in set(tiles.groups):
    counts = np.bincount(tiles.labels[groups == group], minlength=3)
    assert counts.min() >= 8 and counts.max() <= 9


@pytest.mark.parametrize("task", TASKS)
def test_stain_and_scanner_are_independent_of_the_label(task):
  """Permutation test of the largest difference between class means.

  All nuisances at once, each in units of its deviation: a label that moved
  the stain by a quarter of its deviation would fail.
  """
  tiles = tissue.open_tissue(task, patients=40, size=16)
  values = np.array(
    [list(tiles.nuisance(row).values()) for row in range(len(tiles))]
  )
  values = (values - values.mean(0)) / values.std(0)

  def largest(labels):
    means = np.array([values[labels == label].mean(0) for label in range(3)])
    return np.abs(means).max()

  rng = np.random.default_rng(0)
  chance = [largest(rng.permutation(tiles.labels)) for _ in range(300)]
  observed = largest(tiles.labels)
  assert observed < max(chance)
  assert observed < 0.25


def test_patients_differ_in_stain_and_share_it_across_tasks():
  gland, density = (
    tissue.open_tissue(task, patients=20, tiles_per_patient=8)
    for task in ("gland", "density")
  )

  def white(tiles):
    return [tiles.nuisance(8 * p)["white"] for p in range(20)]

  assert white(gland) == white(density)
  assert len(set(white(gland))) == 20
  stain = np.array(
    [gland.nuisance(row)["hematoxylin"] for row in range(len(gland))]
  )
  stain = np.log(stain).reshape(20, 8)
  # Most of the variance lies between patients: splits must go by patient.
  assert stain.mean(1).var() > 2 * stain.var(1).mean()


@pytest.mark.parametrize("task", TASKS)
def test_optical_densities_are_physical(task):
  """Stains only absorb, and no nucleus is black.

  So concentrations are never negative, no pixel is brighter than glass under
  uneven light and sensor noise, and both vectors are unit and positive.
  """
  tiles = _small(task)
  for row in range(len(tiles)):
    look = tiles.nuisance(row)
    assert tiles.read(row).max() < 1.05 * look["white"] + 6 * look["noise"]
    for stain in tiles.concentrations(row):
      assert stain.shape == (48, 48) and stain.dtype == np.float32
      assert stain.min() >= 0 and stain.max() < 6
      assert 0.02 < stain.mean() < 1.5
  for patient in range(200):
    vectors = tissue._patient(0, patient).vectors
    assert (vectors > 0).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    # Hematoxylin takes more red than eosin does: blue nuclei, pink stroma.
    assert vectors[0, 0] > vectors[1, 0] + 0.1


@pytest.mark.parametrize("task", TASKS)
def test_tiles_use_the_range_of_uint8_without_clipping(task):
  tiles = tissue.open_tissue(task, patients=20, tiles_per_patient=3)
  images = np.stack([tiles.read(row) for row in range(len(tiles))])
  assert images.dtype == np.uint8 and images.shape == (60, 96, 96, 3)
  assert np.percentile(images, 0.5) < 60 and np.percentile(images, 99.5) > 225
  assert (images == 255).mean() < 0.01
  assert (images == 0).mean() < 0.001
  # Pink and blue: green is the darkest channel of every tile.
  red, green, blue = images.mean((1, 2)).T
  assert (green < red).all() and (green < blue).all()


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_pixels_hardly_tell_what_the_scene_decides(task):
  """The data set's purpose: solvable, but not by a linear reader of pixels.

  The oracle reads the scene (counts, sizes, rings) and no image.
  """
  tiles = tissue.open_tissue(task, patients=30, tiles_per_patient=18, size=32)
  rows = range(len(tiles))
  pixels = np.stack([tiles.read(row).ravel() for row in rows]).astype(float)
  latents = np.array([list(tiles.latents(row).values()) for row in rows])
  oracle = _macro_auroc(latents, tiles.labels, tiles.groups, 1.0)
  # The best strength on the test patients themselves: an upper bound.
  linear = max(
    _macro_auroc(pixels, tiles.labels, tiles.groups, strength)
    for strength in (1e-5, 1e-3)
  )
  assert oracle > 0.9
  assert linear < 0.75
  assert oracle - linear > 0.2


@pytest.mark.slow
def test_gland_classes_share_one_budget():
  """Arrangement differs; how much there is of everything does not.

  Per class: visible nuclei, and mean hematoxylin and eosin, within 10 % of
  their mean over classes; a class with a budget of its own would fail.
  """
  tiles = tissue.open_tissue("gland", tiles_per_patient=12, size=32)
  amounts = np.array(
    [
      [
        tiles.latents(row)["nuclei"],
        *(stain.mean() for stain in tiles.concentrations(row)),
      ]
      for row in range(len(tiles))
    ]
  )
  means = np.stack([amounts[tiles.labels == c].mean(0) for c in range(3)])
  np.testing.assert_allclose(means / means.mean(0), 1, atol=0.1)


def test_pleomorphism_classes_share_number_and_area():
  tiles = tissue.open_tissue("pleomorphism", size=16)
  latents = [tiles.latents(row) for row in range(len(tiles))]
  for name, tolerance in (("nuclei", 0.05), ("nuclear_area", 0.08)):
    values = np.array([found[name] for found in latents])
    means = np.array([values[tiles.labels == c].mean() for c in range(3)])
    np.testing.assert_allclose(means / means.mean(), 1, atol=tolerance)


def test_density_classes_share_size_and_darkness():
  tiles = tissue.open_tissue("density", size=16)
  latents = [tiles.latents(row) for row in range(len(tiles))]
  for name in ("nuclear_radius", "darkness"):
    values = np.array([found[name] for found in latents])
    means = np.array([values[tiles.labels == c].mean() for c in range(3)])
    np.testing.assert_allclose(means / means.mean(), 1, atol=0.05)
  counts = np.array([found["nuclei"] for found in latents])
  means = [counts[tiles.labels == c].mean() for c in range(3)]
  assert means[0] * 1.3 < means[1] < means[2] / 1.3


@pytest.mark.parametrize("task", TASKS)
def test_size_is_sharpness_and_not_content(task):
  """Placed in micrometres: a tile halved is the tile drawn at half size.

  Sensor noise and the fineness of an edge differ, so the two correlate
  closely and are not equal; other rows do not correlate at all.
  """
  large, small = _small(task, size=96), _small(task, size=48)
  for row in (0, 1, 2):
    halved = large.read(row).reshape(48, 2, 48, 2, 3).mean((1, 3))
    same = np.corrcoef(halved.ravel(), small.read(row).ravel())[0, 1]
    other = np.corrcoef(halved.ravel(), small.read(row + 1).ravel())[0, 1]
    assert same > 0.9 and same > other + 0.2


@pytest.mark.parametrize("size", [16, 33, 97])
def test_any_size_is_drawn(size):
  for task in TASKS:
    assert _small(task, size=size).read(3).shape == (size, size, 3)


@pytest.mark.parametrize("row", [-1, 24])
def test_rows_that_are_not_there(row):
  with pytest.raises(IndexError, match=f"row {row} of 24"):
    _small().read(row)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"task": "glands"}, "gland, density, pleomorphism"),
    ({"patients": 0}, "patients is 0"),
    ({"tiles_per_patient": 2}, "tiles_per_patient is 2"),
    ({"size": 8}, "size is 8"),
    ({"size": 96.0}, "whole number"),
    ({"seed": -1}, "seed is -1"),
  ],
)
def test_bad_options_are_usage_errors(options, message):
  with pytest.raises(UsageError, match=message):
    tissue.open_tissue(**options)

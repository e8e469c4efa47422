"""The page of the `tile` job says of every slide what became of it."""

import numpy as np

from jaxtransfer import results
from jaxtransfer.report import gallery, page, tables, tile
from tests import typed
from tests.report import example


def _row(name, **changes):
  row = {
    "name": name,
    "path": f"slides/{name}.svs",
    "width": 40_000,
    "height": 30_000,
    "mpp": 0.2527,
    "levels": [1.0, 4.0, 16.0],
    "tiles": 1234,
    "tissue_mm2": 20.21,
    "seconds": 3.5,
    "problem": "",
    "failed": False,
  }
  return {**row, **changes}


def _failed(name, problem):
  nothing = dict.fromkeys(
    ("width", "height", "mpp", "tiles", "tissue_mm2", "seconds")
  )
  return _row(name, problem=problem, failed=True, levels=[], **nothing)


def _results(table):
  broken = [
    {"name": row["name"], "reason": row["problem"]}
    for row in table
    if row["failed"]
  ]
  return typed.check_results(
    {
      "job": "tile",
      "summary": results.Tile(
        sentence="1,234 tiles of 256 px at 0.5 um/px (128 um).",
        data="slides",
        tile=256,
        mpp=0.5,
        table=table,
        notes=[],
        failures=0,
        broken=broken,
        unit="tiles",
        seconds={"tiling": 3.5},
        run=example.results()["summary"]["run"],
      ),
      "measurements": [results.row({"n": 3}, "tiles", 1234)],
    }
  )


def test_every_slide_has_a_line_and_what_is_wrong_comes_first(tmp_path):
  table = [
    _row("fine"),
    _row("empty", tiles=0, problem="no tissue"),
    _failed("<b>broken</b>", "OpenSlide refuses it: <script>"),
  ]
  text = page.write(tmp_path, _results(table)).read_text()
  places = [text.index(f"{name}") for name in ("&lt;b&gt;", "empty", ">fine<")]
  assert places == sorted(places)
  assert "<b>broken" not in text and "<script>" not in text
  assert "40,000" in text and "1 4 16" in text and "20.21" in text
  assert text.count("left out</span>") == 1
  assert 'href="slides.csv"' in text


def test_a_long_table_is_cut_and_says_so():
  table = [_row(f"slide-{i}") for i in range(250)]
  summary = _results(table)["summary"]
  drawn = tile.content(summary, tables.Measurements([]))
  text = "".join(map(str, drawn.sections[0].blocks))
  assert text.count("<tr") == 201 and "The first 200 of 250" in text
  assert tile.slide_table({"table": []}) is None


def test_pictures_of_slides_keep_their_shape():
  """Larger than tiles, and no wider than the page lets them be."""
  picture = np.full((300, 900, 3), 200, np.uint8)
  shown = gallery.Gallery(
    "What was found", "", [gallery.Thumbnail(picture, "12 tiles", "a")], 360
  )
  (block,) = gallery.blocks([shown])
  assert 'width="360" height="120"' in block
  assert 'class="gallery wide"' in block

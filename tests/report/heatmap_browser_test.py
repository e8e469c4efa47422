"""Heatmaps in a real browser, opened from disk, by mouse and by keyboard."""

import base64
import json

import matplotlib
import numpy as np
import pytest
import scipy.stats

from jaxtransfer.report import heatmap, page
from tests.report import browser
from tests.report.heatmap_test import picture
from tests.report.tile_scores_test import HOSTILE, view

SIDE = 64  # of a tile at level 0
FRAME = (640, 480)  # of the picture, there


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
  found = browser.Browser(browser.path(), tmp_path_factory.mktemp("profile"))
  yield found
  found.close()


def slides():
  """Returns three: tiles here and there, tiles that overlap, a hostile name."""
  rng = np.random.default_rng(5)
  places = rng.choice(70, 20, replace=False)
  coords = np.stack([places % 10, places // 10], 1) * SIDE
  weights = rng.gamma(0.2, size=20)
  weights[7] = weights[3]
  scores = {
    "attention": (weights / weights.sum()).astype(np.float32),
    "P(tumour)": rng.random(20).astype(np.float32),
  }
  order = np.argsort(-weights)
  first = view(
    20,
    name="first",
    coords=coords.astype(np.int64),
    extent=SIDE,
    scores=scores,
    picture=picture(),
    scale=8,
    mpp=0.5,
    facts={"truth": "tumour", "P(tumour)": 0.91},
    most=[(int(i), picture(32, 32)) for i in order[:3]],
    least=[(int(i), picture(32, 32)) for i in order[::-1][:3]],
  )
  even = {"attention": np.full(30, 1 / 30), "age": rng.permutation(30)}
  corners = np.round(rng.uniform(0, 500, (30, 2)))
  corners[7] = corners[3]  # of two in one place the first is seen
  second = view(
    30,
    name="second",
    coords=corners.astype(np.int64),
    extent=70.3,
    scores=even,
  )
  third = view(
    8,
    name=HOSTILE,
    extent=SIDE,
    scores={f"P({HOSTILE})": np.linspace(0, 1, 8), HOSTILE: np.arange(8) - 3.5},
    facts={"truth": HOSTILE},
  )
  return first, second, third


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  results = {"job": "slides", "summary": {"sentence": "Looked at."}}
  return page.write(tmp_path_factory.mktemp("run"), results, views=slides())


@pytest.fixture
def opened(chromium, written):
  """The page as it is after opening it, wide."""
  chromium.requests.clear()
  chromium.complaints.clear()
  chromium.size(1400)
  open_page(chromium, written)
  yield chromium
  # Whatever was done: nothing was fetched, refused or wrong.
  assert {u for u in chromium.requests if not u.startswith("data:")} == {
    written.as_uri()
  }
  assert chromium.complaints == []


def open_page(chromium, path, fragment=""):
  # The same address with a fragment would only scroll.
  chromium.open("about:blank")
  chromium.requests.clear()
  chromium.open(path.as_uri() + fragment)
  chromium.until("document.querySelector('.slide:not([hidden]) canvas.map')")
  chromium.settled()


def visible(chromium, selector):
  """Returns the texts of what is shown."""
  return chromium.run(
    f"[...document.querySelectorAll({json.dumps(selector)})]"
    ".filter((e) => e.checkVisibility()).map((e) => e.textContent)"
  )


def drawn(chromium):
  """Returns (20, 4) uint8 at the tiles' centres, and the share that is clear.

  Only of the first slide.
  """
  coords = (slides()[0].coords + SIDE / 2).tolist()
  found = chromium.run(f"""(() => {{
    const map = document.querySelector("canvas.map");
    const {{ width, height }} = map;
    const {{ data }} = map.getContext("2d").getImageData(0, 0, width, height);
    let clear = 0;
    for (let i = 3; i < data.length; i += 4) clear += data[i] === 0;
    return [
      {json.dumps(coords)}.map(([x, y]) => {{
        const row = Math.floor(y * height / {FRAME[1]});
        const at = 4 * (row * width + Math.floor(x * width / {FRAME[0]}));
        return [...data.slice(at, at + 4)];
      }}),
      clear / (width * height),
    ];
  }})()""")
  return np.array(found[0]), found[1]


def expected(name, positions):
  table = matplotlib.colormaps[name].resampled(255)
  levels = np.floor(254 * np.asarray(positions, np.float64) + 0.5).astype(int)
  return 255 * table(levels)[:, :3]


def place(chromium, tile):
  """Returns where a tile of the first slide is in the window."""
  box = chromium.run("""(() => {
    const map = document.querySelector("canvas.map");
    map.scrollIntoView({ block: "center" });
    const { left, top, width, height } = map.getBoundingClientRect();
    return [left, top, width, height];
  })()""")
  x, y = (slides()[0].coords[tile] + SIDE / 2) / FRAME
  return box[0] + x * box[2], box[1] + y * box[3]


def put(chromium, name, value):
  """Moves a slider or chooses an option, as a user's hand does."""
  chromium.run(f"""(() => {{
    const input = document.querySelector(".panel form").elements["{name}"];
    input.value = {json.dumps(value)};
    const target = input instanceof RadioNodeList
      ? [...input].find((e) => e.checked) : input;
    target.dispatchEvent(new Event("input", {{ bubbles: true }}));
  }})()""")
  chromium.settled()


def percentile(values):
  return scipy.stats.rankdata(values) / len(values)


def test_tiles_have_the_colour_of_their_score_and_the_rest_has_none(opened):
  """Percentile and raw, attention and probability, against matplotlib."""
  shown = slides()[0].shown
  attention, probability = shown["attention"], shown["P(tumour)"]
  colours, clear = drawn(opened)
  ranks = percentile(attention)
  assert np.abs(colours[:, :3] - expected("viridis", ranks)).max() <= 1
  assert (colours[:, 3] == 255).all()
  np.testing.assert_allclose(
    clear, 1 - 20 * SIDE**2 / np.prod(FRAME), atol=0.01
  )

  put(opened, "scale", "raw")
  low, high = max(attention.min(), 0.01), attention.max()
  share = np.log(np.maximum(attention, low) / low) / np.log(high / low)
  colours, _ = drawn(opened)
  assert np.abs(colours[:, :3] - expected("viridis", share)).max() <= 2
  assert visible(opened, ".bar-title") == ["attention, 1 = the even share"]
  ticks = visible(opened, ".panel .ticks span")
  assert ticks[-1] == heatmap.number(float(high)) and "1" in ticks

  put(opened, "score", "P(tumour)")
  colours, _ = drawn(opened)
  assert np.abs(colours[:, :3] - expected("coolwarm", probability)).max() <= 1
  assert visible(opened, ".bar-title") == ["P(tumour), from 0 to 1"]
  ticks = visible(opened, ".panel .ticks span")
  assert ticks == ["0", "0.25", "0.5", "0.75", "1"]


@pytest.mark.slow
def test_every_pixel_is_as_the_page_draws_it_without_a_script(opened, written):
  """Tiles of a fractional side that overlap, between the pixels."""
  open_page(opened, written, "#heatmap-2")
  opened.requests[:] = [u.split("#")[0] for u in opened.requests]
  put(opened, "score", "age")
  width, height, text = opened.run("""(() => {
    const map = document.querySelector("canvas.map");
    const { width, height } = map;
    const { data } = map.getContext("2d").getImageData(0, 0, width, height);
    let text = "";
    for (const value of data) text += String.fromCharCode(value);
    return [width, height, btoa(text)];
  })()""")
  pixels = np.frombuffer(base64.b64decode(text), np.uint8)
  pixels = pixels.reshape(height, width, 4)
  slide = slides()[1]
  # Without a picture, a tile's width of nothing is around the tiles.
  origin = slide.coords.min(0) - 70.3
  assert width == 1024 or height == 1024
  ratio = 1024 / (np.ptp(slide.coords, axis=0).max() + 3 * 70.3)
  owner = heatmap.owners(
    (slide.coords - origin) * ratio, 71.3 * ratio, (height, width)
  )
  ranks = percentile(slide.scores["age"])
  colours = np.append(expected("viridis", ranks), [[0] * 3], 0)[owner]
  assert np.abs(pixels[..., :3] - colours).max() <= 1
  assert ((pixels[..., 3] > 0) == (owner >= 0)).all()
  assert set(owner.flat) == set(range(-1, 30)) - {7}


@pytest.mark.slow
def test_the_threshold_hides_what_is_below_and_the_opacity_fades(opened):
  ranks = percentile(slides()[0].shown["attention"])
  put(opened, "threshold", 700)
  colours, _ = drawn(opened)
  assert (colours[:, 3] > 0).tolist() == (ranks >= 0.7).tolist()
  assert visible(opened, "output.threshold") == ["70 %"]
  (words,) = visible(opened, ".counted")
  assert words == f"{(ranks >= 0.7).sum()} of 20 tiles shown"
  put(opened, "opacity", 30)
  style = "getComputedStyle(document.querySelector('canvas.map')).opacity"
  assert float(opened.run(style)) == 0.3
  name = opened.run(
    "document.querySelector('[name=threshold]').getAttribute('aria-valuetext')"
  )
  assert name == f"70 %, {words}"


@pytest.mark.slow
def test_the_tile_under_the_pointer_is_told(opened):
  slide = slides()[0]
  tile = slide.most[1][0]
  opened.point(*place(opened, tile))
  opened.settled()
  cells = visible(opened, ".tile td")
  expect = []
  for values in slide.shown.values():
    share = f"{100 * percentile(values)[tile]:.1f}".removesuffix(".0")
    rank = 1 + (values > values[tile]).sum()
    expect += [heatmap.number(float(values[tile])), f"{share} %", str(rank)]
  assert cells == expect
  x, y = slide.coords[tile]
  assert visible(opened, ".place") == [
    f"x {x:,}, y {y:,} · 64 px wide, at level 0"
  ]
  # Its picture is the one below.
  same = "document.querySelector('.tile img').src === document.querySelector("
  assert opened.run(f"{same}'[data-tile=\"{tile}\"] img').src")
  # Where no tile is, none is told; one that was chosen comes back.
  opened.point(*place(opened, tile), click=True)
  opened.point(*place(opened, slide.most[0][0]))
  opened.settled()
  assert visible(opened, ".tile td") != cells
  opened.point(2, 2)
  opened.settled()
  assert visible(opened, ".tile td") == cells
  bare = next(
    [x, y]
    for y in range(0, 448, SIDE)
    for x in range(0, 640, SIDE)
    if [x, y] not in slide.coords.tolist()
  )
  step = np.subtract(bare, slide.coords[tile])
  box = np.array(place(opened, tile))
  size = opened.run(
    "document.querySelector('canvas.map').getBoundingClientRect().width"
  )
  opened.point(*(box + step * size / FRAME[0]), click=True)
  opened.settled()
  assert visible(opened, ".tile td") == []
  assert visible(opened, ".hint") != []


@pytest.mark.slow
def test_keys_alone_reach_every_tile_and_say_what_is_there(opened):
  slide = slides()[0]
  attention = slide.shown["attention"]
  opened.run("document.querySelector('.slide-list a').focus()")
  for _ in range(40):
    opened.press("Tab")
    if opened.run("document.activeElement.matches('.stage')"):
      break
  else:
    raise AssertionError("Tab does not come to the picture")
  outline = "getComputedStyle(document.activeElement).outlineStyle"
  assert opened.run(outline) == "solid"
  label = "document.activeElement.getAttribute('aria-label')"
  assert opened.run(label) == "Scores of the tiles of slide first"

  def told():
    (words,) = visible(opened, ".said")
    return words

  opened.press("Home")
  assert "rank 1 of 20" in told()
  opened.press("PageDown")
  assert "rank 2 of 20" in told()
  opened.press("End")
  assert f"rank {1 + (attention > attention.min()).sum()} of 20" in told()
  opened.press("Home")
  seen = {told()}
  for _ in range(19):
    opened.press("PageDown")
    seen.add(told())
  assert len(seen) == 20
  # A row of several tiles, from its left to its right and back.
  rows = slide.coords[:, 1]
  row = max(set(rows.tolist()), key=rows.tolist().count)
  columns = sorted(slide.coords[rows == row, 0].tolist())
  assert len(columns) > 2
  start = slide.coords.tolist().index([columns[0], row])
  opened.point(*place(opened, start), click=True)
  opened.point(2, 2)
  for column in columns[1:]:
    opened.press("ArrowRight")
    assert told().endswith(f"at {column:,}, {row:,}")
  for column in columns[-2::-1]:
    opened.press("ArrowLeft")
    assert told().endswith(f"at {column:,}, {row:,}")
  opened.press("Escape")
  assert told() == "No tile"


@pytest.mark.slow
def test_pictures_of_tiles_lead_to_their_place(opened):
  tile = slides()[0].least[1][0]
  opened.run(f"document.querySelector('a[data-tile=\"{tile}\"]').focus()")
  opened.press("Enter")
  opened.settled()
  x, y = slides()[0].coords[tile]
  assert visible(opened, ".place")[0].startswith(f"x {x:,}, y {y:,}")
  assert opened.run("document.activeElement.matches('.stage')")
  marker = opened.run("""(() => {
    const [mark, map] = [".marker", "canvas.map"].map(
      (name) => document.querySelector(name).getBoundingClientRect());
    return [mark.left - map.left, mark.top - map.top, mark.width, map.width];
  })()""")
  scale = marker[3] / FRAME[0]
  np.testing.assert_allclose(marker[:3], np.array([x, y, SIDE]) * scale, atol=1)


@pytest.mark.slow
def test_slides_are_chosen_by_mouse_by_arrows_and_by_address(opened, written):
  assert visible(opened, ".slide h3") == ["first"]
  opened.run("document.querySelectorAll('.slide-list a')[1].click()")
  opened.until("!document.querySelectorAll('.slide')[1].hidden")
  opened.settled()
  assert visible(opened, ".slide h3") == ["second"]
  assert opened.run("location.hash") == "#heatmap-2"
  put(opened, "scale", "raw")
  assert visible(opened, ".panel .ticks span") == ["0.5", "1", "2"]
  opened.run("document.querySelectorAll('.slide-list a')[1].focus()")
  opened.press("ArrowUp")
  opened.until("!document.querySelectorAll('.slide')[0].hidden")
  current = "document.querySelector('[aria-current]').textContent"
  assert opened.run(current) == "first"
  assert opened.run("document.activeElement.textContent") == "first"
  # What was set stays.
  opened.settled()
  assert visible(opened, ".bar-title") == ["attention, 1 = the even share"]
  open_page(opened, written, "#heatmap-2")
  assert visible(opened, ".slide h3") == ["second"]
  opened.requests[:] = [u.split("#")[0] for u in opened.requests]


@pytest.mark.slow
def test_names_and_labels_do_nothing(opened, written):
  open_page(opened, written, "#heatmap-3")
  opened.requests[:] = [u.split("#")[0] for u in opened.requests]
  text = HOSTILE.replace("\n", "\\n")
  assert visible(opened, ".slide h3") == [text]
  options = "[...document.querySelectorAll('option')].map((e) => e.text)"
  assert opened.run(options) == [f"P({text})", text]
  put(opened, "score", text)
  opened.run("document.querySelector('.slide:not([hidden]) .stage').focus()")
  opened.press("Home")
  opened.settled()
  assert visible(opened, ".tile td")[3:] == ["3.5", "100 %", "1"]
  assert visible(opened, ".said")[0].startswith(f"{text} 3.5")
  assert opened.run("document.querySelectorAll('script').length") == 1
  assert opened.run("document.querySelectorAll('img[src=x]').length") == 0


@pytest.mark.slow
def test_it_fits_a_phone(opened, written):
  opened.size(420)
  opened.settled()
  assert opened.run("document.documentElement.scrollWidth") <= 420
  opened.run("document.querySelector('.stage').focus()")
  opened.press("Home")
  opened.settled()
  assert opened.run("document.documentElement.scrollWidth") <= 420
  put(opened, "zoom", 8)
  assert opened.run("document.documentElement.scrollWidth") <= 420
  inside = opened.run("""(() => {
    const stage = document.querySelector(".stage");
    return stage.scrollWidth / stage.clientWidth;
  })()""")
  np.testing.assert_allclose(inside, 8, rtol=0.02)
  # The chosen tile stays in what is seen, and the next one comes there.
  for key in ("Home", "End", "PageUp"):
    assert opened.run("""(() => {
      const [mark, stage] = [".marker", ".stage"].map(
        (name) => document.querySelector(name).getBoundingClientRect());
      return mark.right > stage.left && mark.left < stage.right
        && mark.bottom > stage.top && mark.top < stage.bottom;
    })()""")
    opened.press(key)
    opened.settled()


@pytest.mark.slow
def test_without_a_script_every_slide_is_there(chromium, written):
  chromium.size(1400)
  chromium.scripts(False)
  try:
    chromium.open("about:blank")
    chromium.open(written.as_uri())
    shown = visible(chromium, ".slide h3")
    assert shown == ["first", "second", HOSTILE.replace("\n", "\\n")]
    assert len(visible(chromium, "img.scores")) == 3
    assert visible(chromium, "canvas") == [] == visible(chromium, "form")
    assert visible(chromium, ".key .ticks span")[:3] == ["0 %", "50 %", "100 %"]
  finally:
    chromium.scripts(True)

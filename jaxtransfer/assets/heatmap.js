"use strict";

// Makes one viewer of a page's slides. Without it the page shows each slide
// with its percentiles; the numbers stand in the slides' data-view.
(() => {
  const root = document.querySelector(".heatmaps");
  if (!root || !("DecompressionStream" in window)) return;

  const LEVELS = 255; // colours
  const MOST_PIXELS = 2048; // of the raster's longer side
  const TILE_PIXELS = 6; // of a tile's side in the raster, where they fit
  const LEAST_ATTENTION = 0.01; // less is one colour
  const BARS = 64; // of the histogram
  const HIDDEN = "#e4e4e4";
  const STEPS = {
    ArrowLeft: [-1, 0],
    ArrowRight: [1, 0],
    ArrowUp: [0, -1],
    ArrowDown: [0, 1],
  };

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const colours = Object.fromEntries(
    Object.entries(JSON.parse(root.dataset.colours)).map(([name, text]) => [
      name,
      bytes(text),
    ]),
  );
  const articles = [...root.querySelectorAll("article.slide")];
  if (!articles.length) return;
  const links = [...root.querySelectorAll(".slide-list a")];
  const [panel, keys, said] = root
    .querySelector("template")
    .content.cloneNode(true).children;
  const form = panel.querySelector("form");
  const inputs = form.elements;
  const find = (selector) => panel.querySelector(selector);

  const canvas = element("canvas", "map");
  const marker = element("div", "marker");
  marker.hidden = true;

  let slide = null; // what `load` returns, of the article that is shown
  let current = 0; // which article that is
  let pinned = -1; // the tile that was chosen
  let hovered = -1; // the tile under the pointer
  let order = null; // tiles from the highest to the lowest score
  let waiting = false; // for the next frame

  function element(name, kind, text) {
    const made = document.createElement(name);
    if (kind) made.className = kind;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function number(value) {
    if (value && Math.abs(value) < 0.001) {
      return value > 0 ? "<0.001" : ">−0.001";
    }
    return value
      .toLocaleString("en-US", { maximumSignificantDigits: 3 })
      .replace("-", "−");
  }

  const whole = (value) => value.toLocaleString("en-US");
  const percent = (share) =>
    `${(100 * share).toFixed(1).replace(/\.0$/, "")} %`;

  async function inflated(text) {
    const packed = new Blob([bytes(text)]).stream();
    const stream = packed.pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  }

  // -- a slide's numbers

  async function load(article) {
    const view = JSON.parse(article.dataset.view);
    const steps = new Int32Array(await inflated(view.coords));
    const [x, y] = [0, view.count].map((start) => {
      let sum = 0;
      return Float64Array.from(
        steps.subarray(start, start + view.count),
        (step) => (sum += step),
      );
    });
    const scores = [];
    for (const { label, kind, values } of view.scores) {
      const numbers = new Float32Array(await inflated(values));
      scores.push(ranked(label, kind, numbers));
    }
    const longest = Math.max(view.width, view.height);
    const ratio =
      Math.min(
        MOST_PIXELS,
        Math.max(MOST_PIXELS / 2, (TILE_PIXELS * longest) / view.extent),
      ) / longest;
    const width = Math.max(1, Math.round(view.width * ratio));
    const height = Math.max(1, Math.round(view.height * ratio));
    const owner = owners(
      x.map((value) => (value - view.left) * ratio),
      y.map((value) => (value - view.top) * ratio),
      view.side * ratio,
      width,
      height,
    );
    return { ...view, x, y, scores, width, height, ratio, owner };
  }

  // Percentiles, and how many of the slide's tiles score higher; equal scores
  // share their mean rank.
  function ranked(label, kind, values) {
    const sorted = values.slice().sort();
    const percentiles = new Float64Array(values.length);
    const higher = new Uint32Array(values.length);
    values.forEach((value, i) => {
      const below = first(sorted, (other) => other >= value);
      const until = first(sorted, (other) => other > value);
      percentiles[i] = (below + until + 1) / 2 / values.length;
      higher[i] = values.length - until;
    });
    const [low, high] = [sorted[0] ?? 0, sorted[values.length - 1] ?? 1];
    return { label, kind, values, percentiles, higher, low, high };
  }

  // The index of the first of sorted values that is so.
  function first(sorted, isSo) {
    let [from, to] = [0, sorted.length];
    while (from < to) {
      const middle = (from + to) >> 1;
      if (isSo(sorted[middle])) to = middle;
      else from = middle + 1;
    }
    return from;
  }

  // Which tile each pixel of the raster shows, or -1: of those that its centre
  // lies in the one whose centre is nearest. report/heatmap.py does the same.
  function owners(x, y, side, width, height) {
    const owner = new Int32Array(width * height).fill(-1);
    const nearest = new Float64Array(width * height).fill(Infinity);
    const span = (start, limit) => {
      let [from, to] = [Math.ceil(start - 0.5), Math.ceil(start + side - 0.5)];
      if (to <= from) {
        from = Math.floor(start + side / 2);
        to = from + 1;
      }
      return [Math.max(0, from), Math.min(limit, to)];
    };
    for (let i = 0; i < x.length; i++) {
      const [left, right] = span(x[i], width);
      const [top, bottom] = span(y[i], height);
      for (let row = top; row < bottom; row++) {
        const down = (row + 0.5 - (y[i] + side / 2)) ** 2;
        for (let column = left; column < right; column++) {
          const distance = (column + 0.5 - (x[i] + side / 2)) ** 2 + down;
          const pixel = row * width + column;
          if (distance < nearest[pixel]) {
            nearest[pixel] = distance;
            owner[pixel] = i;
          }
        }
      }
    }
    return owner;
  }

  // -- from scores to colours

  // What is shown now: each tile's position on the colour bar, and the bar.
  function scale() {
    const score = slide.scores[inputs.score.selectedIndex];
    if (inputs.scale.value === "percentile") {
      return {
        words: `${score.label}, percentile in this slide`,
        table: colours.sequential,
        positions: score.percentiles,
        ticks: [0, 0.25, 0.5, 0.75, 1].map((share) => [share, percent(share)]),
        read: percent,
        flat: true,
      };
    }
    return raw(score);
  }

  function raw({ label, kind, values, low, high }) {
    if (kind === "probability") {
      return {
        words: `${label}, from 0 to 1`,
        table: colours.diverging,
        positions: values,
        ticks: [0, 0.25, 0.5, 0.75, 1].map((value) => [value, number(value)]),
        read: number,
      };
    }
    const isAttention = kind === "attention";
    const least = low;
    if (isAttention) low = Math.max(low, LEAST_ATTENTION);
    // All are alike: the even share, or the one number, is in the middle.
    if (isAttention && high < 1.05 * low) [low, high] = [0.5, 2];
    if (!isAttention && high === low) [low, high] = [low - 0.5, low + 0.5];
    const [bend, back] = isAttention
      ? [Math.log, Math.exp]
      : [(value) => value, (value) => value];
    const place = (value) =>
      (bend(value) - bend(low)) / (bend(high) - bend(low));
    const read = (share) =>
      back(bend(low) + share * (bend(high) - bend(low)));
    const marks = isAttention
      ? [0.01, 0.1, 1, 10, 100, 1000, 1e4, 1e5]
      : [read(0.5)];
    return {
      words: isAttention ? `${label}, 1 = the even share` : label,
      table: colours.sequential,
      positions: Float64Array.from(values, (value) =>
        within(place(Math.max(value, low))),
      ),
      ticks: [
        [0, (least < low ? "≤ " : "") + number(low)],
        ...marks
          .map((value) => [place(value), number(value)])
          .filter(([share]) => share > 0.14 && share < 0.86),
        [1, number(high)],
      ],
      read: (share) => number(read(share)),
    };
  }

  const within = (share) => Math.min(1, Math.max(0, share));
  const level = (position) =>
    Math.floor((LEVELS - 1) * within(position) + 0.5);
  const threshold = () => inputs.threshold.valueAsNumber / 1000;

  function paint() {
    const { positions, table } = slide.scale;
    const least = threshold();
    const shades = Uint32Array.from(positions, (position) => {
      if (position < least) return 0;
      const at = 3 * level(position);
      return (
        (0xff000000 |
          (table[at + 2] << 16) |
          (table[at + 1] << 8) |
          table[at]) >>>
        0
      );
    });
    canvas.width = slide.width;
    canvas.height = slide.height;
    const context = canvas.getContext("2d");
    const image = context.createImageData(slide.width, slide.height);
    const pixels = new Uint32Array(image.data.buffer);
    const { owner } = slide;
    for (let pixel = 0; pixel < owner.length; pixel++) {
      if (owner[pixel] >= 0) pixels[pixel] = shades[owner[pixel]];
    }
    context.putImageData(image, 0, 0);
    paintBar(least);
  }

  function paintBar(least) {
    const { positions, table, ticks, words, read, flat } = slide.scale;
    const rgb = (at) => `rgb(${table.subarray(3 * at, 3 * at + 3).join()})`;
    const ramp = find("canvas.ramp");
    ramp.width = LEVELS;
    ramp.height = 1;
    const strip = ramp.getContext("2d");
    for (let i = 0; i < LEVELS; i++) {
      strip.fillStyle = i / (LEVELS - 1) < least ? HIDDEN : rgb(i);
      strip.fillRect(i, 0, 1, 1);
    }
    ramp.setAttribute(
      "aria-label",
      `Colours from ${ticks[0][1]} to ${ticks[ticks.length - 1][1]}`,
    );
    const histogram = find(".histogram");
    histogram.hidden = flat === true;
    if (!flat) {
      const counts = new Uint32Array(BARS);
      for (const position of positions) {
        counts[Math.min(BARS - 1, Math.floor(BARS * position))]++;
      }
      const most = Math.max(1, ...counts);
      histogram.width = 4 * BARS;
      histogram.height = 64;
      const bars = histogram.getContext("2d");
      counts.forEach((count, i) => {
        const tall = count && Math.max(2, Math.round((64 * count) / most));
        bars.fillStyle = (i + 1) / BARS <= least ? "#d0d0d0" : "#777";
        bars.fillRect(4 * i, 64 - tall, 3, tall);
      });
    }
    find(".bar-title").textContent = words;
    find(".ticks").replaceChildren(
      ...ticks.map(([share, text]) => {
        const tick = element("span", "", text);
        tick.style.left = `${100 * share}%`;
        tick.style.transform = `translateX(${-100 * share}%)`;
        return tick;
      }),
    );
    const shown = positions.reduce((sum, at) => sum + (at >= least), 0);
    const counted = `${whole(shown)} of ${whole(slide.count)} tiles shown`;
    tell("threshold", least ? read(least) : "nothing", `, ${counted}`);
    find(".counted").textContent = counted;
  }

  function tell(name, text, more = "") {
    find(`output.${name}`).textContent = text;
    inputs[name].setAttribute("aria-valuetext", text + more);
  }

  function rescale() {
    slide.scale = scale();
    order = null;
    soon();
  }

  // However often a slider moves, it is painted once a frame.
  function soon() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      paint();
    });
  }

  function dress() {
    const layer = canvas.parentElement;
    const bare = !layer.querySelector(".tissue");
    const opacity = inputs.opacity.valueAsNumber;
    canvas.style.opacity = bare ? 1 : opacity / 100;
    tell("opacity", `${opacity} %`);
    for (const name of ["opacity", "grey"]) {
      inputs[name].parentElement.hidden = bare;
    }
    layer.classList.toggle("grey", inputs.grey.checked);
    enlarge(layer, inputs.zoom.valueAsNumber);
  }

  // About the chosen tile, or about what is in the middle.
  function enlarge(layer, zoom) {
    const stage = layer.parentElement;
    const shown = layer.getBoundingClientRect();
    const frame = stage.getBoundingClientRect();
    const about = (marker.hidden ? stage : marker).getBoundingClientRect();
    const x = (about.left + about.width / 2 - shown.left) / shown.width;
    const y = (about.top + about.height / 2 - shown.top) / shown.height;
    tell("zoom", `${zoom} ×`);
    if (zoom === Number(layer.style.getPropertyValue("--zoom") || 1)) return;
    layer.style.setProperty("--zoom", zoom);
    stage.scrollLeft = x * layer.offsetWidth - frame.width / 2;
    stage.scrollTop = y * layer.offsetHeight - frame.height / 2;
  }

  // -- one tile

  const shownTile = () => (hovered >= 0 ? hovered : pinned);

  function point() {
    const tile = shownTile();
    marker.hidden = tile < 0;
    find(".hint").hidden = tile >= 0;
    const box = find(".tile");
    box.replaceChildren();
    if (tile < 0) return;
    const { left, top, x, y, extent, ratio, width, height } = slide;
    marker.style.left = `${(100 * (x[tile] - left) * ratio) / width}%`;
    marker.style.top = `${(100 * (y[tile] - top) * ratio) / height}%`;
    marker.style.width = `${(100 * extent * ratio) / width}%`;
    marker.style.height = `${(100 * extent * ratio) / height}%`;
    const small = articles[current].querySelector(`[data-tile="${tile}"] img`);
    if (small) {
      const picture = element("img");
      picture.src = small.src;
      picture.alt = small.alt;
      box.append(picture);
    } else {
      box.append(element("div", "no-picture", "no picture of this tile here"));
    }
    const table = element("table");
    const row = (kind, cells) => {
      const line = element("tr");
      const names = cells.map((_, i) => (i ? kind : "th"));
      line.append(...cells.map((cell, i) => element(names[i], "", cell)));
      return line;
    };
    const among = `rank of ${whole(slide.count)}`;
    table.append(row("th", ["", "raw", "percentile", among]));
    for (const { label, values, percentiles, higher } of slide.scores) {
      table.append(
        row("td", [
          label,
          number(values[tile]),
          percent(percentiles[tile]),
          whole(higher[tile] + 1),
        ]),
      );
    }
    const at = `x ${whole(x[tile])}, y ${whole(y[tile])}`;
    const side = whole(Math.round(extent));
    const words = element("div", "words-of-tile");
    words.append(
      table,
      element("p", "place", `${at} · ${side} px wide, at level 0`),
    );
    box.append(words);
  }

  function choose(tile) {
    pinned = tile;
    hovered = -1;
    point();
    if (tile < 0) {
      said.textContent = "No tile";
      return;
    }
    const score = slide.scores[inputs.score.selectedIndex];
    const [value, share] = [score.values[tile], score.percentiles[tile]];
    const [rank, count] = [score.higher[tile] + 1, slide.count].map(whole);
    const [x, y] = [slide.x[tile], slide.y[tile]].map(whole);
    said.textContent =
      `${score.label} ${number(value)}, percentile ${percent(share)},` +
      ` rank ${rank} of ${count}, at ${x}, ${y}`;
    const stage = canvas.closest(".stage");
    const [frame, mark] = [stage, marker].map((e) => e.getBoundingClientRect());
    if (mark.left < frame.left || mark.right > frame.right) {
      stage.scrollLeft += mark.left - frame.left - frame.width / 2;
    }
    if (mark.top < frame.top || mark.bottom > frame.bottom) {
      stage.scrollTop += mark.top - frame.top - frame.height / 2;
    }
  }

  function under(event) {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor(
      ((event.clientX - box.left) / box.width) * slide.width,
    );
    const row = Math.floor(
      ((event.clientY - box.top) / box.height) * slide.height,
    );
    const inside =
      column >= 0 && row >= 0 && column < slide.width && row < slide.height;
    return inside ? slide.owner[row * slide.width + column] : -1;
  }

  // The tile that lies this way: the next in its row or column, or else one
  // that is near and rather ahead than aside.
  function neighbour(tile, [right, down]) {
    const { x, y, extent, width, height, ratio } = slide;
    const far = (4 * (width + height)) / ratio;
    let [best, least] = [tile, Infinity];
    for (let i = 0; i < slide.count; i++) {
      const [dx, dy] = [x[i] - x[tile], y[i] - y[tile]];
      const ahead = dx * right + dy * down;
      const aside = Math.abs(dx * down) + Math.abs(dy * right);
      if (ahead <= 0 || aside > 2 * ahead) continue;
      const cost = ahead + 3 * aside + (aside < extent / 2 ? 0 : far);
      if (cost < least) [best, least] = [i, cost];
    }
    return best;
  }

  function byRank(tile, key) {
    const { values, higher } = slide.scores[inputs.score.selectedIndex];
    order ??= Uint32Array.from(values.keys()).sort(
      (a, b) => higher[a] - higher[b] || a - b,
    );
    if (key === "Home") return order[0];
    if (key === "End") return order[order.length - 1];
    const at = order.indexOf(tile) + (key === "PageUp" ? -1 : 1);
    return order[Math.min(order.length - 1, Math.max(0, at))];
  }

  function press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !slide.count) return;
    const { key } = event;
    const from = shownTile();
    if (key in STEPS || ["Home", "End", "PageUp", "PageDown"].includes(key)) {
      const isStart = from < 0 && key !== "End";
      const goal = isStart
        ? byRank(-1, "Home")
        : key in STEPS
          ? neighbour(from, STEPS[key])
          : byRank(from, key);
      choose(goal);
    } else if (key === "Escape" && from >= 0) {
      choose(-1);
    } else if (key === "+" || key === "-") {
      if (key === "+") inputs.zoom.stepUp();
      else inputs.zoom.stepDown();
      dress();
    } else {
      return;
    }
    event.preventDefault();
  }

  // -- which slide

  let asked = 0; // the newest call of `show`

  async function show(index) {
    const call = ++asked;
    const loaded = await load(articles[index]);
    if (call !== asked) return; // another was asked for meanwhile
    const labels = [...inputs.score.options].map((option) => option.text);
    const wanted = labels[inputs.score.selectedIndex];
    slide = loaded;
    current = index;
    inputs.score.replaceChildren(
      ...slide.scores.map(({ label }) => new Option(label)),
    );
    const same = slide.scores.findIndex(({ label }) => label === wanted);
    inputs.score.selectedIndex = Math.max(0, same);
    inputs.score.parentElement.hidden = slide.scores.length < 2;
    articles.forEach((article, i) => (article.hidden = i !== index));
    links.forEach((link, i) => {
      link.closest("tr").classList.toggle("chosen", i === index);
      if (i === index) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    });
    const article = articles[index];
    const stage = article.querySelector(".stage");
    const name = article.querySelector("h3").textContent;
    stage.tabIndex = 0;
    stage.setAttribute("role", "application");
    stage.setAttribute("aria-label", `Scores of the tiles of slide ${name}`);
    stage.setAttribute("aria-describedby", "heatmap-keys");
    stage.querySelector(".layer").append(canvas, marker);
    article.querySelector(".side").append(panel);
    article.querySelector(".view").after(keys);
    keys.after(said);
    choose(-1);
    said.textContent = "";
    rescale();
    dress();
  }

  const named = () =>
    Math.max(0, articles.findIndex(({ id }) => `#${id}` === location.hash));

  function go(index) {
    history.replaceState(null, "", `#${articles[index].id}`);
    return show(index);
  }

  links.forEach((link, i) => {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      go(i);
    });
    link.addEventListener("keydown", (event) => {
      const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      const next = links[i + step];
      if (!next) return;
      event.preventDefault();
      next.focus();
      go(i + step);
    });
  });

  root.addEventListener("click", (event) => {
    const tile = event.target.closest("a[data-tile]");
    if (!tile) return;
    event.preventDefault();
    choose(Number(tile.dataset.tile));
    canvas.closest(".stage").focus();
  });
  canvas.addEventListener("pointermove", (event) => {
    const tile = under(event);
    if (tile === hovered) return;
    hovered = tile;
    point();
  });
  canvas.addEventListener("pointerleave", () => {
    hovered = -1;
    point();
  });
  canvas.addEventListener("click", (event) => choose(under(event)));
  root.addEventListener("keydown", (event) => {
    if (event.target.matches(".stage")) press(event);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    const { name } = event.target;
    if (name === "threshold") return soon();
    if (name === "score" || name === "scale") {
      inputs.threshold.value = 0;
      return rescale();
    }
    dress();
  });
  addEventListener("hashchange", () => show(named()));

  root.classList.add("live");
  show(named());
})();

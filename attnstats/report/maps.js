// The mean maps of the local and of the global heads: each as a whole, in cells, and under it a lens on the attention
// near the cursor. Rows are tokens of the answer, columns the tokens that they look at, of prompt and answer.

const BAND = { low: 0.0003, high: 0.5, log: true }; // attention from the least to the darkest shade
const LENSES = [32, 16]; // rows of the lens; it has twice as many columns, all of which the exact band covers
const NAMES = { local: "Local heads", global: "Global heads" };
const MARGIN = 92; // for the names of the lens's rows, where they have room
const HEAD = 17; // over the whole map, for the names of its parts
let figures = []; // { name, whole, lens, reading }, both canvases with their pictures
let lensRows = LENSES[0];
let lensFirst = 0;
let colours = null; // of each byte of attention, packed for an image
let tones = {}; // of the style sheet
let spot = null; // { name, row, key, text } under the pointer

const attention = (code) => (code ? page.floor * 10 ** (-Math.log10(page.floor) * ((code - 1) / page.codes)) : 0);
const percent = (value) => (value === 0 ? `< ${brief(page.floor * 100)} %` : `${brief(value * 100)} %`);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

// As the four bytes of a pixel, the red one first in memory.
const packed = (colour) => colour.reduceRight((all, part) => (all << 8) | Math.round(part), 255) >>> 0;

const mapsView = {
  open() {
    const maps = state.maps;
    byId("maps").hidden = false;
    figures = [];
    spot = null;
    if (!maps) {
      byId("mapping").replaceChildren(make("p", { class: "hint" }, "The maps of this prompt are left out."));
      return;
    }
    if (!maps.decoded) {
      for (const name of Object.keys(NAMES)) {
        maps[name] = { map: bytes(maps[name].map), band: bytes(maps[name].band) };
      }
      maps.decoded = true;
    }
    figures = Object.keys(NAMES).map(makeFigure);
    byId("mapping").replaceChildren(mapsControls(), make("div", { class: "pair" }, ...figures.map(({ node }) => node)));
  },
  paint() {
    if (!figures.length) return;
    const scale = palette();
    const colourOf = (code) => packed(scale[Math.round(255 * share(attention(code), BAND))]);
    colours = Uint32Array.from({ length: 256 }, (_, code) => colourOf(code));
    tones = { soft: css("--soft"), cursor: css("--cursor"), font: `12px ${css("--sans")}` };
    const [height, width] = [state.maps.rows.length - 1, state.maps.columns.length - 1];
    for (const figure of figures) {
      const codes = state.maps[figure.name].map;
      figure.picture = pixels(width, height, (row, c) => codes[row * width + c]);
    }
    this.fit();
  },
  fit() {
    figures.forEach(drawWhole);
    figures.forEach(drawLens);
  },
  move(source) {
    if (!figures.length) return;
    if (source !== "lens") {
      const last = Math.max(0, length() - lensRows);
      lensFirst = Math.min(last, Math.max(0, cursor() - Math.round(lensRows * 0.7)));
    }
    if (source !== "lens" && source !== "whole") spot = null;
    this.fit();
  },
};
views.push(mapsView);

function mapsControls() {
  const { rows } = state.maps;
  const size = rows[1] - rows[0];
  const choice = make("fieldset", {}, make("legend", {}, "Lens"), ...LENSES.map((count) => {
    const input = make("input", { type: "radio", name: "lens", value: count });
    input.checked = count === lensRows;
    input.addEventListener("change", () => {
      lensRows = count;
      mapsView.move();
    });
    return make("label", {}, input, `${count} tokens`);
  }));
  return make("div", { class: "controls" },
    ramp(BAND, "Scale of attention in percent", (value) => `${brief(100 * value)} %`),
    choice,
    make("p", { class: "hint" }, size === 1
      ? "A cell is the share of a token's attention that falls on one token before it."
      : `A cell is the share of a token's attention that falls on ${size} neighbours, as the mean over ${size} tokens.`,
    " The lens under each map shows single tokens and follows the cursor."));
}

function makeFigure(name) {
  const whole = make("canvas", { role: "img", "aria-label": `${NAMES[name]}: map of the whole answer` });
  const lens = make("canvas", { role: "img", "aria-label": `${NAMES[name]}: tokens near the cursor`, class: "lens" });
  const reading = make("p", { class: "reading-line" });
  const title = make("figcaption", {}, make("b", {}, NAMES[name]), name === "local" ? " give WAAD" : " give FAI");
  const node = make("figure", { class: name }, title, whole, lens, reading);
  const figure = { name, whole, lens, reading, node };
  for (const [canvas, source, point] of [[whole, "whole", pointAtWhole], [lens, "lens", pointAtLens]]) {
    canvas.addEventListener("pointermove", (event) => point(figure, event));
    canvas.addEventListener("click", () => state.hovered !== null && select(state.hovered, source));
    canvas.addEventListener("pointerleave", () => {
      spot = null;
      hover(null);
    });
  }
  return figure;
}

// Attention as an image of a pixel per cell.
function pixels(width, height, codeAt) {
  const canvas = make("canvas", { width, height });
  const image = new Uint32Array(width * height);
  for (let row = 0; row < height; row++) {
    for (let c = 0; c < width; c++) image[row * width + c] = colours[codeAt(row, c)];
  }
  canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(image.buffer), width, height), 0, 0);
  return canvas;
}

function written(context, text, x, y, align) {
  context.font = tones.font;
  context.textAlign = align;
  context.textBaseline = "middle";
  context.fillStyle = tones.soft;
  context.fillText(text, x, y);
}

// The context of a canvas of this height in pixels of the page, sharp on every screen.
function prepared(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.imageSmoothingEnabled = false;
  return context;
}

// Positions on the axes of the whole map. All cells are drawn in one size.
function whereWhole(figure) {
  const { rows, columns } = state.maps;
  const wide = figure.whole.clientWidth / (columns.length - 1);
  const cell = (bounds, position) => bounds.findLastIndex((bound, i) => i < bounds.length - 1 && bound <= position);
  return {
    wide,
    height: wide * (rows.length - 1),
    x: (position) => cell(columns, position) * wide,
    y: (position) => HEAD + cell(rows, position) * wide,
  };
}

function drawWhole(figure) {
  const { whole, picture } = figure;
  const { wide, height, x, y } = whereWhole(figure);
  const width = whole.clientWidth;
  const context = prepared(whole, HEAD + height);
  context.drawImage(picture, 0, HEAD, width, height);
  const start = state.prompt.start;
  written(context, x(start) > 50 ? "prompt" : "", 0, 8, "left");
  written(context, "answer", x(start) + 5, 8, "left");
  if (start) context.fillRect(x(start) - 0.5, 0, 1, HEAD + height);
  if (width > 300) ["rows: tokens of the answer,", "columns: what they look at"].forEach((line, i) =>
    written(context, line, width - 4, HEAD + 12 + 16 * i, "right"));
  const at = start + cursor();
  context.strokeStyle = tones.cursor;
  context.lineWidth = 1.5;
  context.beginPath();
  context.moveTo(0, y(at) + wide / 2);
  context.lineTo(x(at) + wide / 2, y(at) + wide / 2);
  context.lineTo(x(at) + wide / 2, HEAD + height);
  context.stroke();
  const first = start + lensFirst;
  const left = x(Math.max(0, first - lensRows));
  const size = state.maps.rows[1] - state.maps.rows[0];
  context.strokeRect(left, y(first), x(first + lensRows - 1) + wide - left, (lensRows * wide) / size);
}

// The code of a token's attention to the one `back` tokens before it; 0 before the first token and after itself.
function exact(name, index, back) {
  const { distances } = state.maps;
  const isThere = back >= 0 && back < distances && back <= state.prompt.start + index;
  return isThere ? state.maps[name].band[index * distances + back] : 0;
}

// A token's attention to itself, to the one before it, and so on.
const nearest = (name, index) =>
  Array.from({ length: state.maps.distances }, (_, back) => attention(exact(name, index, back)));

function lensLayout(figure) {
  const named = figure.lens.clientWidth > 300 && lensRows <= 16;
  const left = named ? MARGIN : 0;
  const cell = (figure.lens.clientWidth - left) / (2 * lensRows);
  const rows = Math.min(lensRows, length());
  return { named, left, cell, rows, firstKey: state.prompt.start + lensFirst - lensRows };
}

function drawLens(figure) {
  const { named, left, cell, rows, firstKey } = lensLayout(figure);
  const context = prepared(figure.lens, cell * rows);
  const { start } = state.prompt;
  const back = (row, c) => start + lensFirst + row - firstKey - c;
  const picture = pixels(2 * lensRows, rows, (row, c) => exact(figure.name, lensFirst + row, back(row, c)));
  context.drawImage(picture, left, 0, 2 * lensRows * cell, rows * cell);
  written(context, `tokens ${lensFirst + 1} to ${lensFirst + rows}`, figure.lens.clientWidth - 4, 12, "right");
  for (let row = 0; named && row < rows; row++) {
    written(context, word(start + lensFirst + row, 12), left - 6, (row + 0.5) * cell, "right");
  }
  const row = cursor() - lensFirst;
  context.strokeStyle = tones.cursor;
  context.lineWidth = 1.5;
  if (row >= 0 && row < rows) context.strokeRect(left + 0.75, row * cell, (lensRows + row + 1) * cell - 1, cell);
  if (spot?.lens) context.strokeRect(left + (spot.key - firstKey) * cell, (spot.row - lensFirst) * cell, cell, cell);
  readingOf(figure);
}

// The line under each map: the cell under the pointer, else the keys that the token at the cursor looks at most.
function readingOf(figure) {
  const start = state.prompt.start;
  if (spot?.name === figure.name) {
    figure.reading.textContent = spot.text;
    return;
  }
  const i = cursor();
  const most = nearest(figure.name, i)
    .map((value, back) => [value, back])
    .filter(([value]) => value >= 0.001)
    .sort((a, b) => b[0] - a[0])
    .slice(0, 3);
  const where = (back) => (back ? `${quoted(start + i - back)}, ${back} back` : "itself");
  const list = most.map(([value, back]) => `${percent(value)} on ${where(back)}`).join("; ");
  figure.reading.textContent = `${quoted(start + i)}: ${list || `little on the last ${state.maps.distances} tokens`}`;
}

function pointAtWhole(figure, event) {
  const { rows, columns } = state.maps;
  const { wide } = whereWhole(figure);
  const box = figure.whole.getBoundingClientRect();
  const r = Math.min(rows.length - 2, Math.max(0, Math.floor((event.clientY - box.top - HEAD) / wide)));
  const c = Math.min(columns.length - 2, Math.max(0, Math.floor((event.clientX - box.left) / wide)));
  const segment = (bounds, i) => quoted(bounds[i], bounds[i + 1]);
  const index = Math.min(length() - 1, Math.floor((rows[r] + rows[r + 1] - 1) / 2) - state.prompt.start);
  const value = attention(state.maps[figure.name].map[r * (columns.length - 1) + c]);
  const later = columns[c] >= rows[r + 1];
  const [query, key] = [segment(rows, r), segment(columns, c)];
  const text = later ? `${key} comes after ${query}` : `${query} → ${key}: ${percent(value)} of its attention`;
  spot = { name: figure.name, text };
  state.hovered = null;
  hover(index, "whole");
}

function pointAtLens(figure, event) {
  const { left, cell, rows, firstKey } = lensLayout(figure);
  const box = figure.lens.getBoundingClientRect();
  const row = lensFirst + Math.min(rows - 1, Math.max(0, Math.floor((event.clientY - box.top) / cell)));
  const key = Math.max(firstKey, firstKey + Math.floor((event.clientX - box.left - left) / cell));
  const back = state.prompt.start + row - key;
  const value = percent(attention(exact(figure.name, row, back)));
  const text = () => `${quoted(state.prompt.start + row)} → ${quoted(key)}, ${back} back: ${value} of its attention`;
  spot = back < 0 || key < 0 ? null : { name: figure.name, row, key, lens: true, text: text() };
  state.hovered = null;
  hover(row, "lens");
}

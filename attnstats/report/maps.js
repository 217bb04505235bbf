// The mean maps of the local and of the global heads: each as a whole, in cells, and under it a lens on the attention
// near the cursor or at the place that is pointed at. Rows are tokens of the answer, columns the tokens that they look at,
// of prompt and answer. Within the exact band the lens shows single pairs of tokens, beyond it the cells of the whole map.

const BAND = { low: 0.0003, high: 0.5, log: true }; // attention from the least to the darkest shade
const LENSES = [32, 16]; // rows of the lens; it has twice as many columns
const NAMES = { local: "Local heads", global: "Global heads" };
const MARGIN = 92; // for the names of the lens's rows, where they have room
const HEAD = 17; // over the whole map, for the names of its parts
let figures = []; // { name, whole, lens, reading }, both canvases with their pictures
let lensRows = LENSES[0];
let lens = { row: 0, key: 0 }; // its first token of the answer, and the position of its first column
let pinned = null; // { index, row, key }: a place that was clicked stays until another token is selected
let colours = null; // of each byte of attention, packed for an image
let tones = {}; // of the style sheet
let spot = null; // { name, row, key, text } under the pointer

const attention = (code) => (code ? page.floor * 10 ** (-Math.log10(page.floor) * ((code - 1) / page.codes)) : 0);
const percent = (value) => (value === 0 ? `< ${brief(page.floor * 100)} %` : `${brief(value * 100)} %`);
const codeOf = (value) =>
  (value < page.floor ? 0 : 1 + Math.round(page.codes * (1 - Math.log10(value) / Math.log10(page.floor))));
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

// As the four bytes of a pixel, the red one first in memory.
const packed = (colour) => colour.reduceRight((all, part) => (all << 8) | Math.round(part), 255) >>> 0;

const mapsView = {
  open() {
    const maps = state.maps;
    byId("maps").hidden = !page.maps;
    figures = [];
    [spot, pinned] = [null, null];
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
    if (pinned?.index !== state.selected) pinned = null;
    if (source === "whole") lookAt(cursor() - lensRows / 2, spot.key - lensRows);
    else if (pinned && state.hovered === null && source !== "lens") lookAt(pinned.row, pinned.key);
    else if (source !== "lens") lookAtDiagonal();
    if (source !== "lens" && source !== "whole") spot = null;
    this.fit();
  },
};
views.push(mapsView);

// Move the lens, within the map.
function lookAt(row, key) {
  const within = (first, count, all) => Math.min(Math.max(0, Math.round(first)), Math.max(0, all - count));
  lens = {
    row: within(row, lensRows, length()),
    key: within(key, 2 * lensRows, state.prompt.start + length()),
  };
}

// Move the lens to the cursor, with the token that its last row is as the last column.
function lookAtDiagonal() {
  const row = Math.min(Math.max(0, cursor() - Math.round(lensRows * 0.7)), Math.max(0, length() - lensRows));
  lookAt(row, state.prompt.start + Math.min(row + lensRows, length()) - 2 * lensRows);
}

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
    make("p", { class: "hint" },
      "Rows are tokens of the answer, columns the tokens that they look at. ", size === 1
        ? "A cell is the share of a token's attention that falls on one token before it."
        : `A cell is the share of a token's attention that falls on ${size} neighbours, as the mean over ${size} tokens.`,
      ` The lens under each map follows the cursor; a place of the map moves it there, and a click keeps it.`,
      size === 1 ? "" : ` It shows single tokens up to ${state.maps.distances - 1} back, and left of its dashed line the cells` +
        " of the map, each spread evenly over its tokens."));
}

function makeFigure(name) {
  const whole = make("canvas", { role: "img", "aria-label": `${NAMES[name]}: map of the whole answer` });
  const near = make("canvas", { role: "img", "aria-label": `${NAMES[name]}: tokens near the cursor`, class: "lens" });
  const place = make("p", { class: "hint" });
  const reading = make("p", { class: "reading-line" });
  const title = make("figcaption", {}, make("b", {}, NAMES[name]), name === "local" ? " give WAAD" : " give FAI");
  const node = make("figure", { class: name }, title, whole, place, near, reading);
  const figure = { name, whole, place, near, reading, node };
  for (const [canvas, source, point] of [[whole, "whole", pointAtWhole], [near, "lens", pointAtLens]]) {
    canvas.addEventListener("pointermove", (event) => point(figure, event));
    canvas.addEventListener("click", (event) => {
      point(figure, event); // a finger was nowhere before
      pinned = { index: state.hovered, ...lens };
      select(state.hovered, source);
    });
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
  // A short answer has its name at the right edge, over the prompt's part, too.
  context.font = tones.font;
  const [before, after] = ["prompt", "answer"].map((text) => context.measureText(text).width);
  const left = Math.min(x(start) + 5, width - after);
  if (before + 8 < Math.min(left, x(start))) written(context, "prompt", 0, 8, "left");
  written(context, "answer", left, 8, "left");
  if (start) context.fillRect(x(start) - 0.5, left > x(start) ? 0 : HEAD, 1, HEAD + height);
  const at = start + cursor();
  context.strokeStyle = tones.cursor;
  context.lineWidth = 1.5;
  context.beginPath();
  context.moveTo(0, y(at) + wide / 2);
  context.lineTo(x(at) + wide / 2, y(at) + wide / 2);
  context.lineTo(x(at) + wide / 2, HEAD + height);
  context.stroke();
  const last = { row: Math.min(lens.row + lensRows, length()) - 1, key: Math.min(lens.key + 2 * lensRows, start + length()) - 1 };
  const [from, top] = [x(lens.key), y(start + lens.row)];
  context.strokeRect(from, top, x(last.key) + wide - from, y(start + last.row) + wide - top);
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

// The cell of the whole map with a token of the answer and a position: its place, the number of its positions, and the
// code of a token's attention to them together.
function pooled(name, index, key) {
  const { rows, columns } = state.maps;
  const cell = (bounds, position) => bounds.findLastIndex((bound, i) => i < bounds.length - 1 && bound <= position);
  const [r, c] = [cell(rows, state.prompt.start + index), cell(columns, key)];
  return { r, c, size: columns[c + 1] - columns[c], code: state.maps[name].map[r * (columns.length - 1) + c] };
}

// Whether a token's attention to the one so many tokens before it is known exactly.
const isExact = (back) => back < state.maps.distances || state.maps.rows[1] - state.maps.rows[0] === 1;

// The code of a token's attention to a position: exact, or an equal part of the cell's.
function codeAt(name, index, key) {
  const back = state.prompt.start + index - key;
  if (back < 0) return 0;
  if (back < state.maps.distances) return exact(name, index, back);
  const { size, code } = pooled(name, index, key);
  return size === 1 ? code : codeOf(attention(code) / size);
}

function lensLayout(figure) {
  const named = figure.near.clientWidth > 300 && lensRows <= 16;
  const left = named ? MARGIN : 0;
  const cell = (figure.near.clientWidth - left) / (2 * lensRows);
  return { named, left, cell, rows: Math.min(lensRows, length()), keys: Math.min(2 * lensRows, state.prompt.start + length()) };
}

function drawLens(figure) {
  const { named, left, cell, rows, keys } = lensLayout(figure);
  const context = prepared(figure.near, cell * rows);
  const { start } = state.prompt;
  const picture = pixels(keys, rows, (row, c) => codeAt(figure.name, lens.row + row, lens.key + c));
  context.drawImage(picture, left, 0, keys * cell, rows * cell);
  figure.place.textContent = `Lens: tokens ${lens.row + 1} to ${lens.row + rows}, looking at positions ` +
    `${lens.key} to ${lens.key + keys - 1}`;
  for (let row = 0; named && row < rows; row++) {
    written(context, word(start + lens.row + row, 12), left - 6, (row + 0.5) * cell, "right");
  }
  const x = (key) => left + Math.min(Math.max(0, key - lens.key), keys) * cell;
  if (!isExact(state.maps.distances)) {
    context.strokeStyle = tones.soft;
    context.setLineDash([3, 3]);
    context.beginPath();
    for (let row = 0; row < rows; row++) {
      const edge = x(start + lens.row + row - state.maps.distances + 1);
      if (edge <= left || edge >= left + keys * cell) continue;
      context.lineTo(edge, row * cell);
      context.lineTo(edge, (row + 1) * cell);
    }
    context.stroke();
    context.setLineDash([]);
  }
  const row = cursor() - lens.row;
  context.strokeStyle = tones.cursor;
  context.lineWidth = 1.5;
  const end = x(start + cursor() + 1);
  if (row >= 0 && row < rows && end > left) context.strokeRect(left + 0.75, row * cell, end - left - 1, cell);
  if (spot && spot.key >= lens.key && spot.key < lens.key + keys && spot.row >= lens.row && spot.row < lens.row + rows) {
    context.strokeRect(x(spot.key), (spot.row - lens.row) * cell, cell, cell);
  }
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
  const middle = (bounds, i) => Math.floor((bounds[i] + bounds[i + 1] - 1) / 2);
  const index = Math.min(length() - 1, middle(rows, r) - state.prompt.start);
  const key = Math.min(middle(columns, c), state.prompt.start + length() - 1);
  const text = columns[c] >= rows[r + 1]
    ? `${quoted(columns[c], columns[c + 1])} comes after ${quoted(rows[r], rows[r + 1])}` : ofCell(figure.name, index, key);
  spot = { name: figure.name, row: index, key, text };
  state.hovered = null;
  hover(index, "whole");
}

function pointAtLens(figure, event) {
  const { left, cell, rows, keys } = lensLayout(figure);
  const box = figure.near.getBoundingClientRect();
  const within = (place, count) => Math.min(count - 1, Math.max(0, Math.floor(place / cell)));
  const row = lens.row + within(event.clientY - box.top, rows);
  const key = lens.key + within(event.clientX - box.left - left, keys);
  const back = state.prompt.start + row - key;
  const text = () => (isExact(back) ? ofPair(figure.name, row, key) : ofCell(figure.name, row, key));
  spot = back < 0 ? null : { name: figure.name, row, key, text: text() };
  state.hovered = null;
  hover(row, "lens");
}

function ofPair(name, index, key) {
  const query = state.prompt.start + index;
  const value = percent(attention(codeAt(name, index, key)));
  return `${quoted(query)} → ${quoted(key)}, ${query - key} back: ${value} of its attention (exact)`;
}

function ofCell(name, index, key) {
  const { rows, columns } = state.maps;
  const { r, c, size, code } = pooled(name, index, key);
  if (rows[r + 1] - rows[r] === 1 && size === 1) return ofPair(name, index, key);
  const [query, keys] = [quoted(rows[r], rows[r + 1]), quoted(columns[c], columns[c + 1])];
  return `${query} → ${keys}: ${percent(attention(code))} of their attention (a cell of the map: mean of ` +
    `${rows[r + 1] - rows[r]} tokens, on ${size} together)`;
}

// Shared by all views: the data, the state, elements, numbers, and the calls to the views when something changes.
// Text of a model only ever becomes a text node.

const data = (id) => {
  const element = document.getElementById(id);
  return element && JSON.parse(element.textContent);
};
const page = data("data-page");
const byId = (id) => document.getElementById(id);
const SVG = byId("mark").namespaceURI;

// `selected` and `hovered`, the token under the pointer, are indices of tokens of the response; `hits` are those that a
// search found, `inView` the first and the last in a text box that scrolls.
const state = { number: 0, hits: new Set(), inView: null, prompt: null, maps: null, column: "waad", share: page.share, selected: 0, hovered: null };

// A view has some of: open() for a new prompt, paint() for another column, share or colour scheme, move() for another
// token, fit() for another width, found() for another search, scrolled() for other tokens in view.
const views = [];
const tell = (what, ...details) => views.forEach((view) => view[what]?.(...details));

const length = () => state.prompt.values.waad.length;
const cursor = () => state.hovered ?? state.selected;
const column = (key) => page.columns.find((entry) => entry.key === key);
const tokenText = (index) => state.prompt.tokens[state.prompt.start + index];

// A token as a word of at most `most` characters, and tokens in quotation marks, by position in prompt and answer.
const short = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
const word = (position, most) => short(state.prompt.tokens[position].trim() || "space", most);
const quoted = (from, to = from + 1) =>
  `“${short(state.prompt.tokens.slice(from, to).join("").trim() || "space", 40)}”`;

function hover(index, source) {
  if (index === state.hovered) return;
  state.hovered = index;
  tell("move", source);
}

function select(index, source) {
  state.selected = Math.min(Math.max(index, 0), length() - 1);
  state.hovered = null;
  tell("move", source);
}

function make(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function draw(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

// An empty picture of this size, which a printer may make as wide as its page.
const drawing = (width, height) =>
  draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });

function filled(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const places = (value, digits) => (value === null ? "–" : value.toFixed(digits));
const shown = (key, index) => {
  const { digits, unit } = column(key);
  const value = state.prompt.values[key][index];
  return value === null ? "no value" : `${places(value, digits)} ${unit}`;
};

// The place of a value on its scale, 0 .. 1; the same as Domain.share in scale.py.
function share(value, { low, high, log }) {
  const place = log
    ? Math.log(Math.max(value, 1e-300) / low) / Math.log(high / low)
    : (value - low) / (high - low);
  return Math.min(1, Math.max(0, place));
}

const shade = (value, domain) => Math.min(page.shades - 1, Math.floor(share(value, domain) * page.shades));
const valueAt = (place, { low, high, log }) => (log ? low * (high / low) ** place : low + (high - low) * place);

// Two or three digits, without trailing zeros.
const brief = (value) => (value === 0 ? "0" : String(Number(value.toPrecision(value >= 100 ? 3 : 2))));

function marked(ranks) {
  const count = Math.ceil(state.share * ranks.length);
  return ranks.map((rank) => rank !== null && rank < count);
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// 256 colours between the shades of the style sheet, as [red, green, blue].
function palette() {
  const stops = Array.from({ length: page.shades }, (_, i) => {
    const code = parseInt(css(`--s${i}`).slice(1), 16);
    return [code >> 16, (code >> 8) & 255, code & 255];
  });
  return Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (stops.length - 1);
    const index = Math.min(Math.floor(place), stops.length - 2);
    return stops[index].map((from, c) => from + (stops[index + 1][c] - from) * (place - index));
  });
}

// The shades of a scale with the values at its ends and quarters; `text` writes a value.
function ramp(domain, label, text = brief) {
  const bar = Array.from({ length: page.shades }, (_, i) => make("i", { class: `s${i}` }));
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((place) => {
    const sign = place === 1 ? "≥ " : place === 0 && domain.low > 0 ? "≤ " : "";
    return make("li", {}, sign + text(valueAt(place, domain)));
  });
  const parts = [make("span", {}, ...bar), make("ol", {}, ...ticks)];
  return make("div", { class: "ramp", role: "img", "aria-label": label }, ...parts);
}

// A value on an axis with the digits that its steps need.
const onAxis = (value, tick) => {
  const text = value.toFixed(Math.max(0, -Math.floor(Math.log10(tick) + 1e-9)));
  return Number(text) === 0 ? "0" : text;
};

// Steps of 1, 2 or 5 times a power of ten, at most `most` of them in `span`.
function tickStep(span, most) {
  const power = 10 ** Math.floor(Math.log10(span / most));
  return [1, 2, 5, 10].map((unit) => unit * power).find((step) => span / step <= most) ?? 10 * power;
}

// Keys that move the cursor, the same in every view; `line` is the move of arrow up and down.
function moveByKey(event, line) {
  const at = cursor();
  const steps = {
    ArrowLeft: () => at - 1,
    ArrowRight: () => at + 1,
    ArrowUp: () => line(at, -1),
    ArrowDown: () => line(at, 1),
    Home: () => 0,
    End: () => length() - 1,
    PageUp: () => nextMark(at, -1),
    PageDown: () => nextMark(at, 1),
  };
  if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  select(steps[event.key](), "key");
}

function nextMark(from, step) {
  const preplan = marked(state.prompt.preplan);
  const anchor = marked(state.prompt.anchor);
  for (let i = from + step; i >= 0 && i < length(); i += step) if (preplan[i] || anchor[i]) return i;
  return from;
}

// The range of the axis. A few values far above the rest are left out and written at its top: FAI of the last tokens is a
// mean over one or two queries and can be so large that all other values would look like zero.
function axis(values) {
  if (!values.length) return { least: 0, most: 1, tick: 1 };
  const sorted = [...values].sort((a, b) => a - b);
  const low = sorted[0];
  const usual = sorted[Math.floor(0.98 * (sorted.length - 1))];
  const high = usual > low ? Math.min(sorted.at(-1), usual + 0.75 * (usual - low)) : sorted.at(-1);
  const tick = tickStep(Math.max(high - low, 1e-9), 4);
  const least = Math.floor(low / tick + 1e-6) * tick;
  return { least, most: Math.max(Math.ceil(high / tick - 1e-6) * tick, least + tick), tick };
}

// A switch: a radio button for each [value, text].
function choice(id, name, options, chosen, act) {
  for (const [value, text] of options) {
    const input = make("input", { type: "radio", name, value });
    input.checked = value === chosen;
    input.addEventListener("change", () => {
      act(value);
      tell("paint");
    });
    byId(id).append(make("label", {}, input, text));
  }
}

// Scroll a text in its box until a token is in view.
function intoView(text, span) {
  const [box, frame] = [span.getBoundingClientRect(), text.getBoundingClientRect()];
  const room = 24;
  if (box.top < frame.top + room) text.scrollTop -= frame.top + room - box.top;
  else if (box.bottom > frame.bottom - room) text.scrollTop += box.bottom - frame.bottom + room;
}

// Fade the edges beyond which a text goes on; true if it scrolls.
function fadeEdges(text) {
  const { scrollTop, clientHeight, scrollHeight } = text;
  const scrolls = scrollHeight > clientHeight + 1;
  text.parentElement.classList.toggle("above", scrolls && scrollTop > 1);
  text.parentElement.classList.toggle("below", scrolls && scrollTop + clientHeight < scrollHeight - 1);
  return scrolls;
}

// Where labels and titles are in a picture, with a little room around them.
const textsIn = (picture) => [...picture.querySelectorAll(".label, .title")].map((text) => {
  const { x, y, width, height } = text.getBBox();
  return { left: x - 3, right: x + width + 3, top: y - 1, bottom: y + height + 1 };
}).sort((a, b) => a.top - b.top);

// A vertical line that leaves out what is written.
function lineAround(x, top, bottom, texts) {
  let d = "";
  let from = top;
  for (const text of texts.filter(({ left, right }) => left < x && x < right)) {
    if (text.top > from) d += `M${x} ${from}V${text.top}`;
    from = Math.max(from, text.bottom);
  }
  return d + (from < bottom ? `M${x} ${from}V${bottom}` : "");
}

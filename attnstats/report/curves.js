// WAAD and FAI along the answer, one above the other on a common axis of tokens, and the chosen column as a third.
// For an answer that is too long to tell its tokens apart, a second chart shows those near the cursor.

const PANEL = 104;
const GAP = 34;
const EDGE = { left: 46, right: 12, top: 24, bottom: 34 };
const LABELS = 6;
const CLOSE = 3; // pixels per token below which there is a second chart
const WIDE = 9; // pixels per token in the second chart

const overview = chartIn(byId("curves"), "curves");
const detail = chartIn(byId("detail"), "detail");

const curvesView = {
  open() {
    for (const { node } of [overview, detail]) node.setAttribute("aria-valuemax", length());
    detail.first = 0;
  },
  paint: drawCurves,
  fit: drawCurves,
  move(source) {
    const i = cursor();
    for (const { node } of [overview, detail]) {
      node.setAttribute("aria-valuenow", i + 1);
      node.setAttribute("aria-valuetext", `${quoted(state.prompt.start + i)}, WAAD ${shown("waad", i)}, FAI ${shown("fai", i)}`);
    }
    if (!detail.node.hidden && source !== "detail") {
      const count = detail.last - detail.first;
      const first = Math.max(0, Math.min(length() - count, i - Math.round(count / 2)));
      if (first !== detail.first) drawChart(detail, first, first + count);
      overview.frame.setAttribute("x", overview.x(first - 0.5));
    }
    byId("at").textContent = overview.node.getAttribute("aria-valuetext");
    pointCursor(overview, i);
    pointCursor(detail, i);
  },
  found: drawCurves,
  scrolled: drawInView,
};
views.push(curvesView);

// A chart in an element, with its handlers of pointer and keys.
function chartIn(node, name) {
  const chart = { node, first: 0, last: 0, panels: [] };
  const tokenAt = (event) => {
    const x = event.clientX - node.getBoundingClientRect().left;
    const index = chart.first + Math.floor((x - EDGE.left) / chart.step);
    return index >= chart.first && index < chart.last ? index : null;
  };
  node.addEventListener("pointermove", (event) => hover(tokenAt(event), name));
  node.addEventListener("pointerleave", () => hover(null, name));
  node.addEventListener("click", (event) => tokenAt(event) !== null && select(tokenAt(event), name));
  node.addEventListener("keydown", (event) => moveByKey(event, (index, step) => index - 5 * step));
  return chart;
}

function drawCurves() {
  if (!state.prompt || !overview.node.clientWidth) return; // a page that is being closed has no width
  const room = overview.node.clientWidth - EDGE.left - EDGE.right;
  const isLong = room / length() < CLOSE;
  detail.node.hidden = !isLong;
  drawChart(overview, 0, length());
  if (isLong) {
    const count = Math.min(length(), Math.floor(room / WIDE));
    drawChart(detail, Math.min(detail.first, length() - count), Math.min(detail.first, length() - count) + count);
    const wide = overview.x(count) - overview.x(0);
    overview.frame = draw("rect", { class: "window", y: EDGE.top, width: wide, height: overview.bottom - EDGE.top });
    overview.picture.prepend(overview.frame);
  }
  drawInView();
  curvesView.move();
}

function pointCursor(chart, i) {
  if (chart.node.hidden) return;
  const x = chart.x(i);
  chart.line.setAttribute("d", lineAround(x, EDGE.top, chart.bottom, chart.texts));
  for (const { at, key, dot } of chart.panels) {
    const value = state.prompt.values[key][i];
    dot.setAttribute("r", value === null ? 0 : 4.5);
    if (value === null) continue;
    dot.setAttribute("cx", x);
    dot.setAttribute("cy", at(value));
  }
}

// A bar along the axis of the overview: the tokens that the text box shows.
function drawInView() {
  if (!overview.inView) return;
  const [first, last] = state.inView ?? [0, -1];
  const isPart = state.inView && last - first < length() - 1;
  overview.inView.setAttribute("d", isPart ? `M${overview.x(first)} ${overview.bottom + 3}H${overview.x(last)}` : "M0 0");
}

// The tokens first .. last - 1.
function drawChart(chart, first, last) {
  const width = chart.node.clientWidth;
  const keys = ["waad", "fai"];
  if (!keys.includes(state.column)) keys.push(state.column);
  const bottom = EDGE.top + keys.length * PANEL + (keys.length - 1) * GAP;
  const step = (width - EDGE.left - EDGE.right) / (last - first);
  const x = (i) => EDGE.left + (i - first + 0.5) * step;
  const picture = drawing(width, bottom + EDGE.bottom);
  Object.assign(chart, { first, last, width, bottom, step, x, picture });
  chart.panels = keys.map((key, row) => drawPanel(chart, key, EDGE.top + row * (PANEL + GAP)));
  drawAxis(chart);
  chart.line = draw("path", { class: "cursor" });
  chart.inView = draw("path", { class: "inview" });
  const hits = [...state.hits].filter((i) => i >= first && i < last).map((i) => `M${x(i)} ${bottom}v7`);
  picture.append(draw("path", { class: "hit", d: hits.join("") || "M0 0" }), chart.inView);
  picture.append(chart.line, ...chart.panels.map(({ dot }) => dot));
  chart.node.replaceChildren(picture);
  chart.texts = textsIn(picture);
}

function drawAxis({ picture, first, last, width, bottom, x }) {
  const tick = Math.max(1, tickStep(last - first, Math.max(3, Math.floor(width / 90))));
  const numbers = first ? [] : [1];
  for (let i = Math.ceil((first + 1) / tick) * tick; i <= last; i += tick) if (i > 1 || tick > 1) numbers.push(i);
  for (const number of numbers) {
    const isLast = x(number - 1) > width - 20;
    const at = { x: isLast ? width - 2 : x(number - 1), y: bottom + 16, "text-anchor": isLast ? "end" : "middle" };
    picture.append(draw("text", at, String(number)));
  }
  const middle = (EDGE.left + width - EDGE.right) / 2;
  picture.append(draw("text", { x: middle, y: bottom + 31, "text-anchor": "middle" }, "token of the answer"));
}

function drawPanel(chart, key, y) {
  const { picture, width, first, last, x } = chart;
  const { title, unit } = column(key);
  const values = state.prompt.values[key];
  const { least, most, tick } = axis(values.filter((value) => value !== null));
  const at = (value) => y + PANEL * (1 - (Math.min(value, most) - least) / (most - least));
  for (let i = 0; i <= Math.round((most - least) / tick); i++) {
    const value = least + i * tick;
    picture.append(draw("path", { class: "grid", d: `M${EDGE.left} ${at(value)}H${width - EDGE.right}` }));
    picture.append(draw("text", { x: EDGE.left - 7, y: at(value) + 4, "text-anchor": "end" }, onAxis(value, tick)));
  }
  picture.append(draw("text", { class: "title", x: EDGE.left, y: y - 10 }, title, draw("tspan", {}, `  ${unit}`)));
  let d = "";
  for (let i = first; i < last; i++) {
    if (values[i] === null) continue;
    d += `${d && values[i - 1] !== null ? "L" : "M"}${x(i).toFixed(1)} ${at(values[i]).toFixed(1)}`;
  }
  picture.append(draw("path", { class: `line ${key}`, d: d || "M0 0" }));
  const known = Math.max(first, values.findLastIndex((value) => value !== null) + 1);
  if (known < last) {
    const from = x(known - 0.5);
    picture.append(draw("rect", { class: "none", x: from, y, width: width - EDGE.right - from, height: PANEL }));
  }
  drawMarks(chart, key, y, at, most);
  return { key, at, dot: draw("circle", { class: `dot ${key}`, r: 0 }) };
}

// Preplan tokens are triangles, anchors are rings; the highest are named where there is room.
function drawMarks({ picture, first, last, width, step, x }, key, y, at, most) {
  const ranks = { waad: state.prompt.preplan, fai: state.prompt.anchor }[key];
  if (!ranks || !state.share) return;
  const values = state.prompt.values[key];
  const chosen = marked(ranks).flatMap((is, i) => (is && i >= first && i < last ? [i] : []));
  const size = step < CLOSE ? 0.7 : 1;
  for (const i of chosen) {
    const [cx, cy] = [x(i), at(values[i])];
    picture.append(key === "waad"
      ? draw("path", { class: "peak waad", d: `M${cx - 4 * size} ${cy - 6 * size}h${8 * size}L${cx} ${cy + 1}Z` })
      : draw("circle", { class: "peak fai", cx, cy, r: 3.2 * size }));
  }
  const placed = [[EDGE.left + 80, 160]]; // the panel's title
  for (const i of chosen.sort((a, b) => ranks[a] - ranks[b]).slice(0, LABELS)) {
    const bare = word(state.prompt.start + i, 12);
    const beyond = values[i] > most;
    const text = (/[\p{L}\p{N}]/u.test(bare) ? bare : `“${bare}”`) + (beyond ? ` ${brief(values[i])} ↑` : "");
    const wide = 6.6 * text.length + 12;
    const middle = Math.min(Math.max(x(i), EDGE.left + wide / 2), width - EDGE.right - wide / 2);
    const others = at(values[i]) < y + 14 ? placed : placed.slice(1);
    if (others.some(([other, taken]) => Math.abs(middle - other) < (wide + taken) / 2)) continue;
    placed.push([middle, wide]);
    const label = beyond
      ? { x: Math.min(x(i), width - EDGE.right) - 9, y: at(values[i]) + 4, "text-anchor": "end" }
      : { x: middle, y: at(values[i]) - 9, "text-anchor": "middle" };
    picture.append(draw("text", { class: "label", ...label }, text));
  }
}

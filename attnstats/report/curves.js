// WAAD and FAI along the answer, one above the other on a common axis of tokens, and the chosen column as a third.

const curves = byId("curves");
const PANEL = 104;
const GAP = 34;
const EDGE = { left: 46, right: 10, top: 24, bottom: 34 };
const LABELS = 6;
let plot = null; // { x: token -> pixel, index: pixel -> token, points: per panel, line, dots }

const curvesView = {
  open() {
    curves.setAttribute("aria-valuemax", length());
  },
  paint: drawCurves,
  fit: drawCurves,
  move() {
    const i = cursor();
    curves.setAttribute("aria-valuenow", i + 1);
    curves.setAttribute("aria-valuetext", `${tokenText(i).trim()}, WAAD ${shown("waad", i)}, FAI ${shown("fai", i)}`);
    if (!plot) return;
    const x = plot.x(i);
    plot.line.setAttribute("d", `M${x} ${EDGE.top}V${plot.bottom}`);
    plot.panels.forEach(({ at, key, dot }) => {
      const value = state.prompt.values[key][i];
      dot.setAttribute("r", value === null ? 0 : 4.5);
      if (value !== null) dot.setAttribute("cx", x), dot.setAttribute("cy", at(value));
    });
  },
};
views.push(curvesView);

function drawCurves() {
  if (!state.prompt) return;
  const width = curves.clientWidth;
  const keys = ["waad", "fai"];
  if (!keys.includes(state.column)) keys.push(state.column);
  const bottom = EDGE.top + keys.length * PANEL + (keys.length - 1) * GAP;
  const step = (width - EDGE.left - EDGE.right) / length();
  const x = (i) => EDGE.left + (i + 0.5) * step;
  const picture = draw("svg", { width, height: bottom + EDGE.bottom, "aria-hidden": "true" });
  const panels = keys.map((key, row) => drawPanel(picture, key, EDGE.top + row * (PANEL + GAP), x, width));
  const tick = Math.max(1, tickStep(length(), Math.max(3, Math.floor(width / 90))));
  for (let i = 1; i <= length(); i += i === 1 && tick > 1 ? tick - 1 : tick) {
    picture.append(draw("text", { x: x(i - 1), y: bottom + 16, "text-anchor": "middle" }, String(i)));
  }
  picture.append(draw("text", { x: (EDGE.left + width - EDGE.right) / 2, y: bottom + 31, "text-anchor": "middle" }, "token of the answer"));
  const line = draw("path", { class: "cursor" });
  picture.append(line, ...panels.map(({ dot }) => dot));
  plot = { x, bottom, panels, line, index: (pixel) => Math.floor((pixel - EDGE.left) / step) };
  curves.replaceChildren(picture);
  curvesView.move();
}

function drawPanel(picture, key, y, x, width) {
  const { title, unit } = column(key);
  const values = state.prompt.values[key];
  const { least, most, tick } = axis(values.filter((value) => value !== null));
  const at = (value) => y + PANEL * (1 - (Math.min(value, most) - least) / (most - least));
  for (let i = 0; i <= Math.round((most - least) / tick); i++) {
    const value = least + i * tick;
    picture.append(draw("path", { class: "grid", d: `M${EDGE.left} ${at(value)}H${width - EDGE.right}` }));
    picture.append(draw("text", { x: EDGE.left - 7, y: at(value) + 4, "text-anchor": "end" }, brief(value)));
  }
  picture.append(draw("text", { class: "title", x: EDGE.left, y: y - 10 }, title, draw("tspan", {}, `  ${unit}`)));
  let d = "";
  values.forEach((value, i) => {
    if (value !== null) d += `${d && values[i - 1] !== null ? "L" : "M"}${x(i).toFixed(1)} ${at(value).toFixed(1)}`;
  });
  picture.append(draw("path", { class: `line ${key}`, d: d || "M0 0" }));
  const none = values.length - 1 - values.findLastIndex((value) => value !== null);
  if (none) {
    const from = x(values.length - none - 0.5);
    picture.append(draw("rect", { class: "none", x: from, y, width: width - EDGE.right - from, height: PANEL }));
  }
  drawMarks(picture, key, values, at, x, most, width);
  return { key, at, dot: draw("circle", { class: `dot ${key}`, r: 0 }) };
}

// Preplan tokens are triangles, anchors are rings; the highest are named where there is room.
function drawMarks(picture, key, values, at, x, most, width) {
  const ranks = { waad: state.prompt.preplan, fai: state.prompt.anchor }[key];
  if (!ranks || !state.share) return;
  const chosen = marked(ranks);
  values.forEach((value, i) => {
    if (!chosen[i]) return;
    const [cx, cy] = [x(i), at(value)];
    picture.append(key === "waad"
      ? draw("path", { class: "peak waad", d: `M${cx - 4} ${cy - 6}H${cx + 4}L${cx} ${cy + 1}Z` })
      : draw("circle", { class: "peak fai", cx, cy, r: 3.2 }));
  });
  const placed = [];
  const highest = ranks.map((rank, i) => [rank, i]).filter(([rank]) => rank !== null && rank < LABELS).sort((a, b) => a[0] - b[0]);
  for (const [, i] of highest) {
    const bare = tokenText(i).trim() || "space";
    const word = /[\p{L}\p{N}]/u.test(bare) ? bare : `“${bare}”`;
    const beyond = values[i] > most;
    const text = (word.length > 12 ? `${word.slice(0, 11)}…` : word) + (beyond ? ` ${brief(values[i])} ↑` : "");
    const wide = 6.6 * text.length + 12;
    const middle = Math.min(Math.max(x(i), EDGE.left + wide / 2), width - EDGE.right - wide / 2);
    if (!chosen[i] || placed.some(([other, taken]) => Math.abs(middle - other) < (wide + taken) / 2)) continue;
    placed.push([middle, wide]);
    const label = beyond
      ? { x: Math.min(x(i), width - EDGE.right) - 9, y: at(values[i]) + 4, "text-anchor": "end" }
      : { x: middle, y: at(values[i]) - 9, "text-anchor": "middle" };
    picture.append(draw("text", { class: "label", ...label }, text));
  }
}

// The axis covers the values but for a few far above the rest, which stand at its top with their value: FAI of the last
// tokens is a mean over one or two queries, and would press everything else to the ground.
function axis(values) {
  if (!values.length) return { least: 0, most: 1, tick: 1 };
  const sorted = [...values].sort((a, b) => a - b);
  const low = sorted[0];
  const usual = sorted[Math.floor(0.98 * (sorted.length - 1))];
  const high = Math.min(sorted.at(-1), usual + 0.75 * (usual - low));
  const tick = tickStep(Math.max(high - low, 1e-9), 4);
  const least = Math.floor(low / tick + 1e-6) * tick;
  return { least, most: Math.max(Math.ceil(high / tick - 1e-6) * tick, least + tick), tick };
}

const tokenAt = (event) => {
  const index = plot.index(event.clientX - curves.getBoundingClientRect().left - curves.clientLeft);
  return index >= 0 && index < length() ? index : null;
};
curves.addEventListener("pointermove", (event) => hover(tokenAt(event), "curves"));
curves.addEventListener("pointerleave", () => hover(null, "curves"));
curves.addEventListener("click", (event) => {
  const index = tokenAt(event);
  if (index !== null) select(index, "curves");
});
curves.addEventListener("keydown", (event) => moveByKey(event, (index, step) => index - 5 * step));

// Two responses to a prompt, A and B, side by side. The cursor is a token of one of them; the token that it is linked to
// is lit in the other.

const LETTERS = ["A", "B"];
const KINDS = ["one", "two"]; // their classes in the style sheet
const CHART = { left: 50, right: 12, top: 26, height: 110, gap: 36, bottom: 34 };
const CLASS_NAMES = { l: "local", m: "middle", g: "global" };
let links = []; // of the tokens of A in B, and of those of B in A; null where there is none
let held = { side: 0, index: 0 };
let pointed = null; // under the pointer
let chart = null;

const side = (which) => state.prompt.sides[which];
const point = () => pointed ?? held;
const indices = () => {
  const { side: which, index } = point();
  const other = links[which][index];
  return which === 0 ? [index, other] : [other, index];
};
const text = (which, index) => short(side(which).tokens[index].trim() || "space", 24);
const difference = (key, i) => {
  const [before, after] = [side(0).values[key][i], side(1).values[key][links[0][i]] ?? null];
  return before === null || after === null ? null : after - before;
};
const mean = (values) => values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
const signed = (value, digits) => (value === null ? "–" : (value > 0 ? "+" : "") + value.toFixed(digits));

function move(to, isHeld, byKey) {
  if (isHeld) held = to;
  pointed = isHeld ? null : to;
  tell("move", byKey ? null : to?.side);
}

const boxes = LETTERS.map((letter, which) => {
  const box = byId(`tokens-${letter}`);
  const tokenOf = (event) => event.target.closest?.(".tokens > span")?.index;
  const on = (name, act) => box.addEventListener(name, (event) => {
    const index = tokenOf(event);
    if (index !== undefined) act(index);
  });
  on("pointermove", (index) => move({ side: which, index }, false));
  on("click", (index) => move({ side: which, index }, true));
  box.addEventListener("pointerleave", () => move(null, false));
  box.addEventListener("scroll", () => fadeEdges(box));
  box.addEventListener("keydown", (event) => {
    const at = indices()[which] ?? 0;
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - 10, ArrowDown: at + 10, Home: 0, End: Infinity }[
      event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    move({ side: which, index: Math.min(Math.max(to, 0), spansOf[which].length - 1) }, true, true);
  });
  return box;
});
let spansOf = [[], []];

views.push({
  open() {
    const { same } = state.prompt;
    const lengths = [0, 1].map((which) => side(which).tokens.length);
    byId("parting").textContent = same === Math.max(...lengths)
      ? "Both responses are the same, token by token."
      : same === 0 ? "The responses differ from their first token on; dotted tokens have no counterpart."
        : `The first ${same} tokens are the same. From there on, dotted tokens have no counterpart.`;
    spansOf = boxes.map((box, which) => {
      const parts = document.createDocumentFragment();
      const spans = side(which).tokens.map((token, i) => {
        const bare = token.startsWith(" ") && token.trim() ? token.slice(1) : token;
        if (bare !== token) parts.append(" ");
        const span = make("span", { id: `${LETTERS[which]}${i}`, role: "option", "aria-selected": "false" }, bare);
        span.index = i;
        parts.append(span, "\n".repeat(side(which).breaks[i]));
        return span;
      });
      box.replaceChildren(parts);
      return spans;
    });
  },

  paint() {
    spansOf.forEach((spans, which) => {
      const { values, preplan, anchor } = side(which);
      spans.forEach((span, i) => {
        const value = values[state.column][i];
        span.className = value === null ? "none" : `s${shade(value, state.prompt.domains[state.column])}`;
        span.classList.toggle("alone", links[which][i] === null);
      });
      for (const i of preplan) spans[i].classList.add("preplan");
      for (const i of anchor) spans[i].classList.add("anchor");
    });
    const { title, unit, about } = column(state.column);
    boxes.forEach(fadeEdges);
    byId("scale").replaceChildren(
      ramp(state.prompt.domains[state.column], `Scale of ${title}, ${unit}`),
      make("p", {}, make("b", {}, title), ` in ${unit}, on one scale for both. ${about}`),
    );
  },

  fit: () => boxes.forEach(fadeEdges),

  move(source) {
    const at = indices();
    spansOf.forEach((spans, which) => {
      for (const span of boxes[which].querySelectorAll(".on")) {
        span.classList.remove("on");
        span.setAttribute("aria-selected", "false");
      }
      const lit = spans[at[which]];
      if (!lit) return;
      lit.classList.add("on");
      lit.setAttribute("aria-selected", "true");
      boxes[which].setAttribute("aria-activedescendant", lit.id);
      if (which !== source) intoView(boxes[which], lit);
    });
    drawReadout(at);
  },
});

// Values at the cursor, and means of the whole responses.
function drawReadout(at) {
  const row = (kind, name, cells) => make("tr", { class: kind }, make("th", { scope: "row" }, name),
    ...cells.map((cell) => make("td", {}, cell)));
  const change = (one, other) => (one === null || other === null ? null : other - one);
  const cells = (values) => page.columns.map(({ digits }, c) => places(values[c], digits));
  const group = (title, values) => [
    make("tr", {}, make("th", { class: "group", colspan: page.columns.length + 1, scope: "colgroup" }, title)),
    ...values.map((each, which) => row(KINDS[which], LETTERS[which], cells(each))),
    row("change", "B − A", page.columns.map(({ digits }, c) => signed(change(values[0][c], values[1][c]), digits))),
  ];
  const here = at.map((index, which) => page.columns.map(({ key }) => side(which).values[key][index] ?? null));
  const means = at.map((_, which) => page.columns.map(({ key }) =>
    mean(side(which).values[key].filter((value) => value !== null))));
  const names = at.map((index, which) => (index === null ? `no counterpart in ${LETTERS[which]}`
    : `“${text(which, index)}”, token ${index + 1} of ${side(which).length} in ${LETTERS[which]}`));
  const heads = page.columns.map(({ key, title, unit }) =>
    make("th", { scope: "col", class: key === state.column ? "chosen" : "" }, title, make("small", {}, unit)));
  byId("values").replaceChildren(
    make("thead", {}, make("tr", {}, make("td", {}), ...heads)),
    make("tbody", {}, ...group(names.join("; "), here), ...group("Mean over the response", means)),
  );
}

views.push({
  paint: drawChart,
  fit: drawChart,
  move() {
    const at = indices();
    chart?.dots.forEach((dot, which) => {
      const value = at[which] === null ? null : side(which).values[state.column][at[which]] ?? null;
      dot.setAttribute("r", value === null ? 0 : 4.5);
      if (value === null) return;
      dot.setAttribute("cx", chart.x(at[which]));
      dot.setAttribute("cy", chart.y(value));
    });
    chart?.line.setAttribute("d", at[0] === null ? "M0 0"
      : lineAround(chart.x(at[0]), CHART.top, chart.bottom, chart.texts));
  },
});

// The chosen column of both responses, each along its own tokens, and under it the difference at tokens with a link.
function drawChart() {
  const node = byId("curves");
  const width = node.clientWidth;
  if (!state.prompt || !width) return;
  const { title, unit } = column(state.column);
  const curves = [0, 1].map((which) => side(which).values[state.column]);
  const changes = curves[0].map((_, i) => difference(state.column, i));
  const count = Math.max(curves[0].length, curves[1].length);
  const step = (width - CHART.left - CHART.right) / count;
  const x = (i) => CHART.left + (i + 0.5) * step;
  const bottom = CHART.top + 2 * CHART.height + CHART.gap;
  const picture = drawing(width, bottom + CHART.bottom);
  const panel = (top, values, name) => {
    const { least, most, tick } = axis(values);
    const y = (value) => top + CHART.height * (1 - (Math.min(value, most) - least) / (most - least));
    for (let i = 0; i <= Math.round((most - least) / tick); i++) {
      const value = least + i * tick;
      const kind = Math.abs(value) < tick / 1e3 ? "grid zero" : "grid";
      picture.append(draw("path", { class: kind, d: `M${CHART.left} ${y(value)}H${width - CHART.right}` }));
      picture.append(draw("text", { x: CHART.left - 7, y: y(value) + 4, "text-anchor": "end" },
        onAxis(value, tick)));
    }
    picture.append(draw("text", { class: "title", x: CHART.left, y: top - 10 }, name, draw("tspan", {}, `  ${unit}`)));
    return y;
  };
  const line = (values, y, kind) => {
    const d = values.flatMap((value, i) => (value === null ? []
      : `${i && values[i - 1] !== null ? "L" : "M"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`));
    picture.append(draw("path", { class: `line ${kind}`, d: d.join("") || "M0 0" }));
  };
  const y = panel(CHART.top, curves.flat().filter((value) => value !== null), title);
  curves.forEach((values, which) => line(values, y, KINDS[which]));
  const lower = CHART.top + CHART.height + CHART.gap;
  const known = changes.filter((value) => value !== null);
  line(changes, panel(lower, [...known, 0], `${title}: B − A`), "change");
  const tick = Math.max(1, tickStep(count, Math.max(3, Math.floor(width / 90))));
  for (let number = tick; number <= count; number += tick) {
    picture.append(draw("text", { x: x(number - 1), y: bottom + 16, "text-anchor": "middle" }, String(number)));
  }
  picture.append(draw("text", { x: (CHART.left + width) / 2, y: bottom + 31, "text-anchor": "middle" },
    "token of the response"));
  const dots = KINDS.map((kind) => draw("circle", { class: `dot ${kind}`, r: 0 }));
  chart = { step, x, y, bottom, dots, line: draw("path", { class: "cursor" }) };
  picture.append(chart.line, ...chart.dots);
  node.replaceChildren(picture);
  chart.texts = textsIn(picture);
  tell("move");
}

const chartToken = (event) => {
  const index = Math.floor((event.clientX - byId("curves").getBoundingClientRect().left - CHART.left) / chart.step);
  return index >= 0 && index < spansOf[0].length ? { side: 0, index } : null;
};
byId("curves").addEventListener("pointermove", (event) => move(chartToken(event), false, true));
byId("curves").addEventListener("pointerleave", () => move(null, false));
byId("curves").addEventListener("click", (event) => chartToken(event) && move(chartToken(event), true, true));

// Both runs' heads and their change as tables of layers x heads, and the heads that change most.
function drawHeads() {
  const heads = page.heads;
  byId("apart").hidden = !heads.apart;
  byId("grids").hidden = Boolean(heads.apart);
  if (heads.apart) {
    byId("apart").textContent = `Not compared one by one: ${heads.apart}.`;
    return;
  }
  const [one, other] = heads.distance;
  const ratios = one.map((row, r) => row.map((value, h) => other[r][h] / Math.max(value, 1e-9)));
  const largest = Math.max(...ratios.flat().map((ratio) => Math.abs(Math.log2(ratio))), 0.1);
  const domain = { low: 0, high: largest, log: false };
  const times = (ratio) => (ratio >= 1 ? `${brief(ratio)} times as far` : `${brief(1 / ratio)} times nearer`);
  const where = (r, h) => `layer ${heads.layers[r]}, head ${h}`;
  const changeOfClass = (r, h) => {
    const [before, after] = heads.classes.map((rows) => CLASS_NAMES[rows[r][h]]);
    return before === after ? before : `${before} → ${after}`;
  };
  const grid = (title, cell) => {
    const head = one[0].map((_, h) => make("th", { scope: "col" }, String(h)));
    const rows = one.map((row, r) => make("tr", {}, make("th", { scope: "row" }, String(heads.layers[r])),
      ...row.map((_, h) => cell(r, h))));
    return make("figure", {}, make("figcaption", {}, make("b", {}, title)), make("div", { class: "scroll", tabindex: 0,
      role: "group", "aria-label": title }, make("table", { class: "heads small" },
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, ""), ...head)), make("tbody", {}, ...rows))));
  };
  const distances = (which) => grid(`${LETTERS[which]}: mean distance`, (r, h) => {
    const letter = heads.classes[which][r][h];
    const title = `${where(r, h)}: ${brief(heads.distance[which][r][h])} tokens, ${CLASS_NAMES[letter]}`;
    const tone = `s${shade(heads.distance[which][r][h], heads.domain)} ${CLASS_NAMES[letter]}`;
    return make("td", { class: tone, title }, letter === "m" ? "" : letter.toUpperCase());
  });
  const changes = grid("Change: + farther in B, − nearer", (r, h) => {
    const ratio = ratios[r][h];
    const title = `${where(r, h)}: ${brief(one[r][h])} → ${brief(other[r][h])} tokens, ${changeOfClass(r, h)}`;
    const tone = `s${shade(Math.abs(Math.log2(ratio)), domain)}`;
    return make("td", { class: tone, title }, Math.abs(Math.log2(ratio)) < largest / 8 ? "" : ratio > 1 ? "+" : "−");
  });
  byId("grids").replaceChildren(distances(0), distances(1), changes);
  byId("scales").replaceChildren(
    ramp(heads.domain, "Scale of mean attention distance, tokens", brief),
    ramp(domain, "Scale of change", (value) => `${brief(2 ** value)} ×`),
  );
  byId("changed").replaceChildren(...heads.changed.map(([r, h]) => make("li", {}, make("b", {}, where(r, h)),
    `: ${brief(one[r][h])} → ${brief(other[r][h])} tokens, ${times(ratios[r][h])}; ${changeOfClass(r, h)}`)));
}

// Show the prompt in the address; a token there is one of A.
function open() {
  const { place, number, token } = address();
  if (number !== state.number) {
    const isFirst = state.number === 0;
    Object.assign(state, { number, prompt: data(`data-${number}`) });
    links = [state.prompt.links, side(1).tokens.map(() => null)];
    links[0].forEach((other, index) => {
      if (other !== null) links[1][other] ??= index;
    });
    const { same } = state.prompt;
    const first = same ? Math.min(same, side(0).tokens.length - 1) : links[0].findIndex((other) => other !== null);
    [held, pointed] = [{ side: 0, index: Math.max(0, first) }, null];
    showHeading(place, state.prompt.question);
    tell("open");
    tell("paint");
    if (!isFirst) byId("view").querySelector("h2").focus();
  }
  if (token) move({ side: 0, index: Math.min(token, spansOf[0].length) - 1 }, true, true);
}

choice("columns", "column", page.columns.map(({ key, title }) => [key, title]), state.column, (key) => {
  state.column = key;
});
byId("view").hidden = !count;
drawHeads();
if (count) {
  drawIndex(KINDS);
  open();
  addEventListener("hashchange", open);
}
followScreen();

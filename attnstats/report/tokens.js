// The answer as text: tokens coloured by the column that is chosen, marks, arcs, the legend, and the readout beside it.

const tokens = byId("tokens");
let spans = [];
let lit = null;
let linked = null; // the token whose link was copied
let pointer = null; // where the pointer is over the text
const arcs = draw("svg", { class: "arcs", "aria-hidden": "true" });

views.push({
  open() {
    const prompt = state.prompt;
    const parts = document.createDocumentFragment();
    spans = prompt.breaks.map((breaks, i) => {
      const text = tokenText(i);
      // A space before a word belongs to the token, but looks better between the colours.
      const bare = text.startsWith(" ") && text.trim() ? text.slice(1) : text;
      if (bare !== text) parts.append(" ");
      const span = make("span", { id: `t${i}`, role: "option", "aria-selected": "false" }, bare);
      span.index = i;
      parts.append(span, "\n".repeat(breaks));
      return span;
    });
    lit = null;
    tokens.replaceChildren(arcs, parts);
  },

  paint() {
    const { preplan, anchor, values, domains } = state.prompt;
    const over = marked(preplan);
    const under = marked(anchor);
    const chosen = values[state.column];
    spans.forEach((span, i) => {
      const classes = [chosen[i] === null ? "none" : `s${shade(chosen[i], domains[state.column])}`];
      if (over[i]) classes.push("preplan");
      if (under[i]) classes.push("anchor");
      if (state.hits.has(i)) classes.push("hit");
      if (span === lit) classes.push("on");
      span.className = classes.join(" ");
    });
    byId("key").hidden = state.share === 0;
    drawScale();
    drawArcs();
    drawBox();
    drawReadout();
  },

  found: () => spans.forEach((span, i) => span.classList.toggle("hit", state.hits.has(i))),

  move(source) {
    lit?.classList.remove("on");
    lit?.setAttribute("aria-selected", "false");
    lit = spans[cursor()];
    lit.classList.add("on");
    lit.setAttribute("aria-selected", "true");
    tokens.setAttribute("aria-activedescendant", lit.id);
    if (source && source !== "tokens") intoView(tokens, lit);
    drawReadout();
    drawBox();
  },

  fit() {
    drawArcs();
    drawBox();
  },
});

function drawScale() {
  const { title, unit, about } = column(state.column);
  const domain = state.prompt.domains[state.column];
  byId("scale").replaceChildren(
    ramp(domain, `Scale of ${title}, ${unit}`),
    make("p", {}, make("b", {}, title), ` in ${unit}. ${about}`),
  );
}

// Arcs from a marked anchor back to the token that leads into it. One across lines is drawn as its two ends, dashed.
function drawArcs() {
  if (!state.prompt) return;
  arcs.replaceChildren();
  arcs.setAttribute("height", 0);
  const frame = tokens.getBoundingClientRect();
  arcs.setAttribute("width", tokens.clientWidth);
  arcs.setAttribute("height", tokens.scrollHeight);
  const isMarked = marked(state.prompt.anchor);
  const top = (i) => {
    const box = spans[i].getClientRects()[0];
    return { x: box.left + box.width / 2 - frame.left, y: box.top - frame.top + tokens.scrollTop + 1 };
  };
  const lines = { arc: [], "arc wrapped": [], tip: [], root: [] };
  state.prompt.intro.forEach((intro, i) => {
    if (intro === null || !isMarked[i]) return;
    const [from, to] = [top(i), top(intro)];
    if (Math.abs(from.y - to.y) < 4) {
      const lift = 7 + Math.min(6, (from.x - to.x) / 12);
      lines.arc.push(`M${from.x} ${from.y}C${from.x} ${from.y - lift} ${to.x} ${to.y - lift} ${to.x} ${to.y - 1}`);
    } else {
      const [left, right] = [Math.max(1, from.x - 24), Math.min(tokens.clientWidth - 1, to.x + 24)];
      lines["arc wrapped"].push(`M${from.x} ${from.y}Q${from.x} ${from.y - 9} ${left} ${from.y - 9}`,
        `M${to.x} ${to.y - 1}Q${to.x} ${to.y - 9} ${right} ${to.y - 9}`);
    }
    lines.tip.push(`M${to.x - 2.5} ${to.y - 4}L${to.x} ${to.y - 0.5}L${to.x + 2.5} ${to.y - 4}`);
    lines.root.push(`M${from.x} ${from.y}h0`);
  });
  byId("arcs-key").hidden = !lines.tip.length;
  for (const [name, parts] of Object.entries(lines)) {
    if (parts.length) arcs.append(draw("path", { class: name, d: parts.join("") }));
  }
}

// A long answer scrolls in a box of its own, so that the curves stay in view. Below it is said which tokens it shows.
function drawBox() {
  const { scrollTop, clientHeight } = tokens;
  const scrolls = fadeEdges(tokens);
  byId("inview").hidden = !scrolls;
  const from = scrolls ? firstBelow(scrollTop) : 0;
  const to = scrolls ? Math.max(from, firstBelow(scrollTop + clientHeight - spans[0].offsetHeight) - 1) : spans.length - 1;
  const [before, after] = state.inView ?? [];
  state.inView = scrolls ? [from, to] : null;
  if (before !== state.inView?.[0] || after !== state.inView?.[1]) tell("scrolled");
  if (!scrolls) return;
  const back = make("button", { type: "button" }, `show token ${cursor() + 1}, at the cursor`);
  back.addEventListener("click", () => intoView(tokens, spans[cursor()]));
  const isOut = cursor() < from || cursor() > to;
  byId("inview").replaceChildren(`Tokens ${from + 1} to ${to + 1} of ${length()} are in view; the text scrolls. `,
    ...(isOut ? [back] : []));
}

// The first token whose line begins under a height in the text.
function firstBelow(height) {
  let [low, high] = [0, spans.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (spans[middle].offsetTop < height - 6) low = middle + 1;
    else high = middle;
  }
  return low;
}

function drawReadout() {
  const i = cursor();
  const { start, preplan, anchor, intro } = state.prompt;
  const around = (from, to) => state.prompt.tokens.slice(Math.max(start, start + from), start + to).join("");
  const rows = page.columns.flatMap(({ key, title, unit, digits }) => {
    const value = state.prompt.values[key][i];
    const chosen = key === state.column ? "chosen" : "";
    const cell = make("dd", { class: chosen }, make("b", {}, places(value, digits)), ` ${value === null ? noValue(key) : unit}`);
    if (value !== null) cell.prepend(make("i", { class: `s${shade(value, state.prompt.domains[key])}` }));
    return [make("dt", { class: chosen }, title), cell];
  });
  const ledInto = intro.flatMap((from, t) => (from === i ? [quoted(start + t)] : []));
  const roles = [
    marked(preplan)[i] && `preplan: no. ${preplan[i] + 1} by WAAD`,
    marked(anchor)[i] && `anchor: no. ${anchor[i] + 1} by FAI`,
    intro[i] !== null && `led into by ${quoted(start + intro[i])}, ${i - intro[i]} back`,
    intro.includes(i) && `leads into ${ledInto.join(", ")}`,
  ].filter(Boolean);
  const space = tokenText(i).startsWith(" ") ? "\u00a0" : "";
  byId("readout").replaceChildren(
    make("p", { class: "context" },
      make("span", {}, make("bdi", {}, around(i - 7, i) + space)),
      make("mark", {}, tokenText(i).trim() || tokenText(i)),
      make("span", {}, around(i + 1, i + 7))),
    make("p", { class: "where" }, `token ${i + 1} of ${length()}, position ${start + i}; `, linkToToken(i)),
    make("dl", {}, ...rows),
    make("ul", {}, ...roles.map((role) => make("li", {}, role))),
    ...lookingBack(i),
  );
}

// A link that selects the token when it is opened. A click copies it, and it is in the address then, too.
function linkToToken(i) {
  const text = linked === i ? "copied" : "link";
  const link = make("a", { id: "link", href: linkTo(state.number, i + 1) }, text);
  link.addEventListener("click", () => {
    navigator.clipboard?.writeText(link.href).then(() => {
      linked = i;
      drawReadout();
    }, () => {});
  });
  return link;
}

// Bars of how much a token looks at each of the nearest before it, the token itself at the right.
function lookingBack(i) {
  if (!state.maps) return [];
  const { distances } = state.maps;
  return ["local", "global"].flatMap((name) => {
    const values = nearest(name, i);
    const most = Math.max(...values, 0.01);
    const bars = values.map((value, back) => `M${distances - back - 0.5} 30v${(-28 * value / most).toFixed(2)}`);
    const box = { viewBox: `0 0 ${distances} 30`, preserveAspectRatio: "none", "aria-hidden": "true" };
    return [
      ends(`${name} heads look back`, `most ${brief(most * 100)} %`),
      draw("svg", { class: `bars ${name}`, ...box }, draw("path", { d: bars.join("") })),
    ];
  }).concat(ends(`${distances - 1} back`, "itself"));
}

const ends = (left, right) => make("p", { class: "axis" }, make("span", {}, left), make("span", {}, right));

const noValue = (key) => (key === "fai" ? `no token is ${page.lo} further on` : "not known");

const indexOf = (event) => event.target.closest?.("#tokens > span")?.index;
tokens.addEventListener("pointermove", (event) => {
  pointer = event.pointerType === "touch" ? null : event;
  const index = indexOf(event);
  if (index !== undefined) hover(index, "tokens");
});
tokens.addEventListener("pointerleave", () => {
  pointer = null;
  hover(null, "tokens");
});
tokens.addEventListener("scroll", () => {
  const under = pointer && document.elementFromPoint(pointer.clientX, pointer.clientY);
  if (under) hover(indexOf({ target: under }) ?? null, "tokens");
  drawBox();
});
tokens.addEventListener("click", (event) => {
  const index = indexOf(event);
  if (index !== undefined) select(index, "tokens");
});
tokens.addEventListener("keydown", (event) => moveByKey(event, otherLine));

// The token under (or over) this one, a line on.
function otherLine(index, step) {
  const from = spans[index].getBoundingClientRect();
  const middle = from.left + from.width / 2;
  let best = index;
  let line = null;
  for (let i = index + step; i >= 0 && i < spans.length; i += step) {
    const box = spans[i].getBoundingClientRect();
    if (Math.abs(box.top - from.top) < 4) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) >= 4) break;
    const better = best === index ||
      Math.abs(box.left + box.width / 2 - middle) < Math.abs(spans[best].getBoundingClientRect().left +
        spans[best].getBoundingClientRect().width / 2 - middle);
    if (better) best = i;
  }
  return best;
}

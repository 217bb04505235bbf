// The index of prompts, the switches, and the handlers for opening a prompt, resizing, and a change of colour scheme.

const count = page.cards.length;

// Show the prompt in the address. Its data is parsed only now.
function open() {
  const asked = Number(/^#prompt-(\d+)$/.exec(location.hash)?.[1]);
  const place = Math.max(0, page.cards.findIndex((card) => card.number === asked));
  const { number } = page.cards[place];
  if (number === state.number) return;
  const isFirst = state.number === 0;
  Object.assign(state, { number, prompt: data(`data-${number}`), maps: data(`maps-${number}`), hovered: null });
  state.selected = Math.max(0, state.prompt.anchor.indexOf(0));
  byId("number").textContent = page.total > 1 ? `Prompt ${number} of ${page.total}` : "Prompt";
  byId("question").textContent = state.prompt.question;
  const sent = state.prompt.tokens.slice(0, state.prompt.start).join("");
  byId("sent").querySelector("pre").textContent = sent.replaceAll("↵", "↵\n");
  byId("steps").hidden = count < 2;
  for (const [id, card] of [["previous", page.cards[place - 1]], ["next", page.cards[place + 1]]]) {
    byId(id).hidden = !card;
    byId(id).href = `#prompt-${card?.number}`;
  }
  for (const link of byId("cards").querySelectorAll("a")) {
    if (link.hash === `#prompt-${number}`) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
  tell("open");
  tell("paint");
  tell("move");
  if (!isFirst) byId("view").querySelector("h2").focus();
}

function sparkline(points, name) {
  const step = 160 / Math.max(1, points.length - 1);
  const d = points.flatMap((y, i) => {
    if (y === null) return [];
    return `${i && points[i - 1] !== null ? "L" : "M"}${(i * step).toFixed(1)} ${((1 - y / 99) * 22 + 2).toFixed(1)}`;
  });
  const line = draw("path", { class: `line ${name}`, d: d.join("") || "M0 0" });
  return draw("svg", { viewBox: "0 0 160 26", preserveAspectRatio: "none", "aria-hidden": "true" }, line);
}

function drawIndex() {
  byId("index").hidden = count < 2;
  if (count < 2) return;
  byId("cards").replaceChildren(...page.cards.map((card) => {
    const question = make("span", { class: "question" }, make("b", {}, `${card.number} `), card.question);
    const curves = [sparkline(card.waad, "waad"), sparkline(card.fai, "fai")];
    const length = make("span", { class: "length" }, `${card.length} tokens`);
    return make("li", {}, make("a", { href: `#prompt-${card.number}` }, question, ...curves, length));
  }));
}

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

choice("columns", "column", page.columns.map(({ key, title }) => [key, title]), state.column, (key) => {
  state.column = key;
});
const shares = [[page.share, `${page.share * 100} %`], [0.4, "40 %"], [0, "none"]];
choice("shares", "share", shares, state.share, (value) => {
  state.share = value;
});

byId("view").hidden = !count;
if (count) {
  drawIndex();
  open();
  addEventListener("hashchange", open);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => tell("paint"));
let width = byId("view").clientWidth;
new ResizeObserver(() => {
  const now = byId("view").clientWidth;
  if (now === width) return;
  width = now;
  tell("fit");
}).observe(byId("view"));

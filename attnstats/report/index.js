// The index of prompts, the prompt and the token in the address, and the heading of the prompt that is open.

const count = page.cards.length;
const linkTo = (number, token) => `#prompt-${number}${token ? `-token-${token}` : ""}`;

// The place of the prompt in the address among the cards, and the number of the token, from 1. Without a prompt it is
// the one that is open, else the first.
function address() {
  const [, prompt, token] = /^#(?:prompt-(\d+)-?)?(?:token-(\d+))?$/.exec(location.hash) ?? [];
  const asked = prompt === undefined ? state.number : Number(prompt);
  const place = Math.max(0, page.cards.findIndex((card) => card.number === asked));
  return { place, number: page.cards[place].number, token: token && Number(token) };
}

function showHeading(place, question) {
  const { number } = page.cards[place];
  byId("number").textContent = page.total > 1 ? `Prompt ${number} of ${page.total}` : "Prompt";
  byId("question").textContent = question;
  byId("steps").hidden = count < 2;
  for (const [id, card] of [["previous", page.cards[place - 1]], ["next", page.cards[place + 1]]]) {
    byId(id).hidden = !card;
    byId(id).href = linkTo(card?.number);
  }
  for (const link of byId("cards").querySelectorAll("a")) {
    if (link.hash === linkTo(number)) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
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

// A card per prompt with its curves of these names.
function drawIndex(names) {
  byId("index").hidden = count < 2;
  if (count < 2) return;
  byId("cards").replaceChildren(...page.cards.map((card) => {
    const question = make("span", { class: "question" }, make("b", {}, `${card.number} `), card.question);
    const curves = names.map((name) => sparkline(card[name], name));
    const length = make("span", { class: "length" }, `${card.length} tokens`);
    return make("li", {}, make("a", { href: linkTo(card.number) }, question, ...curves, length));
  }));
}

// Call `fit` of the views when the width changes, and `paint` when the colours do, as on paper.
function followScreen() {
  for (const media of ["(prefers-color-scheme: dark)", "print"]) {
    matchMedia(media).addEventListener("change", () => tell("paint"));
  }
  let width = byId("view").clientWidth;
  new ResizeObserver(() => {
    const now = byId("view").clientWidth;
    if (now === width) return;
    width = now;
    tell("fit");
  }).observe(byId("view"));
}

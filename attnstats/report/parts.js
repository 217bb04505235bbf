// Where each sentence of the answer looks, as bands beside its text: the shares of its attention on the first token, on
// the question and what is around it, on the answer before it and on itself. And how much of the attention of the
// sentence at the cursor falls on each part.

let partRows = []; // { part, node, looked } of the list, looked: a cell for the local and one for the global heads

views.push({
  open() {
    const { maps, prompt } = state;
    byId("parts").hidden = !maps;
    partRows = [];
    if (!maps) return;
    const { parts } = maps;
    const firstOfAnswer = parts.bounds.indexOf(prompt.start);
    partRows = parts.names.map((name, part) => {
      const [from, to] = [parts.bounds[part], parts.bounds[part + 1]];
      const text = short(prompt.tokens.slice(from, to).join("").trim() || "space", 240);
      const looked = CLASSES.map((heads) => make("span", { class: "looked", title: `by the ${heads} heads` }));
      const bands = part < firstOfAnswer ? [] : CLASSES.map((heads) => band(heads, parts, part - firstOfAnswer));
      const node = make("li", {}, make("p", {}, name ? make("b", {}, `${name} `) : "", text),
        make("div", { class: "bands" }, ...bands), make("div", { class: "seen" }, ...looked));
      if (part >= firstOfAnswer) node.addEventListener("click", () => select(from - prompt.start, "parts"));
      return { part, node, looked };
    });
    byId("sentences").replaceChildren(...partRows.map(({ node }) => node));
    byId("kinds").replaceChildren(...parts.kinds.map((kind, k) =>
      make("span", {}, make("i", { class: `k${parts.kinds.length - 1 - k}` }), kind)));
  },

  move() {
    if (!partRows.length) return;
    const { parts } = state.maps;
    const at = parts.bounds.findLastIndex((bound) => bound <= state.prompt.start + cursor());
    const row = at - parts.bounds.indexOf(state.prompt.start);
    for (const { part, node, looked } of partRows) {
      node.classList.toggle("on", part === at);
      looked.forEach((cell, h) => {
        const value = part <= at ? attention(bytesOf(CLASSES[h])[row * parts.names.length + part]) : null;
        cell.className = `looked ${value === null ? "" : `s${shade(value, SHARES)}`}`;
        cell.textContent = value === null ? "" : value < 0.001 ? "< 0.1 %" : `${brief(100 * value)} %`;
      });
    }
  },
});

const CLASSES = Object.keys(NAMES);
const SHARES = { low: 0.003, high: 0.6, log: true }; // of a sentence's attention, from the least to the darkest shade
const bytesOf = (name) => (state.maps.parts[`${name}Bytes`] ??= bytes(state.maps.parts[name].pairs));

// The shares of a sentence's attention as a band. The last kinds have the same colours where a kind is absent.
function band(name, { kinds, [name]: { shares } }, row) {
  const label = kinds.map((kind, k) => `${kind} ${brief(100 * shares[row][k])} %`).join(", ");
  const attributes = { class: "band", role: "img", "aria-label": `${name} heads: ${label}` };
  const picture = draw("svg", attributes, draw("title", {}, label));
  let from = 0;
  kinds.forEach((_, k) => {
    const share = 100 * shares[row][k];
    const kind = `k${kinds.length - 1 - k}`;
    picture.append(draw("rect", { class: kind, x: `${from}%`, width: `${share}%`, height: "100%" }));
    if (share > 11) {
      const place = { x: `${from + share / 2}%`, y: "50%", "text-anchor": "middle", "dominant-baseline": "central" };
      picture.append(draw("text", place, share.toFixed(0)));
    }
    from += share;
  });
  return picture;
}

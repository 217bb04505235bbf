// The heads as a layer x head table: the shade is the mean attention distance, the letter the class.

const CLASS_NAMES = { l: "local", m: "middle", g: "global" };
const NUMBERED = 16; // most heads per layer for which a cell has room for its number

views.push({
  open() {
    const heads = state.prompt.heads;
    byId("heads").hidden = !heads;
    if (!heads) return;
    const count = heads.distance[0].length;
    const head = make("tr", {}, make("th", { scope: "col" }, "layer"),
      ...heads.distance[0].map((_, i) => make("th", { scope: "col" }, String(i))));
    const rows = heads.layers.map((layer, row) => make("tr", {}, make("th", { scope: "row" }, String(layer)),
      ...heads.distance[row].map((distance, i) => headCell(heads, layer, row, i, distance, count))));
    const size = count > NUMBERED ? "heads small" : "heads";
    byId("grid").replaceChildren(make("table", { class: size }, make("thead", {}, head), make("tbody", {}, ...rows)));
    byId("distances").replaceChildren(ramp(heads.domain, "Scale of mean attention distance, tokens"));
    const total = heads.classes.join("");
    const counted = (letter) => [...total].filter((c) => c === letter).length;
    byId("classes").replaceChildren(
      make("b", {}, "L"),
      ` ${counted("l")} local heads, the nearest ${brief(100 * page.headShare)} % of ${total.length}, give WAAD. `,
      make("b", {}, "G"),
      ` ${counted("g")} global heads, the farthest, give FAI. Rows are layers, columns heads; shades are logarithmic.`,
    );
  },
});

function headCell(heads, layer, row, i, distance, count) {
  const letter = heads.classes[row][i];
  const name = CLASS_NAMES[letter];
  const number = distance >= 10 ? distance.toFixed(0) : distance.toFixed(1);
  const title = `layer ${layer}, head ${i}: ${number} tokens, ${name}`;
  const cell = make("td", { class: `s${shade(distance, heads.domain)} ${name}`, title });
  if (count <= NUMBERED) cell.append(number);
  if (letter !== "m") cell.append(make("abbr", { title: name }, letter.toUpperCase()));
  return cell;
}

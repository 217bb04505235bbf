// The switches, and the handler that opens the prompt and selects the token in the address.

// Show the prompt in the address. Its data is parsed only now.
function open() {
  const { place, number, token } = address();
  if (number !== state.number) {
    const isFirst = state.number === 0;
    Object.assign(state, { number, prompt: data(`data-${number}`), maps: data(`maps-${number}`), hovered: null });
    state.selected = Math.max(0, state.prompt.anchor.indexOf(0));
    showHeading(place, state.prompt.question);
    const sent = state.prompt.tokens.slice(0, state.prompt.start).join("");
    byId("sent").querySelector("pre").textContent = sent.replaceAll("↵", "↵\n");
    tell("open");
    tell("paint");
    select(token ? token - 1 : state.selected, "address");
    if (!isFirst) byId("view").querySelector("h2").focus();
  } else if (token) select(token - 1, "address");
  if (token) byId("tokens").scrollIntoView({ block: "nearest" });
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
  drawIndex(["waad", "fai"]);
  open();
  addEventListener("hashchange", open);
}
followScreen();

// Find a text in the answer: its tokens are outlined, the curves mark them, and the cursor goes from match to match.

const query = byId("query");
let matches = []; // the first and the last token of each

views.push({ open: find });

function find() {
  const wanted = query.value.toLowerCase();
  matches = [];
  if (wanted.trim()) {
    const starts = [];
    let text = "";
    for (let i = 0; i < length(); i++) {
      starts.push(text.length);
      text += tokenText(i).toLowerCase();
    }
    const tokenAt = (place) => starts.findLastIndex((start) => start <= place);
    for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
      matches.push([tokenAt(at), tokenAt(at + wanted.length - 1)]);
    }
  }
  state.hits = new Set(matches.flatMap(([first, last]) =>
    Array.from({ length: last - first + 1 }, (_, i) => first + i)));
  tell("found");
  showPlace();
}

// Select the next match (step 1) or the one before (-1), round the end; 0: the one at the cursor or the next.
function toMatch(step) {
  if (!matches.length) return;
  const at = state.selected;
  const next = step < 0 ? matches.findLast(([first]) => first < at) : matches.find(([first]) => first >= at + step);
  select((next ?? matches.at(step < 0 ? -1 : 0))[0], "search");
  showPlace();
}

function showPlace() {
  const place = matches.findIndex(([first, last]) => first <= state.selected && state.selected <= last);
  byId("matches").textContent = !query.value.trim() ? "" : !matches.length ? "not found"
    : place < 0 ? `${matches.length} found` : `${place + 1} of ${matches.length}`;
  for (const id of ["match-before", "match-after"]) byId(id).disabled = !matches.length;
}

query.addEventListener("input", () => {
  find();
  toMatch(0);
});
query.addEventListener("keydown", (event) => {
  if (event.key === "Enter") toMatch(event.shiftKey ? -1 : 1);
  else if (event.key === "Escape" && query.value) {
    query.value = "";
    find();
  } else return;
  event.preventDefault();
});
byId("match-before").addEventListener("click", () => toMatch(-1));
byId("match-after").addEventListener("click", () => toMatch(1));

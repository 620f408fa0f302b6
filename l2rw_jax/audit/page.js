"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString("en-US");
const size = data.given.length;
const PAGE = 48;
const THRESHOLDS = [2, 1.5, 1, 0.5, 0];
const MOST_CLASSES = 24;
const percent = (share) => (share < 0.005 ? "0%" : Math.round(100 * share) + "%");

// Text from data reaches the page as text only, never as markup.
function make(tag, properties, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name === "class") node.className = value;
    else if (name.includes("-") || name === "role" || name === "scope") {
      node.setAttribute(name, value);
    } else node[name] = value;
  }
  node.append(...children);
  return node;
}
function options(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => make("option", { value, textContent: text })));
}

// -- decisions, kept by the browser -----------------------------------------
const STORE = "l2rw_jax label issues " + data.id;
let decisions = new Map();  // position -> ["keep"] | ["relabel", class] | ["remove"]
let history = [];
function restore() {
  try {
    decisions = new Map(JSON.parse(localStorage.getItem(STORE) || "[]"));
  } catch (error) { /* Private windows have no storage: decisions last until reload. */ }
}
restore();
function store() {
  try {
    localStorage.setItem(STORE, JSON.stringify([...decisions]));
  } catch (error) { /* As above. */ }
}
function decide(rows, decision) {
  history.push(rows.map((row) => [row, decisions.get(row)]));
  for (const row of rows) {
    const decided = decision(row);
    if (decided === undefined) decisions.delete(row);
    else decisions.set(row, decided);
  }
  store();
}

// -- filters -----------------------------------------------------------------
const ANY = "";
const filter = { scope: data.num_issues ? "issues" : "all", given: ANY, suggested: ANY,
  decision: ANY, query: "", sort: "score", page: 0 };
let shown = [];
function isShown(row) {
  if (filter.scope === "issues" && row >= data.num_issues) return false;
  if (filter.scope !== "issues" && filter.scope !== "all") {
    const score = data.score[row];
    if (score === null || score < Number(filter.scope)) return false;
  }
  if (filter.given !== ANY && data.given[row] !== Number(filter.given)) return false;
  if (filter.suggested !== ANY && data.suggested[row] !== Number(filter.suggested)) return false;
  if (filter.decision !== ANY) {
    const decided = decisions.get(row);
    if ((decided ? decided[0] : "open") !== filter.decision) return false;
  }
  return !filter.query || data.names[row].toLowerCase().includes(filter.query);
}
const SORTS = { score: ["most suspicious first", null, 1], least: ["least suspicious first", null, -1] };
for (const name of Object.keys(data.statistics)) {
  const words = name.replaceAll("_", " ");
  SORTS["+" + name] = [words + ", largest first", name, -1];
  SORTS["-" + name] = [words + ", smallest first", name, 1];
}
SORTS.name = ["name", "names", 1];
function sorted(rows) {
  const [, name, direction] = SORTS[filter.sort];
  if (name === null) return direction > 0 ? rows : rows.reverse();
  if (name === "names") {
    const compare = new Intl.Collator("en", { numeric: true }).compare;
    return rows.sort((a, b) => compare(data.names[a], data.names[b]));
  }
  const values = data.statistics[name];
  const key = (row) => (values[row] === null ? Infinity : direction * values[row]);
  return rows.sort((a, b) => key(a) - key(b) || a - b);
}
function update() {
  const rows = [];
  for (let row = 0; row < size; row++) if (isShown(row)) rows.push(row);
  shown = sorted(rows);
  filter.page = 0;
  draw();
}

// -- one example -------------------------------------------------------------
function bars(row) {
  const box = make("div", { class: "bars", role: "img" });
  const texts = [];
  const number = data.top_classes.length / size;
  for (let k = row * number; k < (row + 1) * number; k++) {
    const label = data.top_classes[k];
    const share = data.top_shares[k] / 1000;
    const kind = label === data.given[row] ? "given" : label === data.suggested[row] ? "suggested" : "";
    const bar = make("div", { class: "bar " + kind });
    bar.style.width = 100 * share + "%";
    const name = make("span", { class: kind, textContent: data.classes[label], title: data.classes[label] });
    box.append(name, make("div", { class: "track" }, bar), make("span", { class: "number", textContent: percent(share) }));
    texts.push(data.classes[label] + " " + percent(share));
  }
  box.setAttribute("aria-label", "Mean predicted probabilities: " + texts.join(", "));
  return box;
}
function fields(row) {
  const body = make("tbody");
  for (const [name, values] of Object.entries(data.columns)) {
    if (row < values.length) body.append(make("tr", {}, make("td", { textContent: name }), make("td", { textContent: values[row] })));
  }
  return body.children.length ? make("div", { class: "fields", tabIndex: 0, role: "region", "aria-label": "Columns" }, make("table", {}, body)) : "";
}
function facts(row) {
  const parts = [];
  if (data.score[row] !== null) parts.push("score " + data.score[row].toFixed(2));
  for (const [name, values] of Object.entries(data.statistics)) {
    if (values[row] !== null) parts.push(name.replaceAll("_", " ") + " " + values[row]);
  }
  const copy = data.duplicate_of[row];
  if (copy) parts.push("exact duplicate of " + copy);
  return make("div", { class: "facts", textContent: parts.join(" · ") });
}
function card(row) {
  const name = data.names[row], given = data.classes[data.given[row]];
  const target = () => {
    const decided = decisions.get(row);
    return decided && decided[0] === "relabel" ? decided[1] : data.suggested[row];
  };
  const top = make("div", { class: "top" });
  if (row < data.pictures.length && data.pictures[row]) {
    const picture = make("img", { class: "picture", alt: "Picture of " + name, src: "data:image/png;base64," + data.pictures[row] });
    picture.onload = () => picture.classList.toggle("small", picture.naturalWidth < 104);
    top.append(picture);
  }
  top.append(make("div", {},
    make("dl", { class: "labels" },
      make("dt", { textContent: "given" }), make("dd", { class: "given", textContent: given }),
      make("dt", { textContent: "suggested" }),
      make("dd", { class: "suggested", textContent: data.classes[data.suggested[row]] })),
    make("div", { class: "name", textContent: name, title: name })));
  // With a thousand classes, lists are filled only when somebody opens one.
  const choice = make("select", { "aria-label": "New label of " + name });
  const fill = () => {
    if (choice.options.length < 2) {
      options(choice, data.classes.map((text, label) => [label, "to " + text]));
      choice.value = target();
    }
  };
  choice.onpointerdown = choice.onfocus = fill;
  choice.onchange = () => { decide([row], () => ["relabel", Number(choice.value)]); refresh(); };
  const buttons = make("div", { class: "buttons" });
  const actions = { keep: () => ["keep"], relabel: () => ["relabel", target()], remove: () => ["remove"] };
  const words = { keep: "Keep", relabel: "Relabel", remove: "Remove" };
  for (const what of Object.keys(actions)) {
    const button = make("button", { type: "button", textContent: words[what], "data-do": what, "aria-label": words[what] + " " + name });
    button.onclick = () => {
      const decided = decisions.get(row);
      decide([row], () => (decided && decided[0] === what ? undefined : actions[what]()));
      refresh();
    };
    buttons.append(button);
  }
  buttons.append(choice);
  const node = make("article", { class: "card", tabIndex: 0, "aria-label": name + ", given " + given + ", suggested " + data.classes[data.suggested[row]] },
    top, fields(row), bars(row), facts(row), buttons);
  function refresh() {
    const decided = decisions.get(row);
    node.dataset.decision = decided ? decided[0] : "";
    for (const button of buttons.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(Boolean(decided) && decided[0] === button.dataset.do));
    }
    if (choice.options.length > 1) choice.value = target();
    else options(choice, [[target(), "to " + data.classes[target()]]]);
    drawStatus();
  }
  node.onkeydown = (event) => {
    if (event.target !== node || event.ctrlKey || event.metaKey || event.altKey) return;
    const what = { k: "keep", r: "relabel", x: "remove" }[event.key.toLowerCase()];
    const cards = [...at("grid").children];
    const columns = getComputedStyle(at("grid")).gridTemplateColumns.split(" ").length;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (what) buttons.querySelector("[data-do=" + what + "]").click();
    else if (step) (cards[cards.indexOf(node) + step] || node).focus();
    else return;
    event.preventDefault();
  };
  refresh();
  return node;
}

// -- drawing -----------------------------------------------------------------
function drawStatus() {
  const tally = { keep: 0, relabel: 0, remove: 0 };
  for (const [what] of decisions.values()) tally[what]++;
  at("decided").textContent = decisions.size
    ? `Decided: ${count(tally.keep)} keep, ${count(tally.relabel)} relabel, ${count(tally.remove)} remove.`
    : "Nothing decided yet.";
  at("undo").disabled = !history.length;
}
function draw() {
  const pages = Math.max(1, Math.ceil(shown.length / PAGE));
  const first = filter.page * PAGE;
  const rows = shown.slice(first, first + PAGE);
  at("grid").replaceChildren(...rows.map(card));
  at("shown").textContent = shown.length
    ? `${count(first + 1)} to ${count(first + rows.length)} of ${count(shown.length)} examples`
    : "No example fits these filters.";
  at("page").textContent = `Page ${count(filter.page + 1)} of ${count(pages)}`;
  at("previous").disabled = filter.page === 0;
  at("next").disabled = filter.page >= pages - 1;
  at("relabelAll").textContent = `Relabel all ${count(shown.length)} shown as suggested`;
  at("relabelAll").disabled = !shown.length;
  for (const name of ["scope", "given", "suggested", "decision", "sort"]) at(name).value = filter[name];
  at("query").value = filter.query;
  for (const button of at("counts").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.scope === filter.scope));
  }
  drawStatus();
}
function drawMatrix() {
  const confused = new Map();
  let most = 1;
  for (let row = 0; row < data.num_issues; row++) {
    const key = data.given[row] * data.classes.length + data.suggested[row];
    confused.set(key, (confused.get(key) || 0) + 1);
    most = Math.max(most, confused.get(key));
  }
  const choose = (given, suggested) => {
    Object.assign(filter, { given: String(given), suggested: String(suggested), scope: "issues" });
    update();
    at("shown").scrollIntoView({ block: "center" });
  };
  const cell = (given, suggested) => {
    const number = confused.get(given * data.classes.length + suggested) || 0;
    const button = make("button", { type: "button", textContent: number ? count(number) : "·", disabled: !number,
      "aria-label": `${count(number)} examples given ${data.classes[given]}, suggested ${data.classes[suggested]}` });
    button.title = button.getAttribute("aria-label");
    if (number) button.style.background = `rgba(var(--heat), ${0.12 + 0.5 * number / most})`;
    button.onclick = () => choose(given, suggested);
    return button;
  };
  if (!confused.size) {
    at("matrixHelp").textContent = "No label is estimated to be wrong.";
    return;
  }
  const numbers = data.classes.map((_, label) => label);
  const table = make("table", { class: "matrix" });
  if (data.classes.length <= MOST_CLASSES) {
    at("matrixHelp").textContent = "Estimated wrong labels: the given label in rows, the suggested one in columns. Select a cell to see its examples.";
    const head = numbers.map((j) => make("th", { scope: "col", textContent: data.classes[j], title: data.classes[j] }));
    table.append(make("thead", {}, make("tr", {}, make("td"), ...head)));
    const rows = numbers.map((i) => make("tr", {},
      make("th", { scope: "row", textContent: data.classes[i], title: data.classes[i] }),
      ...numbers.map((j) => make("td", {}, i === j ? "" : cell(i, j)))));
    table.append(make("tbody", {}, ...rows));
  } else {
    at("matrixHelp").textContent = `The most frequent confusions among ${count(data.classes.length)} classes. Select a number to see its examples.`;
    const pairs = [...confused].sort((a, b) => b[1] - a[1]).slice(0, 30);
    for (const [key] of pairs) {
      const given = Math.floor(key / data.classes.length), suggested = key % data.classes.length;
      table.append(make("tr", {}, make("td", {}, cell(given, suggested)),
        make("th", { scope: "row", textContent: data.classes[given] + " → " + data.classes[suggested] })));
    }
  }
  at("matrix").append(table);
}
function drawCounts() {
  const rows = [["issues", "estimated wrong", data.num_issues]];
  for (const threshold of THRESHOLDS) {
    let number = 0;  // Scores descend; those that are null come last.
    while (number < size && data.score[number] !== null && data.score[number] >= threshold) number++;
    rows.push([String(threshold), `score ≥ ${threshold}`, number]);
  }
  rows.push(["all", "all examples", size]);
  for (const [scope, text, number] of rows) {
    const button = make("button", { type: "button", textContent: text, "data-scope": scope });
    button.onclick = () => { filter.scope = scope; update(); at("shown").scrollIntoView({ block: "center" }); };
    const meter = make("div", { class: "meter" });
    meter.style.width = 100 * number / size + "%";
    at("counts").append(button, make("span", { class: "number", textContent: count(number) }), meter);
  }
  options(at("scope"), rows.map(([scope, text, number]) => [scope, `${text} (${count(number)})`]));
}

// -- export ------------------------------------------------------------------
const MISSING = ["na", "n/a", "nan", "null", "none", "?", "<na>"];
function csvCell(value) {
  let text = String(value);
  // A spreadsheet would run such a cell as a formula (numbers are none), or it would be read
  // as a missing label. See `csv_cell` in own_data.py, which reads the file.
  const bare = text.replace(/^'+/, "");
  const isNumber = /^[+-]?(\p{Nd}+\.?\p{Nd}*|\.\p{Nd}+)(e[+-]?\p{Nd}+)?$/iu.test(bare);
  const isFormula = /^[=+\-@\t\r]/.test(bare) && !isNumber;
  if (isFormula || MISSING.includes(bare.trim().toLowerCase())) text = "'" + text;
  return /[",\r\n]/.test(text) || text !== text.trim() ? '"' + text.replaceAll('"', '""') + '"' : text;
}
function corrected() {
  const order = data.index.map((index, row) => [index, row]).sort((a, b) => a[0] - b[0]);
  const lines = [[data.key, "label", "given", "decision"]];
  for (const [index, row] of order) {
    const [what, label] = decisions.get(row) || [""];
    if (what === "remove") continue;
    const now = what === "relabel" ? label : data.given[row];
    lines.push([data.key === "path" ? data.names[row] : index, data.classes[now], data.classes[data.given[row]], what]);
  }
  const text = lines.map((line) => line.map(csvCell).join(",")).join("\r\n") + "\r\n";
  // Without this mark, Excel does not read the file as UTF-8.
  return /^[\0-\x7f]*$/.test(text) ? text : "\ufeff" + text;
}
at("export").onclick = () => {
  const link = make("a", { download: "corrected_labels.csv" });
  link.href = URL.createObjectURL(new Blob([corrected()], { type: "text/csv" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};

// -- start -------------------------------------------------------------------
document.title = data.title;
at("title").textContent = data.title;
at("lead").append(
  make("b", { textContent: `${count(data.num_issues)} of ${count(size)} labels` }),
  ` (${percent(data.num_issues / size)}) are estimated to be wrong, from the predictions of a network while it was trained once on the given labels. `,
  make("span", { class: "given", textContent: "Orange" }), " is the given label, ",
  make("span", { class: "suggested", textContent: "blue" }), " the suggested one; the bars are the mean predicted probabilities.");
if (data.notes.length) {
  at("noteTitle").textContent = `About the data (${count(data.notes.length)})`;
  at("notes").append(...data.notes.map((textContent) => make("li", { textContent })));
} else at("noteBox").hidden = true;
const classes = data.classes.map((name, label) => [String(label), name]);
options(at("given"), [[ANY, "any"], ...classes]);
options(at("suggested"), [[ANY, "any"], ...classes]);
options(at("decision"), [[ANY, "any"], ["open", "not decided"], ["keep", "keep"], ["relabel", "relabel"], ["remove", "remove"]]);
options(at("sort"), Object.entries(SORTS).map(([key, [text]]) => [key, text]));
for (const name of ["scope", "given", "suggested", "decision", "sort"]) {
  at(name).onchange = () => { filter[name] = at(name).value; update(); };
}
let waiting = 0;
at("query").oninput = () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => { filter.query = at("query").value.toLowerCase(); update(); }, 150);
};
at("clear").onclick = () => {
  Object.assign(filter, { scope: data.num_issues ? "issues" : "all", given: ANY, suggested: ANY, decision: ANY, query: "", sort: "score" });
  update();
};
const turn = (step) => () => { filter.page += step; draw(); at("shown").scrollIntoView({ block: "start" }); };
at("previous").onclick = turn(-1);
at("next").onclick = turn(1);
at("relabelAll").onclick = () => {
  if (shown.length > PAGE && !confirm(`Relabel ${count(shown.length)} examples as suggested?`)) return;
  decide(shown, (row) => ["relabel", data.suggested[row]]);
  draw();
};
at("undo").onclick = () => {
  for (const [row, before] of history.pop() || []) {
    if (before === undefined) decisions.delete(row);
    else decisions.set(row, before);
  }
  store();
  draw();
};
// This happens if another window stores a decision, or if a busy browser stores one only
// after the page was reloaded. Without this, the next decision here would overwrite it.
window.addEventListener("storage", (event) => {
  if (event.key !== STORE && event.key !== null) return;
  restore();
  draw();
});
drawMatrix();
drawCounts();
// On a telephone the examples come first.
if (window.innerWidth < 700) for (const panel of document.querySelectorAll(".panel")) panel.open = false;
update();

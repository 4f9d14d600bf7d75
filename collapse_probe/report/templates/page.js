"use strict";
// Everything on the page is there without this script; it links what belongs together and saves typing.
(() => {
const all = (what, where = document) => [...where.querySelectorAll(what)];
const make = (tag, facts = {}, ...inside) => { const one = Object.assign(document.createElement(tag), facts); one.append(...inside); return one; };
const draw = (tag, facts) => { const one = document.createElementNS(all("svg")[0].namespaceURI, tag);
  for (const name in facts) one.setAttribute(name, facts[name]); return one; };
const said = make("output", { className: "said", hidden: true }); said.setAttribute("role", "status"); document.body.append(said);
let wait = 0;
const say = text => { said.textContent = text; said.hidden = false; clearTimeout(wait); wait = setTimeout(() => { said.hidden = true; }, 1600); };
const copy = (text, what) => {
  const by_hand = () => { const box = make("textarea", { value: text }); document.body.append(box); box.select();
    const done = document.execCommand("copy"); box.remove(); say(done ? `Copied ${what}` : "The browser does not let a page copy"); };
  if (navigator.clipboard) navigator.clipboard.writeText(text).then(() => say(`Copied ${what}`), by_hand); else by_hand(); };
const cell = text => /[",\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
const csv = rows => rows.map(row => row.map(each => cell(String(each ?? ""))).join(",")).join("\n") + "\n";

// Blocks: depth d is what leaves block d - 1, so that a block has one number everywhere.
const kind = name => /^block/.test(name) ? "block" : /^depth/.test(name) ? "depth" : "";
const block_of = (name, at) => kind(name) === "depth" ? at - 1 : kind(name) === "block" ? at : null;
const index_of = (name, block) => kind(name) === "depth" ? block + 1 : block;
const matrices = all("figure .cells").map(cells => {
  const across = +cells.dataset.across, count = cells.children.length;
  return { cells, across, down: count / across, rows: cells.dataset.rows, columns: cells.dataset.columns, svg: cells.closest("svg") };
});
const charts = all("svg[data-chart]").map(svg => ({ svg, data: JSON.parse(svg.dataset.chart) }));
const place = ([start, step, log], value) => start + step * (log ? Math.log10(value) : value);
let marked = "";
const mark = blocks => {
  const now = blocks.join(); if (now === marked) return; marked = now;
  for (const { cells, across, down, rows, columns } of matrices) {
    all(".cross", cells.parentNode).forEach(each => each.remove());
    const group = draw("g", { class: "cross", transform: cells.getAttribute("transform") });
    for (const block of blocks) {
      const r = index_of(rows, block), c = index_of(columns, block);
      if (kind(rows) && r >= 0 && r < down) group.append(draw("path", { class: "cross", d: `M0 ${r}h${across}v1h-${across}z` }));
      if (kind(columns) && c >= 0 && c < across) group.append(draw("path", { class: "cross", d: `M${c} 0h1v${down}h-1z` }));
    }
    if (group.firstChild) cells.after(group);
  }
  for (const { svg, data } of charts) {
    all(".dots", svg).forEach(each => each.remove());
    if (!kind(data.of)) continue;
    const group = draw("g", { class: "dots" });
    for (const block of blocks) for (const [colour, xs, ys] of Object.values(data.lines)) {
      const at = xs.indexOf(index_of(data.of, block));
      if (at >= 0 && ys[at] !== null) group.append(draw("circle", { cx: place(data.x, xs[at]), cy: place(data.y, ys[at]), r: 4.5, fill: colour, "stroke-width": 2 }));
    }
    if (group.firstChild) svg.append(group);
  }
};

// A matrix: pointing, touching and arrow keys say what a cell holds; Enter or a click copies it.
for (const one of matrices) {
  const { cells, across, down, svg } = one, figure = svg.closest("figure"), paths = [...cells.children];
  let readout = figure.querySelector(".readout");
  if (!readout) { readout = make("p", { className: "readout" }); readout.setAttribute("aria-live", "polite"); (figure.querySelector(".drawing") ?? figure).append(readout); }
  const show = at => { const r = Math.floor(at / across), c = at % across;
    one.at = at; readout.textContent = paths[at].textContent;
    mark([...new Set([block_of(one.rows, r), block_of(one.columns, c)])].filter(block => block !== null && block >= 0)); };
  cells.addEventListener("pointerover", event => { const at = paths.indexOf(event.target.closest("path")); if (at >= 0) show(at); });
  cells.addEventListener("click", event => { const at = paths.indexOf(event.target.closest("path")); if (at >= 0) { show(at); copy(paths[at].textContent, "the cell"); } });
  svg.addEventListener("pointerleave", () => { if (document.activeElement !== svg) mark([]); });
  svg.tabIndex = 0;
  svg.addEventListener("focus", () => show(one.at ?? 0)); svg.addEventListener("blur", () => mark([]));
  svg.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[event.key];
    if (event.key === "Enter") copy(paths[one.at].textContent, "the cell");
    if (step === undefined) return;
    const next = one.at + step;
    event.preventDefault();
    if (next >= 0 && next < paths.length && (Math.abs(step) > 1 || Math.floor(next / across) === Math.floor(one.at / across))) show(next); });
}
for (const { svg, data } of charts) if (kind(data.of)) svg.addEventListener("pointermove", event => {
  const box = svg.getBoundingClientRect(), wide = svg.viewBox.baseVal.width;
  const x = (event.clientX - box.left) / box.width * wide, block = block_of(data.of, Math.round((x - data.x[0]) / data.x[1]));
  mark([block].filter(each => each >= 0)); });
for (const { svg } of charts) svg.addEventListener("pointerleave", () => mark([]));

// What a figure holds, as CSV.
const of_matrix = ({ cells, across, rows, columns }) => {
  const records = [...cells.children].map((path, at) => {
    const record = { [`${rows} (row)`]: Math.floor(at / across), [`${columns} (column)`]: at % across }, text = path.textContent;
    for (const part of text.slice(text.indexOf(": ") + 2).split("; ")) {
      const found = /^(.*?) ?(\[.*\]|[−\d.]+|undefined)$/.exec(part);
      if (!found) continue;
      const number = found[2].replace(/−/g, "-"), name = found[1] || "value";
      if (number[0] === "[") [record[`${name} low`], record[`${name} high`]] = number.slice(1, -1).split(", "); else record[name] = number === "undefined" ? "" : number;
    }
    return record; });
  const names = [...new Set(records.flatMap(Object.keys))];
  return csv([names, ...records.map(record => names.map(name => record[name]))]); };
const of_chart = ({ data }) => {
  const names = Object.keys(data.lines), xs = [...new Set(names.flatMap(name => data.lines[name][1]))].sort((a, b) => a - b);
  return csv([[data.of, ...names], ...xs.map(x => [x, ...names.map(name => { const at = data.lines[name][1].indexOf(x); return at < 0 ? "" : data.lines[name][2][at]; })])]); };
for (const figure of all("figure:not(.glance)")) {
  const panels = [...matrices.filter(one => figure.contains(one.svg)).map(one => () => of_matrix(one)), ...charts.filter(one => figure.contains(one.svg)).map(one => () => of_chart(one))];
  if (!panels.length) continue;
  const tools = make("div", { className: "tools" });
  panels.forEach((text, at) => tools.append(make("button", { type: "button", textContent: panels.length > 1 ? `Copy panel ${at + 1} as CSV` : "Copy as CSV", onclick: () => copy(text(), "the panel") })));
  (figure.querySelector(".drawing") ?? figure).append(tools);
}

// Tables sort by a column, and give a row, a number or all of themselves.
const value = text => { const found = /^[<≤]?\s*\[?[−-]?[\d.,]+/.exec(text.trim()); return found ? parseFloat(found[0].replace(/[<≤\s[,]/g, "").replace("−", "-")) : NaN; };
for (const table of all(".scroll > table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const texts = row => [...row.cells].map(each => each.textContent.trim());
  heads.forEach((head, at) => {
    if (!head.textContent.trim() || body.rows.length < 2) return;
    const button = make("button", { type: "button" }); button.append(...head.childNodes); head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach(each => each.removeAttribute("aria-sort")); head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].map(row => [row.cells[at].textContent.trim(), row]);
      rows.sort(([a], [b]) => { const x = value(a), y = value(b);
        if (isNaN(x) || isNaN(y)) return isNaN(x) && isNaN(y) ? (up ? 1 : -1) * a.localeCompare(b) : isNaN(x) ? 1 : -1;
        return up ? x - y : y - x; });
      body.append(...rows.map(([, row]) => row)); });
  });
  for (const row of body.rows) { const head = row.cells[0];
    if (head.tagName !== "TH") continue;
    const button = make("button", { type: "button", title: "Copy this row" }); button.append(...head.childNodes); head.append(button);
    button.addEventListener("click", () => copy(csv([texts(row)]), "the row")); }
  body.addEventListener("click", event => { const one = event.target.closest("td"); if (one && getSelection().isCollapsed) copy(one.textContent.trim(), "the number"); });
  table.parentNode.after(make("div", { className: "tools" }, make("button", { type: "button", textContent: "Copy table as CSV", onclick: () => copy(csv([...table.rows].map(texts)), "the table") })));
}

// Two views by turns in one place.
for (const box of all(".switch[data-blink]")) {
  const [one, other] = all("input", box); let turning = 0;
  const turn = () => { (one.checked ? other : one).checked = true; };
  const button = make("button", { type: "button", textContent: "Blink" }); button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => {
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) { turn(); return; }
    if (turning) clearInterval(turning); turning = turning ? 0 : (turn(), setInterval(turn, 700)); button.setAttribute("aria-pressed", String(!!turning)); });
  box.append(button);
}
})();

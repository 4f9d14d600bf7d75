"use strict";
// The page is whole without this script, which links what belongs together and copies.
(() => {
const all = (what, where = document) => [...where.querySelectorAll(what)];
const { floor } = Math;
const on = (one, what, act) => one.addEventListener(what, act);
const make = (tag, facts, ...inside) => { const one = Object.assign(document.createElement(tag), facts); one.append(...inside); return one; };
const press = (text, act) => { const one = make("button", { type: "button" }, ...[text].flat()); on(one, "click", act); return one; };
const draw = (tag, facts) => { const one = document.createElementNS(all("svg")[0].namespaceURI, tag);
  for (const name in facts) one.setAttribute(name, facts[name]);
  return one; };
const remove = (what, where) => all(what, where).forEach(each => each.remove());
const said = make("output", { className: "said", hidden: true });
document.body.append(said);
let wait = 0;
const say = text => { said.textContent = text; said.hidden = false; clearTimeout(wait); wait = setTimeout(() => { said.hidden = true; }, 1600); };
const copy = (text, what) => navigator.clipboard.writeText(text).then(() => say(`Copied ${what}`), () => say("Copying is not allowed here"));
const csv = rows => rows.map(row => row.map(each => /[",\n]/.test(each ?? "") ? `"${each.replace(/"/g, '""')}"` : each ?? "").join(",")).join("\n") + "\n";

// Depth d is what leaves block d - 1, so that a block has one number everywhere.
const shift = { block: 0, depth: 1 }, axis = name => shift[name.split(" ")[0]];
const matrices = all("figure .cells").map(cells => {
  const { across, rows, columns } = cells.dataset, paths = [...cells.children];
  return { cells, rows, columns, paths, across: +across, down: paths.length / across, svg: cells.closest("svg"), at: 0 };
});
const charts = all("svg[data-chart]").map(svg => ({ svg, ...JSON.parse(svg.dataset.chart) }));
const place = ([start, step, log], value) => start + step * (log ? Math.log10(value) : value);
let marked = "";
const mark = blocks => {
  if (marked === (marked = blocks.join())) return;
  remove(".cross, .dots");
  for (const { cells, across, down, rows, columns } of matrices) for (const block of blocks) {
    const r = block + axis(rows), c = block + axis(columns);
    const line = d => cells.after(draw("path", { class: "cross", d, transform: cells.getAttribute("transform") }));
    if (c >= 0 && c < across) line(`M${c} 0h1v${down}h-1z`);
    if (r >= 0 && r < down) line(`M0 ${r}h${across}v1h-${across}z`);
  }
  for (const { svg, of, x, y, lines } of charts) for (const block of blocks) for (const [fill, xs, ys] of Object.values(lines)) {
    const at = xs.indexOf(block + axis(of));
    if (at >= 0 && ys[at] !== null) svg.append(draw("circle", { class: "dots", cx: place(x, xs[at]), cy: place(y, ys[at]), r: 4.5, fill }));
  }
};

// A matrix says the cell that is pointed at or walked to; Enter or a click copies it.
for (const one of matrices) {
  const { across, paths, svg } = one, drawing = svg.closest(".drawing");
  let readout = drawing.querySelector(".readout");
  if (!readout) drawing.append(readout = make("p", { className: "readout", ariaLive: "polite" }));
  const show = at => { one.at = at; readout.textContent = paths[at].textContent;
    mark([...new Set([floor(at / across) - axis(one.rows), at % across - axis(one.columns)])].filter(block => block >= 0)); };
  const take = () => copy(paths[one.at].textContent, "the cell");
  const pointed = (e, then) => { const at = paths.indexOf(e.target.closest("path")); if (at >= 0) { show(at); then?.(); } };
  on(one.cells, "pointerover", e => pointed(e));
  on(one.cells, "click", e => pointed(e, take));
  on(svg, "pointerleave", () => mark([]));
  on(svg, "focus", () => show(one.at));
  on(svg, "blur", () => mark([]));
  svg.tabIndex = 0;
  on(svg, "keydown", e => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[e.key], next = one.at + step;
    if (e.key === "Enter") take();
    if (!step) return;
    e.preventDefault();
    if (paths[next] && (step ** 2 > 1 || floor(next / across) === floor(one.at / across))) show(next); });
}
for (const { svg, of, x } of charts) {
  on(svg, "pointermove", e => { const box = svg.getBoundingClientRect();
    mark([Math.round(((e.clientX - box.left) / box.width * svg.viewBox.baseVal.width - x[0]) / x[1]) - axis(of)].filter(block => block >= 0)); });
  on(svg, "pointerleave", () => mark([]));
}

// A figure as CSV.
const of_matrix = ({ paths, across, rows, columns }) => {
  const records = paths.map((path, at) => {
    const record = { [`${rows} (row)`]: floor(at / across), [`${columns} (column)`]: at % across };
    for (const part of path.textContent.replace(/^.*?: /, "").split("; ")) {
      const [, name, value] = /^(.*?) ?(\[.*\]|[−\d.]+|undefined)$/.exec(part), plain = value.replace(/−/g, "-");
      if (value[0] === "[") [record[`${name} low`], record[`${name} high`]] = plain.slice(1, -1).split(", ");
      else record[name || "value"] = plain.replace("undefined", "");
    }
    return record; });
  const names = [...new Set(records.flatMap(Object.keys))];
  return csv([names, ...records.map(record => names.map(name => record[name]))]); };
const of_chart = ({ of, lines }) => {
  const xs = [...new Set(Object.values(lines).flatMap(line => line[1]))].sort((a, b) => a - b);
  return csv([[of, ...Object.keys(lines)], ...xs.map(x => [x, ...Object.values(lines).map(([, at, ys]) => ys[at.indexOf(x)])])]); };
for (const drawing of all(".drawing")) {
  const inside = each => drawing.contains(each.svg), tools = make("div", { className: "tools" });
  const panels = [...matrices.filter(inside).map(one => () => of_matrix(one)), ...charts.filter(inside).map(one => () => of_chart(one))];
  panels.forEach((text, at) => tools.append(press(panels[1] ? `Copy panel ${at + 1} as CSV` : "Copy as CSV", () => copy(text(), "the panel"))));
  if (panels[0]) drawing.append(tools);
}

// Tables sort, and give a number, a row or all of themselves.
const number = text => parseFloat(text.replace(/^[<≤[\s]+/, "").replace(/−/g, "-").replace(/,(?=\d{3})/g, ""));
for (const table of all(".scroll > table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], texts = row => [...row.cells].map(each => each.textContent.trim());
  heads.forEach((head, at) => {
    if (head.textContent.trim() && body.rows[1]) head.append(press([...head.childNodes], () => {
      const up = head.ariaSort === "ascending" ? -1 : 1;
      for (const each of heads) each.removeAttribute("aria-sort");
      head.ariaSort = up > 0 ? "ascending" : "descending";
      const key = row => texts(row)[at];
      body.append(...[...body.rows].sort((a, b) => { const [x, y] = [a, b].map(row => number(key(row)));
        return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) || up * key(a).localeCompare(key(b)) : up * (x - y); })); }));
  });
  for (const row of body.rows) if (row.cells[0].tagName === "TH") row.cells[0].append(press([...row.cells[0].childNodes], () => copy(csv([texts(row)]), "the row")));
  on(body, "click", e => { const one = e.target.closest("td"); if (one && getSelection().isCollapsed) copy(one.textContent.trim(), "the number"); });
  table.parentNode.after(make("div", { className: "tools" }, press("Copy table as CSV", () => copy(csv([...table.rows].map(texts)), "the table"))));
}

// The gallery: block and head, or a clicked patch, for all pictures at once.
for (const box of all(".gallery")) {
  const numbers = name => box.dataset[name].split(" ").map(Number), heads = +box.dataset.heads;
  const blocks = numbers("blocks"), [tall, wide] = numbers("grid"), [down, along] = numbers("cells"), tiles = all("[data-block]", box);
  const range = make("input", { type: "range", max: blocks.length - 1, value: 0 }), label = make("b"), head = make("select");
  head.append(new Option("nothing: the picture", -1));
  for (let at = 0; at <= heads + down * along; at++) { const cell = at - heads - 1;
    head.append(new Option(!at ? "the mean over heads" : cell < 0 ? `head ${at - 1}` : `patch at row ${floor(cell / along)}, column ${cell % along}`, at, !at, !at)); }
  const lenses = all(".large", box).map(large => {
    const picture = large.querySelector("use"), lens = draw("svg", { preserveAspectRatio: "none" });
    lens.append(draw("use", { class: "map", href: picture.getAttribute("href").replace(/p$/, "m") }));
    large.append(lens);
    on(large, "click", e => { const at = large.getBoundingClientRect(), share = (from, all, parts) => floor(from / all * parts);
      head.value = 1 + heads + share(e.clientY - at.top, at.height, down) * along + share(e.clientX - at.left, at.width, along);
      show(); });
    return [lens, picture]; });
  const show = () => { const at = +range.value;
    label.textContent = blocks[at];
    lenses.forEach(([lens, picture]) => { picture.classList.toggle("grey", head.value >= 0); lens.setAttribute("viewBox", [at * wide, head.value * tall, wide, tall]); });
    tiles.forEach(each => each.classList.toggle("now", +each.dataset.block === blocks[at])); };
  on(range, "input", () => { show(); mark([blocks[range.value]]); });
  on(head, "change", show);
  tiles.forEach((tile, at) => on(tile, "click", () => { range.value = at % blocks.length; show(); }));
  box.prepend(make("div", { className: "player" }, make("label", {}, "Block ", range, " ", label), make("label", {}, "Attention of ", head)));
  show();
}

// Two views by turns.
for (const box of all(".switch[data-blink]")) {
  const [one, other] = all("input", box), turn = () => { (one.checked ? other : one).checked = true; };
  let turning = 0;
  const button = press("Blink", () => { clearInterval(turning); turn();
    turning = turning || matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : setInterval(turn, 700);
    button.ariaPressed = !!turning; });
  button.ariaPressed = "false";
  box.querySelector(".panels").before(make("span", { className: "tools" }, button));
}
})();

/** Numbers for people, and small pieces of the page. */

export function bytes(count) {
  if (count < 1000) return `${Math.round(count)} B`;
  for (const unit of ["kB", "MB", "GB"]) {
    count /= 1000;
    if (count < 1000 || unit === "GB") return `${count.toFixed(count < 10 ? 2 : 1)} ${unit}`;
  }
}

export function ms(count) {
  return `${count < 10 ? count.toFixed(2) : Math.round(count)} ms`;
}

/** An element with attributes and children; text is never read as HTML. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Fill a <dl> with terms and what they are. */
export function fillFigures(list, figures) {
  list.replaceChildren(...Object.entries(figures).map(
    ([term, figure]) => make("div", {}, make("dt", {}, term), make("dd", {}, figure)),
  ));
}

export function fillTable(table, columns, rows, nothing) {
  const head = make("thead", {}, make("tr", {}, ...columns.map((column) => make("th", { scope: "col" }, column))));
  const lines = rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, cell))));
  const empty = make("tr", {}, make("td", { colspan: columns.length, class: "quiet" }, nothing));
  table.replaceChildren(head, make("tbody", {}, ...(lines.length ? lines : [empty])));
}

const tints = new Map();

/** A worker's colour, the same all over the page. */
export function tintOf(worker) {
  if (!tints.has(worker)) tints.set(worker, `var(--tint-${tints.size % 6})`);
  return tints.get(worker);
}

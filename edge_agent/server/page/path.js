/** The way of a step: this device, broker, worker and back, with its live figures. */

import { bytes, ms } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";

function draw(name, attributes, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

function box(x, width, title, small) {
  return [
    draw("rect", { x, y: 26, width, height: 58, rx: 8 }),
    draw("text", { x: x + width / 2, y: 51, class: "place" }, title),
    draw("text", { x: x + width / 2, y: 70, class: "small" }, small),
  ];
}

function arrow(tip, from, to, y, label, labelY) {
  return [
    draw("path", { d: `M${from} ${y}H${to}`, "marker-end": `url(#${tip})` }),
    draw("text", { x: (from + to) / 2, y: labelY, class: "small" }, label),
  ];
}

/**
 * Draw it into `place`. `figures`: up and down (bytes of a token), stages (milliseconds), worker,
 * cut, layers (how many the model has); what is not known is left out.
 */
export function drawPath(place, { cut = "", layers = "", up, down, stages = {}, worker = "worker" }) {
  const svg = draw("svg", {
    viewBox: "0 14 330 84", class: "path", role: "img",
    "aria-label": "From this device over the broker to a worker and back",
  });
  const tip = `tip-of-${place.id}`;
  const marker = draw("marker", { id: tip, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" });
  marker.append(draw("path", { d: "M0 0 8 4 0 8z" }));
  const defs = draw("defs", {});
  defs.append(marker);
  const time = (...names) => {
    const known = names.filter((name) => stages[name] !== undefined);
    return known.length ? ms(known.reduce((sum, name) => sum + stages[name], 0)) : "";
  };
  const [first, last] = cut.split(":");
  svg.append(
    defs,
    ...box(1, 92, "this device", time("head", "tail") || (cut ? `layers 0–${first}, ${last}–${layers}` : "")),
    ...box(143, 58, "broker", time("queue")),
    ...box(251, 78, worker, time("middle") || (cut ? `layers ${first}–${last}` : "")),
    ...arrow(tip, 95, 141, 46, up === undefined ? "" : bytes(up), 38),
    ...arrow(tip, 141, 95, 64, down === undefined ? "" : bytes(down), 78),
    ...arrow(tip, 203, 249, 46, time("network"), 38),
    ...arrow(tip, 249, 203, 64, "", 78),
  );
  place.replaceChildren(svg);
}

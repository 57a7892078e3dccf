/** The pool: who computes what, what waits, and how it goes. Asked for again while it is looked at. */

import { bytes, fillFigures, fillTable, make, tintOf } from "./format.js";
import { drawPath } from "./path.js";
import { getJson } from "./server.js";

const EVERY_MS = 1000;
const find = (id) => document.getElementById(id);

export function startPool(model) {
  setInterval(() => {
    if (!find("pool").hidden && document.visibilityState === "visible") refresh(model);
  }, EVERY_MS);
  document.getElementById("tab-pool").addEventListener("click", () => refresh(model));
  if (!find("pool").hidden) refresh(model);
}

async function refresh(model) {
  const error = find("pool-error");
  let report;
  try {
    report = await getJson("midspan/pool");
  } catch (problem) {
    error.textContent = problem.message;
    error.hidden = false;
    return;
  }
  error.hidden = true;
  show(model, report);
}

function show(model, report) {
  const { workers, queues, counters } = report;
  const ready = workers.filter((worker) => worker.state === "ready");
  const sum = (name) => workers.reduce((total, { stats }) => total + (stats[name] ?? 0), 0);
  const stores = ready.map(({ stats }) => stats.store_up);
  drawPath(find("pool-path"), {
    cut: model.cut,
    layers: model.layers,
    worker: ready.length === 1 ? "1 worker" : `${ready.length} workers`,
  });
  fillFigures(find("pool-figures"), {
    "sessions": String(report.sessions),
    "steps in flight": String(report.steps_in_flight),
    "steps answered": counters.answers.toLocaleString("en"),
    "takeovers": String(sum("takeovers") + sum("image_takeovers")),
    "given to another worker": String(counters.redispatched),
    "workers lost": String(counters.dead_workers),
    "Redis": stores.every(Boolean) ? (stores.length ? "up" : "not known") : "down: sessions live in workers and devices only",
    "broker up for": duration(report.uptime_s),
  });
  const columns = ["Worker", "State", "Serves", "Load", "Warm sessions", "Warm memory", "Steps", "Takeovers"];
  fillTable(find("workers"), columns, workers.map(showWorker), "No worker is here.");
  fillTable(
    find("queues"),
    ["Model", "Part", "Precision", "Steps that wait"],
    queues.map((queue) => [nameOf(workers, queue), queue.part, queue.precision, String(queue.queued)]),
    "Nothing is asked for.",
  );
}

function showWorker(worker) {
  const swatch = make("i", { class: "swatch" });
  swatch.style.cssText = `display: inline-block; margin-right: .5rem; background: ${tintOf(worker.worker_id)}`;
  const load = make("span", { class: "load" }, make("i"));
  load.firstChild.style.width = `${Math.min(100, (100 * worker.in_flight) / worker.capacity)}%`;
  const { stats } = worker;
  return [
    make("span", {}, swatch, worker.worker_id),
    worker.state,
    worker.services.map((service) => `${service.name} ${service.part}`).join(", "),
    make("span", {}, load, `${worker.in_flight} of ${worker.capacity}`),
    String(worker.warm_sessions),
    bytes(stats.warm_bytes ?? 0),
    worker.steps_done.toLocaleString("en"),
    String((stats.takeovers ?? 0) + (stats.image_takeovers ?? 0)),
  ];
}

function nameOf(workers, queue) {
  const services = workers.flatMap((worker) => worker.services);
  return services.find((service) => service.model === queue.model)?.name ?? queue.model;
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

/** A picture grows beside a picture of what travelled. */

import { bytes, fillFigures } from "./format.js";
import { postForEvents } from "./server.js";

const find = (id) => document.getElementById(id);

export function startImages(model) {
  find("paint").addEventListener("submit", (event) => {
    event.preventDefault();
    paint(model);
  });
}

function readRequest() {
  const request = {
    prompt: find("image-prompt").value,
    negative_prompt: find("negative").value,
    steps: Number(find("steps").value),
    guidance: Number(find("guidance").value),
    cut: find("image-cut").value,
    response_format: "b64_json",
    stream: true,
    partial_images: 8,
    midspan: true,
  };
  if (find("image-seed").value) request.seed = Number(find("image-seed").value);
  return request;
}

async function paint(model) {
  const button = find("paint-it");
  const error = find("image-error");
  button.disabled = true;
  error.hidden = true;
  document.querySelector(".pictures").hidden = false;
  find("picture-caption").textContent = "Starting…";
  try {
    const request = { model: model.image_model, ...readRequest() };
    for await (const event of postForEvents("v1/images/generations", request)) show(event);
  } catch (problem) {
    error.textContent = problem.message;
    error.hidden = false;
    find("picture-caption").textContent = "";
  } finally {
    button.disabled = false;
  }
}

function show(event) {
  if (event.b64_json) find("picture").src = `data:image/png;base64,${event.b64_json}`;
  const cost = event.midspan;
  if (!cost) return;
  if (cost.travelled) find("travelled").src = `data:image/png;base64,${cost.travelled}`;
  const isDone = event.type === "image_generation.completed";
  const seed = cost.seed === undefined ? "" : `, seed ${cost.seed}`;
  find("picture-caption").textContent = isDone ? `Done${seed}` : `Step ${cost.step} of ${cost.steps}${seed}`;
  fillFigures(find("image-bytes"), {
    "sent": bytes(cost.bytes_up),
    "received": bytes(cost.bytes_down),
    "computed by": cost.worker,
    "steps": `${cost.step} of ${cost.steps}`,
  });
}

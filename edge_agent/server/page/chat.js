/** The conversation: what is asked, what comes back token by token, and what that cost. */

import { bytes, fillFigures, make, ms, tintOf } from "./format.js";
import { drawPath } from "./path.js";
import { postForEvents } from "./server.js";

const STAGES = ["head", "network", "queue", "middle", "tail"];
const find = (id) => document.getElementById(id);
const messages = [];
let isAnswering = null;  // the AbortController of the answer that is being written

export function startChat(model) {
  const ask = find("ask");
  const prompt = find("prompt");
  ask.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!isAnswering && prompt.value.trim()) answer(model, prompt);
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      ask.requestSubmit();
    }
  });
  find("stop").addEventListener("click", () => isAnswering?.abort());
  find("new-chat").addEventListener("click", () => {
    isAnswering?.abort();
    messages.length = 0;
    showEmpty(model);
  });
  if (!model.has_chat_template) find("send").disabled = true;
  showEmpty(model);
  watchTokens(find("messages"));
}

function showEmpty(model) {
  const words = model.has_chat_template
    ? "Every token of an answer is tinted by the worker that computed it. Point at one, or walk with the arrow keys, to see what it cost."
    : "This model’s tokenizer has no chat template. Give midspan serve one with --chat-template FILE.";
  find("messages").replaceChildren(make("li", { class: "empty" }, words));
  showCosts(model, new Costs());
}

/** What an answer has cost so far. */
class Costs {
  tokens = 0;
  up = 0;
  down = 0;
  last = null;
  stages = Object.fromEntries(STAGES.map((stage) => [stage, 0]));
  timed = 0;
  byWorker = new Map();

  add(token) {
    this.tokens += 1;
    this.up += token.bytes_up;
    this.down += token.bytes_down;
    this.last = token;
    this.byWorker.set(token.worker, (this.byWorker.get(token.worker) ?? 0) + 1);
    if (!token.stages_ms || !Object.keys(token.stages_ms).length) return;
    this.timed += 1;
    for (const stage of STAGES) this.stages[stage] += token.stages_ms[stage] ?? 0;
  }

  get stagesOfToken() {
    if (!this.timed) return {};
    return Object.fromEntries(STAGES.map((stage) => [stage, this.stages[stage] / this.timed]));
  }
}

function readRequest() {
  const system = find("system").value.trim();
  const request = {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    midspan: true,
    temperature: Number(find("temperature").value),
    top_p: Number(find("top-p").value),
    max_tokens: Number(find("max-tokens").value),
  };
  if (find("seed").value) request.seed = Number(find("seed").value);
  return request;
}

async function answer(model, prompt) {
  const list = find("messages");
  list.querySelector(".empty")?.remove();
  const asked = prompt.value.trim();
  messages.push({ role: "user", content: asked });
  list.append(make("li", { class: "user" }, asked));
  const item = make("li", { class: "assistant writing", tabindex: "0" });
  list.append(item);
  prompt.value = "";
  const costs = new Costs();
  isAnswering = new AbortController();
  setWriting(true);
  let text = "";
  try {
    const request = { model: model.model, ...readRequest() };
    for await (const event of postForEvents("v1/chat/completions", request, isAnswering.signal)) {
      const content = event.choices[0]?.delta?.content ?? "";
      text += content;
      if (event.midspan?.worker !== undefined) costs.add(event.midspan);
      if (content) item.append(makeToken(content, event.midspan));
      showCosts(model, costs);
      list.scrollTop = list.scrollHeight;
    }
    if (!text) item.append(make("p", { class: "quiet" }, "The model ended its answer at once."));
    messages.push({ role: "assistant", content: text });
  } catch (error) {
    if (error.name === "AbortError") {
      messages.push({ role: "assistant", content: text });
    } else {
      messages.pop();
      item.append(make("p", { class: "error", role: "alert" }, error.message));
    }
  } finally {
    item.classList.remove("writing");
    isAnswering = null;
    setWriting(false);
  }
}

function setWriting(isWriting) {
  find("stop").hidden = !isWriting;
  find("send").hidden = isWriting;
  if (!isWriting) find("prompt").focus();
}

function makeToken(content, token) {
  const span = make("span", { class: "token" }, content);
  if (token?.worker !== undefined) {
    span.style.background = tintOf(token.worker);
    span.dataset.worker = token.worker;
    span.dataset.tip = describe(token);
  }
  return span;
}

function describe(token) {
  const stages = Object.entries(token.stages_ms ?? {}).map(([stage, time]) => `${stage} ${ms(time)}`);
  const lines = [`computed by ${token.worker}`, `${bytes(token.bytes_up)} up, ${bytes(token.bytes_down)} down`];
  return [...lines, ...(stages.length ? [stages.join(", ")] : [])].join("\n");
}

/** Hovering over a token, or arrow keys within an answer, show what it cost. */
function watchTokens(list) {
  const tip = find("tip");
  let current = null;
  const point = (token) => {
    current?.classList.remove("current");
    current = token;
    tip.hidden = !token?.dataset.tip;
    if (tip.hidden) return;
    token.classList.add("current");
    tip.textContent = token.dataset.tip;
    const place = token.getBoundingClientRect();
    const left = Math.min(place.left, innerWidth - tip.offsetWidth - 8);
    const above = place.top - tip.offsetHeight - 6;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 0 ? above : place.bottom + 6}px`;
  };
  list.addEventListener("pointerover", (event) => point(event.target.closest(".token")));
  list.addEventListener("pointerleave", () => point(null));
  list.addEventListener("focusout", () => point(null));
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    const answered = event.target.closest(".assistant");
    if (!step || !answered) return;
    event.preventDefault();
    const from = current && answered.contains(current) ? current[step] : answered.querySelector(".token");
    if (from?.matches(".token")) point(from);
  });
}

function showCosts(model, costs) {
  const { last } = costs;
  drawPath(find("path"), {
    cut: model.cut,
    layers: model.layers,
    up: last?.bytes_up,
    down: last?.bytes_down,
    stages: costs.stagesOfToken,
    worker: last?.worker ?? "worker",
  });
  fillFigures(find("bytes"), {
    "sent": bytes(costs.up),
    "received": bytes(costs.down),
    "codec": describeCodec(model.codecs),
    "bits per value": describeBits(model.bits),
    "tokens": String(costs.tokens),
  });
  showStages(costs.stagesOfToken);
  find("workers-of-answer").replaceChildren(...[...costs.byWorker].map(([worker, count]) => {
    const swatch = make("i", { class: "swatch" });
    swatch.style.background = tintOf(worker);
    return make("li", {}, swatch, worker, make("b", {}, `${count} token${count === 1 ? "" : "s"}`));
  }));
}

function describeCodec({ decode_up: up, decode_down: down }) {
  return up === down ? up : `${up} up, ${down} down`;
}

function describeBits({ decode_up: up, decode_down: down }) {
  const say = (bits) => (bits === null ? "varies" : String(bits));
  return up === down ? say(up) : `${say(up)} up, ${say(down)} down`;
}

function showStages(stages) {
  const bar = make("div", { class: "bar", role: "img", "aria-label": "Time of a token by stage" });
  const legend = make("ul", { class: "legend" });
  for (const stage of STAGES) {
    const time = stages[stage];
    const piece = make("i");
    piece.style.cssText = `flex: ${time ?? 0}; background: var(--${stage})`;
    if (time) bar.append(piece);
    const swatch = make("i", { class: "swatch" });
    swatch.style.background = `var(--${stage})`;
    legend.append(make("li", {}, swatch, stage, make("b", {}, time === undefined ? "" : ms(time))));
  }
  find("stages").replaceChildren(bar, legend);
}

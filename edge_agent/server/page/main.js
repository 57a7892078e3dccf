/** Tabs, theme, the API key, and what is asked of the server once. */

import { startChat } from "./chat.js";
import { startImages } from "./image.js";
import { getJson, onKeyWanted, useKey } from "./server.js";
import { startPool } from "./pool.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const starts = { chat: startChat, image: startImages, pool: startPool };

function show(tab) {
  for (const each of tabs) {
    const isShown = each === tab;
    each.setAttribute("aria-selected", String(isShown));
    each.tabIndex = isShown ? 0 : -1;
    document.getElementById(each.getAttribute("aria-controls")).hidden = !isShown;
  }
  history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
}

for (const [index, tab] of tabs.entries()) {
  tab.addEventListener("click", () => show(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step === undefined) return;
    const next = tabs[(index + step + tabs.length) % tabs.length];
    show(next);
    next.focus();
  });
}
show(tabs.find((tab) => location.hash === `#${tab.getAttribute("aria-controls")}`) ?? tabs[0]);

const root = document.documentElement;
const remembered = localStorage.getItem("theme");
if (remembered) root.dataset.theme = remembered;
document.getElementById("theme").addEventListener("click", () => {
  const prefersDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : prefersDark;
  root.dataset.theme = isDark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
});

const keyForm = document.getElementById("key-form");
onKeyWanted(() => {
  keyForm.hidden = false;
  document.getElementById("key").focus();
});
keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(document.getElementById("key").value);
  keyForm.hidden = true;
  start();
});

let isStarted = false;

async function start() {
  let model;
  try {
    model = await getJson("midspan/model");
  } catch (error) {
    document.getElementById("model").textContent = error.message;
    return;
  }
  document.getElementById("model").textContent = `${model.model}, layers ${model.cut.replace(":", " to ")} in the pool`;
  document.getElementById("tab-image").hidden = !model.image_model;
  if (isStarted) return;
  isStarted = true;
  for (const begin of Object.values(starts)) begin(model);
}

start();

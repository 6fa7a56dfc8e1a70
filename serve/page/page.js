"use strict";

const KEY = "rwkv-clip-key";
const find = (selector, root = document) => root.querySelector(selector);
const images = { "search-image": null, "classify-image": null };
const latest = new Map(); // each panel's last task: an older one that ends later shows nothing
let again = null; // what a key was missing for

async function ask(path, body) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers };
  const answer = await fetch(path, options);
  const told = await answer.json();
  if (answer.status === 401) find("#key").hidden = false;
  if (!answer.ok) throw new Error(told.error.message);
  find("#key").hidden = true;
  return told;
}

async function work(panel, task) {
  const status = find(".status", panel);
  const button = find("button[type=submit]", panel);
  again = () => work(panel, task);
  latest.set(panel, task);
  status.textContent = "One moment …";
  button.disabled = true;
  try {
    const show = await task();
    if (latest.get(panel) === task) status.textContent = show();
  } catch (error) {
    if (latest.get(panel) !== task) return;
    status.textContent = error instanceof TypeError ? "The server cannot be reached." : error.message;
    if (!find("#key").hidden) find("#key-value").focus();
  } finally {
    if (latest.get(panel) === task) button.disabled = false;
  }
}

function made(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

async function search(input) {
  const told = await ask("v1/search", { input, with_images: true });
  const shown = told.data.map((one) => {
    const score = made("p", { className: "score" }, `score ${one.score.toFixed(3)}`);
    const parts = [made("p", {}, one.text || one.id), score];
    if (one.image) parts.unshift(made("img", { src: one.image, alt: one.text || one.id }));
    return made("li", {}, ...parts);
  });
  return () => {
    find("#results").replaceChildren(...shown);
    return `${shown.length} results, the nearest first`;
  };
}

async function classify(image, labels) {
  const told = await ask("v1/classify", { image, labels });
  const rows = told.data.map((one) => {
    const percent = `${(100 * one.probability).toFixed(1)} %`;
    const meter = made("meter", { value: one.probability, ariaHidden: "true" });
    return made("tr", {}, made("th", { scope: "row" }, one.label), made("td", {}, meter, percent));
  });
  return () => {
    find("#chances tbody").replaceChildren(...rows);
    find("#chances").hidden = false;
    return `${told.data[0].label} fits best`;
  };
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("the file cannot be read"));
    reader.readAsDataURL(file);
  });
}

async function take(target, file) {
  if (!file) return;
  const panel = find(`#${target}`).closest("[role=tabpanel]");
  const image = await read(file);
  images[target] = image;
  const shown = find(`.drop[data-target=${target}] img`);
  Object.assign(shown, { src: image, hidden: false });
  if (target === "search-image") {
    find("#words").value = "";
    await work(panel, () => search(image));
  }
}

function choose(tab) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    find(`#${other.getAttribute("aria-controls")}`).hidden = !chosen;
  }
  tab.focus();
}

const tabs = [...document.querySelectorAll("[role=tab]")];
tabs.forEach((tab, at) => {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) choose(tabs[(at + step + tabs.length) % tabs.length]);
  });
});

for (const area of document.querySelectorAll(".drop")) {
  const target = area.dataset.target;
  find("input", area).addEventListener("change", (event) => take(target, event.target.files[0]));
  area.addEventListener("dragover", (event) => {
    event.preventDefault();
    area.classList.add("over");
  });
  area.addEventListener("dragleave", () => area.classList.remove("over"));
  area.addEventListener("drop", (event) => {
    event.preventDefault();
    area.classList.remove("over");
    take(target, event.dataTransfer.files[0]);
  });
}

find("#search").addEventListener("submit", (event) => {
  event.preventDefault();
  const words = find("#words").value.trim();
  // A part, so that no words are taken for the image that they may look like.
  const input = words ? { type: "text", text: words } : images["search-image"];
  const panel = find("#panel-search");
  if (input) work(panel, () => search(input));
  else find(".status", panel).textContent = "Type words, or choose an image.";
});

find("#classify").addEventListener("submit", (event) => {
  event.preventDefault();
  const panel = find("#panel-classify");
  const image = images["classify-image"];
  const labels = find("#labels").value.split("\n").map((line) => line.trim()).filter(Boolean);
  if (image && labels.length) work(panel, () => classify(image, labels));
  else find(".status", panel).textContent = "Choose an image, and type at least one label.";
});

find("#key").addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, find("#key-value").value);
  if (again) await again();
  await about();
});

async function about() {
  try {
    const [model] = (await ask("v1/models")).data;
    find("#model").textContent = `${model.id}, version ${model.version}`;
  } catch (error) {
    find("#model").textContent = error instanceof TypeError ? "no server" : error.message;
  }
}

about();

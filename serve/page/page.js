"use strict";

const KEY = "rwkv-clip-key";
// More than a server takes, which tells its own limit: what larger files would do to the browser.
const MOST_MEGABYTES = 64;
const find = (selector, root = document) => root.querySelector(selector);
const images = { "search-image": null, "classify-image": null }; // promises of data URIs
const latest = new Map(); // each panel's last task: an older one that ends later shows nothing
let again = null; // what a key was missing for

async function ask(path, body) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers };
  let answer, text;
  try {
    answer = await fetch(path, options);
    text = await answer.text();
  } catch {
    throw new Error("The server cannot be reached.");
  }
  if (answer.status === 401) {
    find("#key").hidden = false;
    throw new Error(key ? "The server does not know this key." : "The server wants a key.");
  }
  const told = parsed(text);
  if (!answer.ok || !Array.isArray(told?.data)) throw new Error(complaint(answer, text, told));
  find("#key").hidden = true;
  if (told.model) tellModel(told.model, told.model_version);
  return told;
}

// With each answer, since another model may be served by then.
function tellModel(name, version) {
  find("#model").textContent = `${name}, version ${version}`;
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

// What is wrong: in this server's words, or in those of a proxy before it if they are for people.
function complaint(answer, text, told) {
  if (typeof told?.error?.message === "string") return told.error.message;
  const plain = answer.headers.get("Content-Type")?.startsWith("text/plain");
  const words = [told?.error, told?.detail, plain && text.trim().slice(0, 200), answer.statusText];
  const why = words.find((one) => one && typeof one === "string");
  if (answer.ok) return "The server's answer is none that this page can read.";
  return `The server answered ${answer.status}${why ? `: ${why}` : "."}`;
}

function say(panel, words) {
  find(".status", panel).textContent = words;
}

// A button that is disabled would lose the keyboard's focus: it is said to be, and does nothing.
function busy(panel, so) {
  find("button[type=submit]", panel).setAttribute("aria-disabled", String(so));
}

function isBusy(panel) {
  return find("button[type=submit]", panel).getAttribute("aria-disabled") === "true";
}

async function work(panel, task) {
  latest.set(panel, task);
  say(panel, "One moment …");
  busy(panel, true);
  try {
    const show = await task();
    if (latest.get(panel) === task) say(panel, show());
  } catch (error) {
    if (latest.get(panel) !== task) return;
    say(panel, error.message);
    find(".found", panel).hidden = true; // it was for something else
    if (find("#key").hidden) return;
    again = () => work(panel, task);
    find("#key-value").focus();
  } finally {
    if (latest.get(panel) === task) busy(panel, false);
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
    find("#results").hidden = false;
    if (shown.length < 2) return shown.length ? "One result" : "Nothing was found.";
    return `${shown.length} results, the nearest first`;
  };
}

async function classify(image, labels) {
  const told = await ask("v1/classify", { image, labels });
  const rows = told.data.map((one) => {
    const percent = `${(100 * one.probability).toFixed(1)}\u00a0%`;
    const meter = made("meter", { value: one.probability, ariaHidden: "true" });
    return made("tr", {}, made("th", { scope: "row" }, one.label), made("td", {}, meter, percent));
  });
  return () => {
    find("#chances tbody").replaceChildren(...rows);
    find("#chances").hidden = false;
    return `${told.data[0].label} fits best`;
  };
}

async function read(file) {
  const megabytes = Math.ceil(file.size / 1e6);
  if (!file.type.startsWith("image/")) throw new Error(`${file.name} is no image file.`);
  if (megabytes > MOST_MEGABYTES) {
    throw new Error(`${file.name} has ${megabytes} MB; send ${MOST_MEGABYTES} MB at most.`);
  }
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

const preview = (target) => find(`.drop[data-target=${target}] img`);

function forget(target) {
  images[target] = null;
  find(`#${target}`).value = ""; // or the same file could not be chosen again
  preview(target).hidden = true;
}

function take(target, file) {
  if (!file) return;
  const panel = find(`#${target}`).closest("[role=tabpanel]");
  const image = read(file);
  images[target] = image;
  preview(target).hidden = true;
  image.then(
    (src) => {
      if (images[target] === image) Object.assign(preview(target), { src, hidden: false });
    },
    (error) => {
      if (images[target] !== image) return;
      forget(target);
      say(panel, error.message);
    },
  );
  if (target === "search-image") {
    find("#words").value = "";
    work(panel, async () => search(await image));
  } else {
    // What is known, or asked for, of the image before is not this one's.
    latest.delete(panel);
    busy(panel, false);
    say(panel, "");
    find("#chances").hidden = true;
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
  const input = find("input", area);
  input.addEventListener("change", () => take(target, input.files[0]));
  area.addEventListener("dragover", () => area.classList.add("over"));
  area.addEventListener("dragleave", () => area.classList.remove("over"));
  area.addEventListener("drop", (event) => {
    const { files } = event.dataTransfer;
    area.classList.remove("over");
    if (files.length !== 1) {
      say(area.closest("[role=tabpanel]"), "Drop an image file, one at a time.");
      return;
    }
    input.files = files; // to show its name
    take(target, files[0]);
  });
  // What the browser cannot show may still be an image for the server, which tells if it is none.
  preview(target).addEventListener("error", () => (preview(target).hidden = true));
}

// Or the browser would leave the page for what is dropped beside the boxes.
for (const kind of ["dragover", "drop"]) {
  document.addEventListener(kind, (event) => {
    const within = (selector) => event.composedPath().some((one) => one.matches?.(selector));
    if (within("#words, #labels") && !event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    if (!within(".drop")) event.dataTransfer.dropEffect = "none";
  });
}

// Who asks for something else need not wait for the answer to what was asked before.
for (const panel of document.querySelectorAll("[role=tabpanel]")) {
  panel.addEventListener("input", () => busy(panel, false));
}

find("#search").addEventListener("submit", (event) => {
  event.preventDefault();
  const panel = find("#panel-search");
  if (isBusy(panel)) return;
  const words = find("#words").value.trim();
  if (words) forget("search-image");
  // A part, so that no words are taken for the image that they may look like.
  const input = words ? { type: "text", text: words } : images["search-image"];
  if (input) work(panel, async () => search(await input));
  else say(panel, "Type words, or choose an image.");
});

find("#classify").addEventListener("submit", (event) => {
  event.preventDefault();
  const panel = find("#panel-classify");
  if (isBusy(panel)) return;
  const image = images["classify-image"];
  const labels = find("#labels").value.split("\n").map((line) => line.trim()).filter(Boolean);
  if (image && labels.length) work(panel, async () => classify(await image, labels));
  else say(panel, "Choose an image, and type at least one label.");
});

find("#key").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = find("#key");
  const key = find("#key-value").value.trim();
  try {
    new Headers({ Authorization: `Bearer ${key}` });
  } catch {
    say(form, "No key has such characters; copy it once more.");
    return;
  }
  sessionStorage.setItem(KEY, key);
  say(form, "One moment …");
  await about();
  if (!form.hidden) return;
  find("[role=tabpanel]:not([hidden]) :is(#words, #labels)").focus();
  const task = again;
  again = null;
  await task?.();
});

async function about() {
  try {
    const [model] = (await ask("v1/models")).data;
    tellModel(model.id, model.version);
  } catch (error) {
    const place = find("#key").hidden ? "#model" : "#key .status";
    find(place).textContent = error.message;
  }
}

about();

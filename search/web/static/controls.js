// The form: its fields change the address, and the address changes its fields.

import { change, read } from "./address.js";
import { say } from "./problems.js";

const MAX_SENTENCE = 2000;
const form = document.getElementById("search");
const line = document.getElementById("q");

function submit() {
  const text = line.value.trim();
  if (text.length > MAX_SENTENCE) {
    const length = text.length.toLocaleString("en");
    say("q", `A sentence has at most 2,000 characters; this one has ${length}. Shorten it and search again.`);
    return;
  }
  say("q", "");
  // A new sentence begins a new search; marks and filters stay.
  const isNew = text !== (read().get("q") || "");
  change({
    q: text,
    filter: document.getElementById("filter").value.trim(),
    ...(isNew && text ? { like: null, code: null, near: null, find: null, detector: null, min: null } : {}),
  });
  for (const menu of document.querySelectorAll("details.menu[open]")) menu.open = false;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});

form.addEventListener("change", (event) => {
  const { name } = event.target;
  if (name === "label") {
    change({ label: [...form.querySelectorAll("[name=label]:checked")].map((box) => box.value) });
  } else if (name === "from" || name === "to" || name === "sort") {
    change({ [name]: name === "sort" && event.target.value === "near" ? null : event.target.value });
  }
});

form.addEventListener("input", (event) => {
  if (event.target.id !== "narrow") return;
  const part = event.target.value.trim().toLowerCase();
  for (const label of document.querySelectorAll("#classes > label")) {
    label.hidden = !label.children[1].textContent.toLowerCase().includes(part);
  }
});

form.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.id === "clear-dates") change({ from: null, to: null });
  if (button.id === "clear-area") {
    document.dispatchEvent(new CustomEvent("orbithash:area", { detail: { ring: null } }));
    change({ area: null });
  }
  if (button.dataset.month) {
    const [year, month] = button.dataset.month.split("-");
    const last = month ? new Date(Date.UTC(Number(year), Number(month), 0)).getUTCDate() : 31;
    change({ from: `${year}-${month || "01"}-01`, to: `${year}-${month || "12"}-${last}` });
  }
});

// One menu at a time; a click elsewhere closes it.
document.addEventListener("click", (event) => {
  for (const menu of document.querySelectorAll("details.menu[open]")) {
    if (!menu.contains(event.target)) menu.open = false;
  }
});

// Counts are read when a menu is opened, and again when the other filters have changed.
let counted = { classes: null, months: null };

function count(id) {
  const place = document.getElementById(id);
  const parameters = read();
  const relevant = ["area", "filter", ...(id === "classes" ? ["from", "to"] : ["label"])];
  const now = JSON.stringify(relevant.map((name) => parameters.getAll(name)));
  if (counted[id] === now) return;
  counted[id] = now;
  htmx.trigger(place, "orbithash:filters");
}

for (const [menu, id] of [
  ["class-menu", "classes"],
  ["date-menu", "months"],
]) {
  document.getElementById(menu).addEventListener("toggle", (event) => event.target.open && count(id));
}

document.addEventListener("htmx:configRequest", (event) => {
  const { id } = event.detail.elt;
  if (id === "classes" || id === "months") event.detail.path = `/${id}${location.search}`;
});

document.addEventListener("htmx:responseError", (event) => {
  if (event.detail.elt.id in counted) counted[event.detail.elt.id] = null;
});

/** Make the fields show the address. */
function sync() {
  const parameters = read();
  if (document.activeElement !== line || !line.value.trim() || parameters.get("q")) line.value = parameters.get("q") || "";
  for (const name of ["from", "to"]) document.getElementById(name).value = parameters.get(name) || "";
  document.getElementById("filter").value = parameters.get("filter") || "";
  document.getElementById("sort").value = parameters.get("sort") || "near";
  const labels = parameters.getAll("label");
  for (const box of form.querySelectorAll("[name=label]")) box.checked = labels.includes(box.value);
  document.getElementById("clear-area").hidden = !parameters.get("area");
  badge("class-menu", labels.length ? String(labels.length) : "");
  badge("filter-menu", parameters.get("filter") ? "1" : "");
  const [from, to] = [parameters.get("from"), parameters.get("to")];
  badge("date-menu", from || to ? `${from || "…"} – ${to || "…"}` : "");
  for (const [menu, id] of [
    ["class-menu", "classes"],
    ["date-menu", "months"],
  ]) {
    if (document.getElementById(menu).open) count(id);
  }
}

function badge(menu, text) {
  const summary = document.querySelector(`#${menu} > summary`);
  let place = summary.querySelector(".count");
  if (!text) {
    place?.remove();
    return;
  }
  if (!place) {
    place = document.createElement("span");
    place.className = "count";
    summary.append(place);
  }
  place.textContent = text;
}

document.addEventListener("orbithash:address", sync);

// What is asked for can be taken back one by one.
document.addEventListener("click", (event) => {
  const names = event.target.closest?.("[data-remove]")?.dataset.remove;
  if (names) change(Object.fromEntries(names.split(" ").map((name) => [name, null])));
  const find = event.target.closest?.("[data-find]")?.dataset.find;
  if (find) change({ find, detector: null, min: null });
  if (event.target.id === "reshuffle") change({ seed: String(1 + Math.floor(Math.random() * 2 ** 31)) });
});

// Tiles and map are tabs on narrow screens.
for (const view of ["tiles", "map"]) {
  document.getElementById(`view-${view}`).addEventListener("click", () => {
    document.getElementById("columns").dataset.view = view;
    for (const other of ["tiles", "map"]) {
      document.getElementById(`view-${other}`).setAttribute("aria-pressed", String(other === view));
    }
    dispatchEvent(new Event("resize"));
  });
}

// The cut-off: a slider over the distances of the query, with the number of tiles at each.

import { change } from "./address.js";

// Steps of a slider that follow each other quickly change the answer once.
const PAUSE_MS = 150;
let rows = [];
let timer = null;

function describe(slider) {
  const bits = Number(slider.dataset.bits);
  const value = Number(slider.value);
  const text = value >= bits ? "all distances" : `up to ${value} ${value === 1 ? "bit" : "bits"}`;
  const count = rows[Math.min(value, rows.length - 1)];
  const tiles = count === undefined ? "" : `: ${count.toLocaleString("en")} ${count === 1 ? "tile" : "tiles"}`;
  document.getElementById("cutoff-text").textContent = text + tiles;
}

document.addEventListener("input", (event) => {
  if (event.target.id === "radius") describe(event.target);
  if (event.target.id === "min") document.getElementById("min-text").textContent = Number(event.target.value).toFixed(1);
});

document.addEventListener("change", (event) => {
  const { id, value, dataset } = event.target;
  if (id !== "radius" && id !== "min") return;
  const isDefault = id === "radius" ? Number(value) >= Number(dataset.bits) : Number(value) === 0;
  clearTimeout(timer);
  timer = setTimeout(() => change({ [id]: isDefault ? null : value }, { keepScroll: true }), PAUSE_MS);
});

document.addEventListener("htmx:afterSwap", (event) => {
  if (event.detail.target?.id !== "counts") return;
  const chart = event.detail.target.querySelector("[data-rows]");
  rows = chart ? chart.dataset.rows.split(",").map(Number) : [];
  const slider = document.getElementById("radius");
  if (slider && chart) describe(slider);
});

// The dialogs: one tile in full, and the keys. Both are native dialogs, which keep the focus inside.

import { hide, mark } from "./marks.js";
import { ids } from "./address.js";
import { say, sentenceOf } from "./problems.js";

const dialog = document.getElementById("view");
let shown = null;
let request = null;

/** Show one row in full. */
export async function open(id) {
  request?.abort();
  request = new AbortController();
  let content;
  try {
    const response = await fetch(`/row/${id}${location.search}`, {
      headers: { "HX-Request": "true", "HX-Current-URL": location.href },
      signal: request.signal,
    });
    content = await response.text();
    if (response.headers.get("HX-Redirect")) location.assign(response.headers.get("HX-Redirect"));
    if (!response.ok) throw new Error(sentenceOf(content));
  } catch (error) {
    if (error.name === "AbortError") return;
    const sentence = error.message && error.name === "Error" ? error.message : "The service does not answer. Try again.";
    say(dialog.open ? "row" : "gateway", sentence);
    return;
  }
  shown = String(id);
  htmx.swap(dialog, content, { swapStyle: "innerHTML", swapDelay: 0, settleDelay: 0 });
  if (!dialog.open) dialog.showModal();
  dialog.setAttribute("aria-label", dialog.querySelector("h2").textContent);
  const all = [...document.querySelectorAll(".tile")].map((tile) => tile.dataset.id);
  const index = all.indexOf(shown);
  dialog.querySelector('[data-step="-1"]').disabled = index <= 0;
  dialog.querySelector('[data-step="1"]').disabled = index < 0 || index >= all.length - 1;
}

function step(by) {
  const all = [...document.querySelectorAll(".tile")].map((tile) => tile.dataset.id);
  const next = all[all.indexOf(shown) + by];
  if (next !== undefined && all.includes(shown)) open(next);
}

function press(kind) {
  const now = ids("good").includes(shown) ? "good" : ids("bad").includes(shown) ? "bad" : "";
  const next = now === kind ? "" : kind;
  mark([shown], next);
  for (const button of dialog.querySelectorAll(".row-actions [data-mark]")) {
    button.setAttribute("aria-pressed", String(button.dataset.mark === next));
  }
}

dialog.addEventListener("click", async (event) => {
  // A click on the dialog itself is one on its backdrop or its edge.
  if (event.target === dialog) {
    const box = dialog.getBoundingClientRect();
    const isOutside =
      event.clientX < box.left || event.clientX > box.right || event.clientY < box.top || event.clientY > box.bottom;
    if (isOutside) dialog.close();
  }
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.step) step(Number(button.dataset.step));
  if (button.dataset.mark) press(button.dataset.mark);
  if (button.dataset.hide) {
    dialog.close();
    hide(button.dataset.hide);
  }
  if (button.dataset.copy) {
    try {
      await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(document.getElementById(button.dataset.copy));
      button.textContent = "Press Ctrl+C";
    }
  }
});

dialog.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
  if (event.key === "+" || event.key === "=") press("good");
  if (event.key === "-") press("bad");
});

dialog.addEventListener("close", () => {
  const tile = document.getElementById(`tile-${shown}`);
  tile?.focus();
});

document.getElementById("show-keys").addEventListener("click", () => document.getElementById("keys").showModal());
document.addEventListener("click", (event) => {
  if (event.target.closest?.("[data-close]")) event.target.closest("dialog").close();
});

// Exports, links to share, and the same place at other times.

import { open } from "./dialog.js";
import { say, sentenceOf } from "./problems.js";

// Rows of a file of what is shown.
const MAX_SHOWN = 10000;

// A file of what is shown has as many rows as there are tiles, which grow in number while one scrolls.
document.addEventListener(
  "toggle",
  (event) => {
    if (event.target.id !== "export-menu" || !event.target.open) return;
    const count = Math.max(1, document.querySelectorAll("article.tile").length);
    document.getElementById("export-shown").textContent = count.toLocaleString("en");
    for (const link of event.target.querySelectorAll('[data-scope="shown"]')) {
      const address = new URL(link.href);
      address.searchParams.set("limit", String(Math.min(count, MAX_SHOWN)));
      link.href = address.pathname + address.search;
    }
  },
  true,
);

document.addEventListener("click", async (event) => {
  if (event.target.id !== "copy-address") return;
  try {
    await navigator.clipboard.writeText(location.href);
    event.target.textContent = "Copied";
  } catch {
    event.target.textContent = "Copy it from the address bar";
  }
});

const times = document.getElementById("times");

async function openTimes(id) {
  try {
    const response = await fetch(`/times/${id}`, { headers: { "HX-Request": "true", "HX-Current-URL": location.href } });
    const content = await response.text();
    if (response.headers.get("HX-Redirect")) location.assign(response.headers.get("HX-Redirect"));
    if (!response.ok) throw new Error(sentenceOf(content));
    htmx.swap(times, content, { swapStyle: "innerHTML", swapDelay: 0, settleDelay: 0 });
    if (!times.open) times.showModal();
  } catch (error) {
    say("row", error.name === "Error" ? error.message : "The service does not answer. Try again.");
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("button.times");
  if (button) openTimes(button.dataset.id);
});

times.addEventListener("click", (event) => {
  const id = event.target.closest("[data-view]")?.dataset.view;
  if (!id) return;
  times.close();
  open(id);
});

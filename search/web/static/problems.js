// Requests that failed: what is on the page stays, a sentence says what happened, and the request is repeated.

import { read, refresh } from "./address.js";

const NO_ANSWER = "The service does not answer. What you see stays, and the page tries again by itself.";
const MAX_DELAY_S = 15;
const waiting = new Set();
let attempts = 0;
let timer = null;

/** Show the sentence of a problem in its slot; "" removes it. */
export function say(slot, sentence) {
  const place = document.getElementById(`problem-${slot}`) || document.getElementById("problem-address");
  if (place && place.textContent !== sentence) place.textContent = sentence;
}

/** Return the sentence of an answer that failed. */
export function sentenceOf(content) {
  try {
    const parsed = JSON.parse(content);
    return parsed.error?.message || "";
  } catch {
    const page = new DOMParser().parseFromString(content, "text/html");
    return (page.querySelector("[role=alert]") || page.body).textContent.trim().replace(/\s+/g, " ").slice(0, 500);
  }
}

function report({ status, content, again }) {
  const isSlots = content.includes("#problem-");
  if (isSlots) htmx.swap(document.getElementById("status"), content, { swapStyle: "none" });
  const isTemporary = status === 0 || status === 429 || status >= 500;
  if (!isTemporary) {
    if (!isSlots) say("address", sentenceOf(content) || "The request was refused.");
    return;
  }
  const said = document.getElementById("problem-gateway").firstChild?.textContent || "";
  say("gateway", (isSlots ? said : status === 0 ? NO_ANSWER : sentenceOf(content)) || NO_ANSWER);
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Try again now";
  button.addEventListener("click", retry);
  document.getElementById("problem-gateway").append(" ", button);
  waiting.add(again);
  attempts += 1;
  clearTimeout(timer);
  timer = setTimeout(retry, 1000 * Math.min(MAX_DELAY_S, 2 ** Math.min(attempts, 4)));
}

function retry() {
  clearTimeout(timer);
  const actions = [...waiting];
  waiting.clear();
  for (const action of actions) action();
}

document.addEventListener("orbithash:problem", (event) => report(event.detail));

document.addEventListener("orbithash:answer", () => {
  attempts = 0;
  waiting.clear();
  clearTimeout(timer);
});

// Parts that htmx loads: further tiles, counts, the heat map.
function failed(event) {
  const element = event.detail.elt;
  const { status = 0, responseText = "" } = event.detail.xhr || {};
  if (event.detail.xhr?.getResponseHeader("HX-Redirect")) return;
  if (element.closest("#view")) {
    say("row", status ? sentenceOf(responseText) : NO_ANSWER);
    return;
  }
  if (element.id === "counts" || element.id === "classes" || element.id === "months") {
    const hint = document.createElement("p");
    hint.className = "hint";
    hint.textContent = element.id === "counts" ? "" : "The counts are not available at the moment.";
    if (!element.querySelector("input:checked, svg")) element.replaceChildren(hint);
    return;
  }
  report({
    status,
    content: responseText,
    again: () => document.contains(element) && htmx.trigger(element, "orbithash:retry"),
  });
}

document.addEventListener("htmx:responseError", failed);
document.addEventListener("htmx:sendError", failed);
document.addEventListener("htmx:timeout", failed);
document.addEventListener("htmx:afterSwap", (event) => {
  if (event.detail.elt?.classList?.contains("tile") && !waiting.size) say("gateway", "");
});

// A page that was loaded without the gateway lacks its controls. It is loaded again when the gateway answers, not
// before, because its user may be typing.
async function loadAgain() {
  const response = await fetch(`/${location.search}`, { headers: { "HX-Request": "true" } }).catch(() => null);
  if (response && (response.ok || response.status === 401)) {
    sessionStorage.setItem("orbithash:typed", document.getElementById("q").value);
    location.reload();
    return;
  }
  report({ status: 0, content: "", again: loadAgain });
}

const line = document.getElementById("q");
const typed = sessionStorage.getItem("orbithash:typed");
const isDescribed = document.querySelector("main").dataset.described === "yes";
if (!isDescribed || document.getElementById("problem-gateway").textContent.trim()) {
  report({ status: 0, content: "", again: isDescribed ? () => refresh() : loadAgain });
} else if (typed !== null) {
  sessionStorage.removeItem("orbithash:typed");
  if (typed && typed !== (read().get("q") || "")) {
    line.value = typed;
    line.focus();
  }
}

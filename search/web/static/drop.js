// An image of the user's own: dropped, pasted or chosen. The server encodes it; its code is part of the address.

import { change, read } from "./address.js";
import { say, sentenceOf } from "./problems.js";

const MAX_BYTES = 10 * 2 ** 20;
const PREVIEWS = "orbithash:images";
const root = document.documentElement;
const input = document.getElementById("image");

async function searchFor(file) {
  if (/\.json$/i.test(file.name || "") || file.type === "application/json") return openDetector(file);
  if (!file.size) return say("image", "The file is empty. Choose a JPEG, a PNG or a GeoTIFF.");
  if (file.size > MAX_BYTES) {
    const size = (file.size / 2 ** 20).toFixed(0);
    return say("image", `The file has ${size} MiB; an image has at most 10 MiB. Cut out a smaller part of it.`);
  }
  say("image", "");
  root.classList.add("busy");
  try {
    const response = await fetch("/image", {
      method: "POST",
      body: file,
      headers: { "Content-Type": "application/octet-stream", Accept: "application/json" },
    });
    const content = await response.text();
    if (response.status === 401) return logIn();
    if (!response.ok) return say("image", sentenceOf(content) || "The image was refused.");
    const { code } = JSON.parse(content);
    await keepPreview(code, file);
    await change({ code, q: null, like: null, near: null, find: null, detector: null, min: null, radius: null });
  } catch {
    say("image", "The service does not answer, so the image was not sent. Try again in a few seconds.");
  } finally {
    root.classList.remove("busy");
  }
}

async function openDetector(file) {
  if (file.size > 2 ** 20) return say("detector", "This file is too large for a detector.");
  say("detector", "");
  try {
    const response = await fetch("/detector", {
      method: "POST",
      body: file,
      headers: { "Content-Type": "application/json", Accept: "application/json" },
    });
    const content = await response.text();
    if (response.status === 401) return logIn();
    if (!response.ok) return say("detector", sentenceOf(content) || "The detector was refused.");
    await change({ detector: JSON.parse(content).detector, find: null, min: null });
  } catch {
    say("detector", "The service does not answer. Try again in a few seconds.");
  }
}

function logIn() {
  location.assign(`/login?next=${encodeURIComponent(location.pathname + location.search)}`);
}

/** Keep a small picture of the image for this tab, so that a reload shows it again. */
async function keepPreview(code, file) {
  try {
    const bitmap = await createImageBitmap(file);
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 88;
    const side = Math.min(bitmap.width, bitmap.height);
    const [x, y] = [(bitmap.width - side) / 2, (bitmap.height - side) / 2];
    canvas.getContext("2d").drawImage(bitmap, x, y, side, side, 0, 0, 88, 88);
    const kept = JSON.parse(sessionStorage.getItem(PREVIEWS) || "[]").filter(([other]) => other !== code);
    kept.push([code, canvas.toDataURL("image/jpeg", 0.8)]);
    sessionStorage.setItem(PREVIEWS, JSON.stringify(kept.slice(-20)));
  } catch {
    // Browsers cannot draw a GeoTIFF; the search works without a preview.
  }
}

function drawPreview() {
  const picture = document.getElementById("own-image");
  if (!picture) return;
  const kept = new Map(JSON.parse(sessionStorage.getItem(PREVIEWS) || "[]"));
  const source = kept.get(read().get("code"));
  if (!source) return;
  picture.src = source;
  picture.hidden = false;
}

document.addEventListener("orbithash:answer", drawPreview);
drawPreview();

document.getElementById("detector-file")?.addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) openDetector(file);
  event.target.value = "";
});

if (input) {
  input.addEventListener("change", () => {
    if (input.files[0]) searchFor(input.files[0]);
    input.value = "";
  });
  // Files only: dragging text or a tile is something else.
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  let depth = 0;
  addEventListener("dragenter", (event) => {
    if (hasFiles(event) && ++depth === 1) root.classList.add("dragging");
  });
  addEventListener("dragleave", (event) => {
    if (hasFiles(event) && --depth === 0) root.classList.remove("dragging");
  });
  addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    depth = 0;
    root.classList.remove("dragging");
    if (!hasFiles(event)) return;
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) searchFor(file);
  });
  addEventListener("paste", (event) => {
    const [file] = event.clipboardData?.files || [];
    if (!file) return;
    event.preventDefault();
    searchFor(file);
  });
}

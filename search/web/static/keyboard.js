// The keyboard in the grid of tiles: one tile is in the order of Tab, arrows move it.

import { change, read } from "./address.js";
import { hide, mark, tileOf } from "./marks.js";
import { open } from "./dialog.js";

let current = null;
let place = 0;
let hadFocus = false;

function tiles() {
  return [...document.querySelectorAll(".tile")];
}

/** Make a tile the one that Tab reaches, and its buttons with it. */
function select(tile) {
  if (!tile) return;
  if (current && current !== tile && document.contains(current)) setTabs(current, -1);
  for (const other of document.querySelectorAll('.tile[tabindex="0"]')) if (other !== tile) setTabs(other, -1);
  current = tile;
  place = tiles().indexOf(tile);
  setTabs(tile, 0);
}

function setTabs(tile, value) {
  tile.tabIndex = value;
  for (const button of tile.querySelectorAll("button")) button.tabIndex = value;
}

function columns(all) {
  const top = all[0].offsetTop;
  const count = all.findIndex((tile) => tile.offsetTop > top);
  return count < 1 ? all.length : count;
}

function move(tile, key) {
  const all = tiles();
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(all), ArrowDown: columns(all) };
  const from = all.indexOf(tile);
  const to = key === "Home" ? 0 : key === "End" ? all.length - 1 : from + steps[key];
  const next = all[Math.max(0, Math.min(all.length - 1, to))];
  if (Math.abs(to - from) > 1 && (to < 0 || to >= all.length)) return;
  select(next);
  next.focus();
  next.scrollIntoView({ block: "nearest" });
}

/** Search for tiles like this one. Filters stay; the query and the marks go, and the Back button brings them back. */
export function moreLike(id) {
  change({
    like: id,
    q: null,
    code: null,
    near: null,
    good: null,
    bad: null,
    find: null,
    detector: null,
    min: null,
    radius: null,
  });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const isTyping = event.target.matches?.("input:not([type=checkbox], [type=range]), textarea, select");
  if (event.key === "Escape") {
    const menu = document.querySelector("details.menu[open]");
    if (menu) {
      menu.open = false;
      menu.querySelector("summary").focus();
    } else if (isTyping || !tileOf(event.target)) {
      (current && document.contains(current) ? current : tiles()[0])?.focus();
    } else if (read().size) {
      history.back();
    }
    return;
  }
  if (isTyping) return;
  if (event.key === "/") {
    event.preventDefault();
    const line = document.getElementById("q");
    line.focus();
    line.select();
    return;
  }
  if (event.key === "?") {
    document.getElementById("keys").showModal();
    return;
  }
  const tile = tileOf(event.target);
  if (!tile) return;
  const { id } = tile.dataset;
  const isTile = event.target === tile;
  if (["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) {
    event.preventDefault();
    move(tile, event.key);
  } else if (event.key === "Enter" && isTile) {
    event.preventDefault();
    moreLike(id);
  } else if (event.key === "+" || event.key === "=") {
    mark([id], "good");
  } else if (event.key === "-" || event.key === "−") {
    mark([id], "bad");
  } else if (event.key === "0") {
    mark([id], "");
  } else if (event.key === "h") {
    hide(id);
  } else if (event.key === "v") {
    open(id);
  }
});

document.addEventListener("focusin", (event) => {
  const tile = tileOf(event.target);
  hadFocus = Boolean(tile);
  if (!tile) return;
  select(tile);
  document.dispatchEvent(new CustomEvent("orbithash:hover", { detail: { id: tile.dataset.id } }));
});

document.addEventListener("click", (event) => {
  const like = event.target.closest?.("[data-like]");
  if (like) {
    like.closest("dialog")?.close();
    moreLike(like.dataset.like);
    return;
  }
  const picture = event.target.closest?.(".tile a.picture");
  if (picture && !event.ctrlKey && !event.metaKey && !event.shiftKey && event.button === 0) {
    event.preventDefault();
    moreLike(tileOf(picture).dataset.id);
  }
  const look = event.target.closest?.(".tile button.look");
  if (look) open(tileOf(look).dataset.id);
});

// The focus stays in the grid when the answer changes: at the same tile, else at the same place.
document.addEventListener("orbithash:answer", () => {
  const all = tiles();
  const same = current && document.getElementById(current.id);
  const next = same || all[Math.min(place, all.length - 1)] || null;
  select(next);
  if (hadFocus && next && (document.activeElement === document.body || document.activeElement === null)) {
    next.focus({ preventScroll: true });
  }
});

// Hover in the grid lights up the map, and the other way round.
document.addEventListener("pointerover", (event) => {
  const tile = tileOf(event.target);
  const from = tileOf(event.relatedTarget);
  if (tile !== from) {
    document.dispatchEvent(new CustomEvent("orbithash:hover", { detail: { id: tile?.dataset.id ?? null } }));
  }
});

document.addEventListener("orbithash:hover", (event) => {
  for (const lit of document.querySelectorAll(".tile.lit")) lit.classList.remove("lit");
  if (event.detail.id !== null) document.getElementById(`tile-${event.detail.id}`)?.classList.add("lit");
});

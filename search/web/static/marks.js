// Good and bad marks: by buttons, by keys, by Shift and a click for a range, and by dragging over tiles.

import { change, ids } from "./address.js";
import { say } from "./problems.js";

const MAX_MARKS = 300;
// Marks that follow each other quickly change the answer once.
const PAUSE_MS = 350;
let timer = null;
// Id of the tile that was marked last: the answer that follows has other elements.
let last = "";
let brush = null;

export function tileOf(element) {
  return element?.closest?.(".tile") || null;
}

/** Mark rows: "good", "bad", or "" to remove their marks. The answer follows after a short pause. */
export function mark(rows, kind) {
  const good = ids("good").filter((id) => !rows.includes(id));
  const bad = ids("bad").filter((id) => !rows.includes(id));
  if (kind === "good") good.push(...rows);
  if (kind === "bad") bad.push(...rows);
  if (Math.max(good.length, bad.length) > MAX_MARKS) {
    say("marks", `At most ${MAX_MARKS} tiles can be marked good, and as many bad. Remove some marks first.`);
    return;
  }
  say("marks", "");
  for (const row of rows) draw(row, kind);
  change({ good: good.join(","), bad: bad.join(",") }, { answer: false });
  document.dispatchEvent(new CustomEvent("orbithash:mark", { detail: { ids: rows, mark: kind } }));
  clearTimeout(timer);
  timer = setTimeout(() => change({}, { keepScroll: isShort() }), PAUSE_MS);
}

/** Hide a row: "not this one". The other tiles stay where they are. */
export function hide(id) {
  const hidden = ids("hide").filter((other) => other !== id);
  if (hidden.length >= MAX_MARKS) {
    say("marks", `At most ${MAX_MARKS} tiles can be hidden. Show the hidden ones again, or use an expression.`);
    return;
  }
  const tile = document.getElementById(`tile-${id}`);
  const next = tile?.nextElementSibling?.matches(".tile") ? tile.nextElementSibling : tile?.previousElementSibling;
  const hadFocus = tile?.contains(document.activeElement);
  change({ hide: [...hidden, id].join(",") }, { answer: false });
  tile?.remove();
  if (hadFocus) next?.focus();
  const strip = document.getElementById("strip");
  let button = strip.querySelector('[data-remove="hide"]');
  if (!button) {
    button = document.createElement("button");
    button.type = "button";
    button.className = "quiet";
    button.dataset.remove = "hide";
    strip.append(button);
  }
  button.textContent = `${hidden.length + 1} hidden: show again`;
  strip.hidden = false;
}

function isShort() {
  return document.querySelectorAll(".tile").length <= 60;
}

function draw(id, kind) {
  const tile = document.getElementById(`tile-${id}`);
  if (!tile) return;
  tile.dataset.mark = kind;
  for (const button of tile.querySelectorAll("button.mark")) {
    button.setAttribute("aria-pressed", String(button.dataset.mark === kind));
  }
}

function between(one, other) {
  const tiles = [...document.querySelectorAll(".tile")];
  const [from, to] = [tiles.indexOf(one), tiles.indexOf(other)].sort((a, b) => a - b);
  return from < 0 ? [other] : tiles.slice(from, to + 1);
}

document.addEventListener("click", (event) => {
  const unwanted = event.target.closest?.(".tile button.hide");
  if (unwanted) hide(tileOf(unwanted).dataset.id);
  const unmark = event.target.closest?.("[data-unmark]");
  if (unmark) mark([unmark.dataset.unmark], "");
  const button = event.target.closest?.(".tile button.mark");
  if (!button || brush?.moved) return;
  const tile = tileOf(button);
  const begin = document.getElementById(last);
  if (event.shiftKey && begin) {
    mark(
      between(begin, tile).map((each) => each.dataset.id),
      button.dataset.mark,
    );
  } else {
    mark([tile.dataset.id], tile.dataset.mark === button.dataset.mark ? "" : button.dataset.mark);
  }
  last = tile.id;
});

// Brush: press a + or a −, drag over tiles, release.
document.addEventListener("pointerdown", (event) => {
  const button = event.target.closest?.(".tile button.mark");
  brush = null;
  if (!button || event.button !== 0 || event.shiftKey || event.pointerType === "touch") return;
  brush = { kind: button.dataset.mark, tiles: new Set([tileOf(button)]), moved: false };
});

document.addEventListener("pointermove", (event) => {
  if (!brush) return;
  const tile = tileOf(document.elementFromPoint(event.clientX, event.clientY));
  if (!tile || brush.tiles.has(tile)) return;
  brush.moved = true;
  brush.tiles.add(tile);
  document.documentElement.classList.add("brushing");
  for (const each of brush.tiles) each.dataset.mark = brush.kind;
});

document.addEventListener("pointerup", () => {
  document.documentElement.classList.remove("brushing");
  if (!brush?.moved) return;
  mark(
    [...brush.tiles].map((tile) => tile.dataset.id),
    brush.kind,
  );
  // The click that follows a drag within one tile does not mark again.
  setTimeout(() => {
    brush = null;
  }, 0);
});

document.addEventListener("dragstart", (event) => tileOf(event.target) && event.preventDefault());

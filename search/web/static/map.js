// The map: where the tiles of the answer lie. It reads the tiles of the grid and the address, and needs no internet.

import { change, read } from "./address.js";
import { open } from "./dialog.js";
import { moreLike } from "./keyboard.js";
import { mark } from "./marks.js";
import { Tiles, beside, coast, project, unwrapped } from "./map_tiles.js";
import { Tools } from "./map_tools.js";

const panel = document.getElementById("map-panel");
const target = document.getElementById("map");
const card = document.getElementById("map-card");
const message = document.getElementById("map-message");

// Parameters that decide which part of the Earth an answer is about; others leave the view where it is.
const VIEW_PARAMETERS = ["q", "like", "code", "near", "label", "from", "to", "area", "filter", "sort", "seed", "find"];
// A click this far from the nearest tile asks before it searches, in pixels.
const FAR = 120;
// Degrees between two lines of the grid.
const GRID_STEPS = [90, 45, 30, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001];

// Colours come from the style sheet, which follows the wish of the system.
let palette = null;
function colours() {
  if (palette) return palette;
  const probe = document.createElement("i");
  panel.append(probe);
  palette = {};
  for (const name of ["accent", "good", "bad", "ground", "ink-2", "map-land", "map-coast", "map-grid"]) {
    probe.style.color = `var(--${name})`;
    palette[name] = getComputedStyle(probe).color;
  }
  probe.remove();
  return palette;
}

const stroke = (color, width, lineDash) => new ol.style.Stroke({ color, width, lineDash });
const fill = (color) => new ol.style.Fill({ color });

export const tiles = new Tiles(colours);
const asked = new ol.source.Vector();
const land = new ol.layer.Vector({
  source: new ol.source.Vector({ url: target.dataset.land, format: new ol.format.TopoJSON({ layers: ["land"] }) }),
  style: () => new ol.style.Style({ fill: fill(colours()["map-land"]), stroke: stroke(colours()["map-coast"], 1) }),
  // A base map shows the coast better.
  visible: !target.dataset.baseMap,
});
land.getSource().on("featuresloadend", ({ features }) => {
  for (const feature of features) {
    const geometry = feature.getGeometry();
    const polygons = geometry.getType() === "MultiPolygon" ? geometry.getCoordinates() : [geometry.getCoordinates()];
    feature.setGeometry(new ol.geom.MultiPolygon(polygons.map((rings) => rings.map(coast))));
  }
});
const area = new ol.layer.Vector({
  source: asked,
  style: (feature) =>
    feature.getGeometry() instanceof ol.geom.Point
      ? new ol.style.Style({
          image: new ol.style.RegularShape({
            points: 4,
            radius: 10,
            radius2: 0,
            stroke: stroke(colours().accent, 2.5),
          }),
        })
      : [
          new ol.style.Style({ stroke: stroke(colours().ground, 4) }),
          new ol.style.Style({ stroke: stroke(colours().accent, 2, [8, 5]) }),
        ],
});

function graticule() {
  const label = (textAlign, textBaseline) =>
    new ol.style.Text({
      font: "11px system-ui, sans-serif",
      textAlign,
      textBaseline,
      fill: fill(colours()["ink-2"]),
      stroke: stroke(colours().ground, 3),
    });
  return new ol.layer.Graticule({
    strokeStyle: stroke(colours()["map-grid"], 1),
    showLabels: true,
    wrapX: true,
    targetSize: 120,
    intervals: GRID_STEPS,
    lonLabelStyle: label("center", "bottom"),
    latLabelStyle: label("end", "middle"),
    lonLabelFormatter: (lon) => degrees(lon, "E", "W"),
    latLabelFormatter: (lat) => degrees(lat, "N", "S"),
    lonLabelPosition: 0.02,
  });
}

function degrees(value, positive, negative) {
  const rounded = Math.round(Math.abs(value) * 10000) / 10000;
  return rounded ? `${rounded}° ${value > 0 ? positive : negative}` : "0°";
}

let grid = graticule();
export const map = new ol.Map({
  target,
  layers: [
    ...(target.dataset.baseMap ? [new ol.layer.Tile({ source: new ol.source.XYZ({ url: target.dataset.baseMap }) })] : []),
    land,
    grid,
    ...tiles.layers,
    area,
  ],
  controls: [
    new ol.control.Zoom({ zoomInTipLabel: "Zoom in", zoomOutTipLabel: "Zoom out" }),
    new ol.control.ScaleLine({ minWidth: 60 }),
  ],
  interactions: ol.interaction.defaults.defaults({ altShiftDragRotate: false, pinchRotate: false }),
  view: new ol.View({ center: [0, 0], zoom: 1, minZoom: 0, maxZoom: 20, enableRotation: false, multiWorld: true }),
});
const tip = new ol.Overlay({ element: card, positioning: "bottom-center", offset: [0, -10], stopEvent: true });
map.addOverlay(tip);

// Fit: when another part of the Earth is asked for, as soon as the map is visible.

let viewKey = null;
let isFitDue = false;

function fit() {
  const [width, height] = map.getSize() || [0, 0];
  isFitDue = !(width && height);
  if (isFitDue) return;
  let extent = tiles.extent();
  for (const feature of asked.getFeatures()) {
    const part = feature.getGeometry().getExtent().slice();
    if (!extent) {
      extent = part;
      continue;
    }
    const shift = beside(part[0], extent[0]) - part[0];
    ol.extent.extend(extent, [part[0] + shift, part[1], part[2] + shift, part[3]]);
  }
  if (!extent) return;
  map.getView().fit(extent, { padding: [24, 24, 32, 24], maxZoom: 17 });
}

map.on("change:size", () => isFitDue && fit());

/** Draw the area and the place of the address. */
function drawAsked() {
  const parameters = read();
  asked.clear(true);
  const ring = tools.parseArea(parameters.get("area"));
  if (ring.length > 2) {
    // The edges are straight in longitude and latitude, so on the map they are curves.
    const path = unwrapped([...ring, ring[0]]).flatMap(([lon, lat], index, all) => {
      if (!index) return [[lon, lat]];
      const [fromLon, fromLat] = all[index - 1];
      return Array.from({ length: 16 }, (_, step) => {
        const share = (step + 1) / 16;
        return [fromLon + (lon - fromLon) * share, fromLat + (lat - fromLat) * share];
      });
    });
    asked.addFeature(new ol.Feature(new ol.geom.Polygon([path.map(project)])));
  }
  const near = (parameters.get("near") || "").split(",").map(Number);
  if (near.length === 2 && near.every(Number.isFinite)) asked.addFeature(new ol.Feature(new ol.geom.Point(project(near))));
  asked.changed();
  document.getElementById("map-clear").hidden = !ring.length;
}

/** Make the map show the tiles of the grid and the address. */
function update() {
  const hasChanged = tiles.read();
  const parameters = read();
  if (!hasChanged) return;
  const key = JSON.stringify(VIEW_PARAMETERS.map((name) => parameters.getAll(name)));
  const { numWithout } = tiles;
  say(numWithout ? `${numWithout.toLocaleString("en")} of the tiles shown have no place.` : "");
  const shown = card.dataset.id;
  if (shown && !tiles.byId.has(shown)) closeCard();
  if (key !== viewKey) {
    viewKey = key;
    fit();
  }
}

// New answers, further parts and hidden tiles all change the elements of the grid.
let isUpdateDue = false;
new MutationObserver(() => {
  if (isUpdateDue) return;
  isUpdateDue = true;
  requestAnimationFrame(() => {
    isUpdateDue = false;
    update();
  });
}).observe(document.querySelector(".left"), { childList: true, subtree: true });

document.addEventListener("orbithash:address", drawAsked);
document.addEventListener("orbithash:mark", () => tiles.redraw());
document.addEventListener("orbithash:hover", (event) => {
  tiles.light(event.detail.id === null ? null : String(event.detail.id));
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  palette = null;
  map.removeLayer(grid);
  grid = graticule();
  map.getLayers().insertAt(map.getLayers().getLength() - 3, grid);
  tiles.redraw();
  land.changed();
  area.changed();
});

function say(sentence) {
  if (message.textContent !== sentence) message.textContent = sentence;
}

/** Return the tile under a pixel, within a few pixels of a dot. */
function tileAt(pixel, tolerance = 9) {
  return tiles.at(map.getCoordinateFromPixel(pixel), tolerance * map.getView().getResolution());
}

// The pointer.

let hovered = null;
map.on("pointermove", (event) => {
  if (event.dragging || tools.active) return;
  const place = tileAt(event.pixel);
  target.style.cursor = place ? "pointer" : "";
  if ((place?.id ?? null) === hovered) return;
  hovered = place?.id ?? null;
  document.dispatchEvent(new CustomEvent("orbithash:hover", { detail: { id: hovered } }));
});

target.addEventListener("pointerleave", () => {
  if (hovered === null) return;
  hovered = null;
  document.dispatchEvent(new CustomEvent("orbithash:hover", { detail: { id: null } }));
});

map.on("singleclick", (event) => {
  if (tools.active) return;
  const place = tileAt(event.pixel);
  if (place) select(place);
  else likeAt(ol.proj.toLonLat(event.coordinate), event.coordinate);
});

/** Show a card with a tile, and light it up in the grid. */
function select(place) {
  const { element, id } = place;
  document.dispatchEvent(new CustomEvent("orbithash:hover", { detail: { id } }));
  element.scrollIntoView({ block: "nearest" });
  const picture = pictureOf(element.querySelector(".picture img")?.src);
  showCard([place.centre[0], place.extent[3]], id, element.getAttribute("aria-label"), picture, [
    ["More like this", () => moreLike(id)],
    ["View", () => open(id)],
    ["+", () => mark([id], element.dataset.mark === "good" ? "" : "good"), "Good example"],
    ["−", () => mark([id], element.dataset.mark === "bad" ? "" : "bad"), "Bad example"],
  ]);
}

function pictureOf(src) {
  return src ? Object.assign(new Image(64, 64), { src, alt: "" }) : null;
}

function showCard(position, id, title, picture, actions) {
  const heading = document.createElement("p");
  heading.textContent = title;
  const buttons = document.createElement("div");
  for (const [text, act, label] of actions) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    if (label) {
      button.setAttribute("aria-label", label);
      button.title = label;
    }
    button.addEventListener("click", act);
    buttons.append(button);
  }
  const close = document.createElement("button");
  close.type = "button";
  close.className = "quiet";
  close.textContent = "×";
  close.setAttribute("aria-label", "Close");
  close.addEventListener("click", closeCard);
  card.replaceChildren(...[close, picture, heading, buttons].filter(Boolean));
  card.dataset.id = id;
  card.hidden = false;
  tip.setPosition(position);
  tip.panIntoView({ margin: 8 });
}

function closeCard() {
  card.hidden = true;
  card.dataset.id = "";
  tip.setPosition(undefined);
}

/** Search for more like the tile nearest to an empty place. */
async function likeAt([lon, lat], coordinate) {
  closeCard();
  say("Looking for the nearest tile …");
  const parameters = read();
  parameters.set("lon", lon.toFixed(7));
  parameters.set("lat", lat.toFixed(7));
  try {
    const response = await fetch(`/at?${parameters}`, { headers: { Accept: "application/json" } });
    const found = await response.json();
    if (!response.ok) {
      say(found.error.message);
      return;
    }
    const { name, distance } = found;
    const metresPerPixel = map.getView().getResolution() * Math.cos((lat * Math.PI) / 180);
    if (found.distance_m <= FAR * metresPerPixel) {
      moreLike(found.id);
      say(`More like ${name}, ${distance} from where you clicked.`);
      return;
    }
    say("");
    showCard(coordinate, "", `The nearest tile, ${name}, is ${distance} from here.`, pictureOf(found.picture), [
      ["More like it", () => (closeCard(), moreLike(found.id))],
      ["Nearest to here", () => (closeCard(), nearestTo(lon, lat))],
    ]);
  } catch {
    say("The service does not answer. Try again.");
  }
}

function nearestTo(lon, lat) {
  change({ near: `${lon.toFixed(6)},${lat.toFixed(6)}`, q: null, like: null, code: null, good: null, bad: null, find: null, detector: null });
}

document.getElementById("map-fit").addEventListener("click", fit);
panel.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || (card.hidden && !tools.active)) return;
  event.stopPropagation();
  closeCard();
  tools.stop();
});

const tools = new Tools({ map, tiles, tileAt, say, colours });
drawAsked();
update();

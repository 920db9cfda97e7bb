// The map: where the tiles lie. It reads the tiles of the grid and changes the address; it works without internet.

import { change, read } from "./address.js";
import { open } from "./dialog.js";
import { moreLike } from "./keyboard.js";
import { mark } from "./marks.js";

const MAX_CORNERS = 200;
// Smaller tiles are drawn as a dot, in pixels.
const MIN_SIDE = 8;
// Distance at which a dot is hit, in pixels.
const NEAR_PX = 6;
const place = document.getElementById("map");
const popup = document.getElementById("map-popup");
const toLonLat = (point) => ol.proj.toLonLat(point).map((degrees) => Number(degrees.toFixed(6)));

let lit = null;
let colours = {};

function readColours() {
  const style = getComputedStyle(document.documentElement);
  // The values are light-dark(...), which only the browser can resolve.
  const probe = document.createElement("span");
  document.body.append(probe);
  for (const name of ["accent", "good", "bad", "line", "ink-2", "panel", "panel-2", "ground"]) {
    probe.style.color = style.getPropertyValue(`--${name}`);
    colours[name] = getComputedStyle(probe).color;
  }
  probe.remove();
}

// Tiles.

const tiles = new ol.source.Vector();

function corners(element) {
  const ring = (element.dataset.ring || "").split(" ").filter(Boolean);
  return ring.map((corner) => corner.split(",").map(Number));
}

/** Return the ring with longitudes that do not jump at 180 degrees. */
function unwrapped(ring) {
  let [last] = ring[0];
  return ring.map(([lon, lat]) => {
    last += ((((lon - last + 180) % 360) + 360) % 360) - 180;
    return [last, lat];
  });
}

function featureOf(element) {
  const { id, lon, lat } = element.dataset;
  const ring = corners(element);
  let geometry = null;
  if (ring.length > 2) {
    const way = unwrapped(ring).map((corner) => ol.proj.fromLonLat(corner));
    geometry = new ol.geom.Polygon([[...way, way[0]]]);
  } else if (lon && lat) {
    geometry = new ol.geom.Point(ol.proj.fromLonLat([Number(lon), Number(lat)]));
  }
  if (!geometry) return null;
  const feature = new ol.Feature(geometry);
  feature.setId(id);
  return feature;
}

function tileOf(feature) {
  return document.getElementById(`tile-${feature.getId()}`);
}

/** Draw the thumbnail of a tile into its outline, whose upper left corner is the north-western one. */
function drawPicture(coordinates, state) {
  const image = tileOf(state.feature)?.querySelector("img");
  const ring = coordinates[0].slice(0, -1);
  if (!image?.complete || !image.naturalWidth || ring.length !== 4) return;
  const least = (value) => ring.reduce((best, corner) => (value(corner) < value(best) ? corner : best));
  const [left, right, below] = [
    least(([x, y]) => x + y),
    least(([x, y]) => y - x),
    least(([x, y]) => x - y),
  ];
  const { context } = state;
  context.save();
  context.transform(
    (right[0] - left[0]) / image.naturalWidth,
    (right[1] - left[1]) / image.naturalWidth,
    (below[0] - left[0]) / image.naturalHeight,
    (below[1] - left[1]) / image.naturalHeight,
    left[0],
    left[1],
  );
  context.drawImage(image, 0, 0);
  context.restore();
}

const picture = new ol.style.Style({ renderer: drawPicture });

function styleOf(feature, resolution) {
  const geometry = feature.getGeometry();
  const kind = tileOf(feature)?.dataset.mark;
  const isLit = feature.getId() === lit;
  const colour = colours[kind || "accent"];
  const width = isLit ? 4 : kind ? 3 : 1.5;
  const zIndex = isLit ? 2 : kind ? 1 : 0;
  const extent = geometry.getExtent();
  const side = Math.max(extent[2] - extent[0], extent[3] - extent[1]) / resolution;
  if (geometry.getType() === "Point" || side < MIN_SIDE) {
    const circle = new ol.style.Circle({
      radius: isLit ? 7 : 4.5,
      fill: new ol.style.Fill({ color: colour }),
      stroke: new ol.style.Stroke({ color: colours.ground, width: 1.5 }),
    });
    return new ol.style.Style({ image: circle, geometry: new ol.geom.Point(ol.extent.getCenter(extent)), zIndex });
  }
  const outline = new ol.style.Style({
    stroke: new ol.style.Stroke({ color: colour, width }),
    // Transparent, so that the inside is hit too.
    fill: new ol.style.Fill({ color: "rgba(0, 0, 0, 0.01)" }),
    zIndex,
  });
  return [picture, outline];
}

const tileLayer = new ol.layer.Vector({ source: tiles, style: styleOf, zIndex: 3, updateWhileAnimating: true });

// The area.

const areas = new ol.source.Vector();
const areaLayer = new ol.layer.Vector({ source: areas, zIndex: 2 });

function drawArea() {
  areas.clear();
  const ring = (read().get("area") || "")
    .split(",")
    .map((corner) => corner.trim().split(/\s+/).map(Number))
    .filter((corner) => corner.length === 2 && corner.every(Number.isFinite));
  if (ring.length < 3) return;
  const way = unwrapped(ring).map((corner) => ol.proj.fromLonLat(corner));
  areas.addFeature(new ol.Feature(new ol.geom.Polygon([[...way, way[0]]])));
}

function setArea(ring) {
  const text = ring.map(([lon, lat]) => `${wrapped(lon)} ${Math.max(-90, Math.min(90, lat))}`).join(",");
  document.dispatchEvent(new CustomEvent("orbithash:area", { detail: { ring } }));
  change({ area: text });
}

function wrapped(lon) {
  return Number((lon >= -180 && lon <= 180 ? lon : ((((lon + 180) % 360) + 360) % 360) - 180).toFixed(6));
}

// The ground: coastlines, a graticule, and a base map where the operator has configured one.

const land = new ol.layer.Vector({
  source: new ol.source.Vector({ url: place.dataset.land, format: new ol.format.TopoJSON() }),
  zIndex: 0,
});
const graticule = new ol.layer.Graticule({ showLabels: false, wrapX: true, zIndex: 1 });
const layers = [land, graticule, areaLayer, tileLayer];
if (place.dataset.baseMap) {
  layers.unshift(new ol.layer.Tile({ source: new ol.source.XYZ({ url: place.dataset.baseMap }), zIndex: 0 }));
  land.setVisible(false);
}

function paint() {
  readColours();
  const stroke = new ol.style.Stroke({ color: colours.line, width: 1 });
  land.setStyle(new ol.style.Style({ fill: new ol.style.Fill({ color: colours["panel-2"] }), stroke }));
  areaLayer.setStyle(
    new ol.style.Style({ stroke: new ol.style.Stroke({ color: colours.accent, width: 2, lineDash: [6, 5] }) }),
  );
  tileLayer.changed();
}

const map = new ol.Map({
  target: place,
  layers,
  controls: ol.control.defaults.defaults({ rotate: false, attribution: false }).extend([new ol.control.ScaleLine()]),
  interactions: ol.interaction.defaults.defaults({ altShiftDragRotate: false, pinchRotate: false }),
  view: new ol.View({ center: [0, 0], zoom: 1, maxZoom: 20 }),
});
new ResizeObserver(() => map.updateSize()).observe(place);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

// Follow the grid.

let planned = 0;
let shouldFit = true;

function follow() {
  planned = 0;
  const there = new Set();
  const fresh = [];
  for (const element of document.querySelectorAll(".tile")) {
    there.add(element.dataset.id);
    if (tiles.getFeatureById(element.dataset.id)) continue;
    const feature = featureOf(element);
    if (feature) fresh.push(feature);
  }
  for (const feature of tiles.getFeatures()) if (!there.has(feature.getId())) tiles.removeFeature(feature);
  tiles.addFeatures(fresh);
  tileLayer.changed();
  document.getElementById("map-empty").hidden = tiles.getFeatures().length > 0;
  if (shouldFit) fit();
}

function fit() {
  const extent = tiles.isEmpty() ? areas.getExtent() : tiles.getExtent();
  if (tiles.isEmpty() && areas.isEmpty()) return;
  if (!map.getSize() || !map.getSize()[0]) return;
  shouldFit = false;
  map.getView().fit(extent, { padding: [56, 40, 40, 40], maxZoom: 17 });
}

function plan() {
  planned ||= requestAnimationFrame(follow);
}

new MutationObserver(plan).observe(document.querySelector(".left"), {
  childList: true,
  subtree: true,
  attributes: true,
  attributeFilter: ["data-mark"],
});
document.addEventListener("orbithash:answer", () => {
  shouldFit = true;
  popup.hidden = true;
  drawArea();
  plan();
});
document.addEventListener("orbithash:address", drawArea);
map.on("change:size", () => shouldFit && fit());

// Hover, both ways.

function light(id) {
  if (id === lit) return;
  lit = id;
  tileLayer.changed();
}

document.addEventListener("orbithash:hover", (event) => light(event.detail.id));

map.on("pointermove", (event) => {
  if (event.dragging) return;
  const feature = featureAt(event.coordinate);
  place.classList.toggle("pointing", Boolean(feature));
  const id = feature ? feature.getId() : null;
  if (id !== lit) document.dispatchEvent(new CustomEvent("orbithash:hover", { detail: { id } }));
});

/** Return the tile at a place, or a dot near it. Without reading pixels back, which browsers warn about. */
function featureAt(coordinate) {
  const inside = tiles.getFeaturesAtCoordinate(coordinate);
  if (inside.length) return inside[inside.length - 1];
  const closest = tiles.getClosestFeatureToCoordinate(coordinate);
  if (!closest) return null;
  const [x, y] = closest.getGeometry().getClosestPoint(coordinate);
  const distance = Math.hypot(x - coordinate[0], y - coordinate[1]);
  return distance <= NEAR_PX * map.getView().getResolution() ? closest : null;
}

// A click says what is there, and offers what can be done with it.

const overlay = new ol.Overlay({ element: popup, positioning: "bottom-center", offset: [0, -8], autoPan: { margin: 12 } });
map.addOverlay(overlay);
let request = null;

function offer(coordinate, { id, name, source, distance }) {
  const [lon, lat] = toLonLat(coordinate);
  popup.dataset.id = id ?? "";
  popup.dataset.place = `${wrapped(lon)},${lat}`;
  popup.querySelector("img").hidden = !source;
  if (source) popup.querySelector("img").src = source;
  popup.querySelector(".popup-name").textContent = name;
  popup.querySelector(".popup-distance").textContent = distance;
  for (const button of popup.querySelectorAll("[data-needs-tile]")) button.hidden = id === null;
  popup.hidden = false;
  overlay.setPosition(coordinate);
}

map.on("singleclick", async (event) => {
  if (mode !== "move") return;
  const feature = featureAt(event.coordinate);
  if (feature) {
    const tile = tileOf(feature);
    const name = tile.querySelector(".label").textContent;
    offer(event.coordinate, { id: feature.getId(), name, source: tile.querySelector("img")?.src, distance: "" });
    return;
  }
  const [lon, lat] = toLonLat(event.coordinate);
  request?.abort();
  request = new AbortController();
  try {
    const response = await fetch(`/at?lon=${wrapped(lon)}&lat=${lat}`, {
      headers: { Accept: "application/json" },
      signal: request.signal,
    });
    const found = await response.json();
    if (!response.ok) throw new Error(found.error?.message || "The service does not answer.");
    const none = { id: null, name: "No tile has a place.", source: "", distance: "" };
    offer(
      event.coordinate,
      found.id === null
        ? none
        : { id: found.id, name: found.name, source: found.picture, distance: `Nearest tile, ${found.distance} away` },
    );
  } catch (error) {
    if (error.name === "AbortError") return;
    offer(event.coordinate, { id: null, name: "The service does not answer. Try again.", source: "", distance: "" });
  }
});

popup.addEventListener("click", (event) => {
  const { action } = event.target.closest("button")?.dataset || {};
  if (!action) return;
  const { id, place: where } = popup.dataset;
  popup.hidden = true;
  if (action === "like") moreLike(id);
  if (action === "view") open(id);
  if (action === "near") {
    change({ near: where, q: null, like: null, code: null, good: null, bad: null, find: null, detector: null, sort: null });
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (!popup.hidden) popup.hidden = true;
  if (mode !== "move") setMode("move");
});

// Ways to use the pointer: move, draw an area, mark the tiles in a box.

let mode = "move";
let interaction = null;

function setMode(next) {
  if (interaction) map.removeInteraction(interaction);
  interaction = null;
  mode = next;
  for (const button of document.querySelectorAll("#map-tools [data-mode]")) {
    button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
  }
  place.classList.toggle("drawing", mode !== "move");
  if (mode === "polygon") {
    interaction = new ol.interaction.Draw({ type: "Polygon", maxPoints: MAX_CORNERS });
    interaction.on("drawend", (event) => finish(event.feature.getGeometry().getCoordinates()[0].slice(0, -1)));
  } else if (mode !== "move") {
    interaction = new ol.interaction.DragBox();
    interaction.on("boxend", () => {
      const extent = interaction.getGeometry().getExtent();
      if (mode === "box") finish(boxOf(extent));
      else markIn(extent, mode);
    });
  }
  if (interaction) map.addInteraction(interaction);
}

function boxOf([west, south, east, north]) {
  return [
    [west, south],
    [east, south],
    [east, north],
    [west, north],
  ];
}

function finish(points) {
  // After the events of this drawing, which the interaction still handles.
  setTimeout(() => setMode("move"), 0);
  setArea(points.map((point) => ol.proj.toLonLat(point)));
}

function markIn(extent, kind) {
  const rows = tiles.getFeaturesInExtent(extent).filter((feature) => feature.getGeometry().intersectsExtent(extent));
  if (rows.length) {
    mark(
      rows.map((feature) => feature.getId()),
      kind,
    );
  }
}

document.getElementById("map-tools").addEventListener("click", (event) => {
  const { mode: next, view } = event.target.closest("button")?.dataset || {};
  if (next) setMode(next === mode ? "move" : next);
  if (view === "area") {
    const [west, south, east, north] = map.getView().calculateExtent();
    const world = ol.proj.get("EPSG:3857").getExtent();
    const width = world[2] - world[0];
    // A view of the whole Earth is no limit.
    if (east - west >= width) change({ area: null });
    else setArea(boxOf([west, Math.max(south, world[1]), east, Math.min(north, world[3])]).map((p) => ol.proj.toLonLat(p)));
  }
  if (view === "fit") fit();
});

paint();
drawArea();
follow();

// The tools of the map: areas as a rectangle, a polygon or what is in view, and brushes that mark tiles.

import { change } from "./address.js";
import { mark } from "./marks.js";

const HINTS = {
  box: "Drag a rectangle on the map. Esc ends this.",
  polygon: "Click the corners of the area; a double click sets the last one. Esc ends this.",
  good: "Drag over tiles on the map to mark them good. Esc ends this.",
  bad: "Drag over tiles on the map to mark them bad. Esc ends this.",
};
// Pixels around the pointer that a brush marks.
const BRUSH = 9;
// Longitudes between two corners of an area: the service joins corners along the shorter way around the Earth.
const MAX_STEP = 90;

/** The tools, of which one at most is active. */
export class Tools {
  constructor({ map, tiles, tileAt, say, colours }) {
    Object.assign(this, { map, tiles, tileAt, say, colours });
    this.active = null;
    this.interaction = null;
    this.buttons = [...document.querySelectorAll("#map-panel [data-tool]")];
    for (const button of this.buttons) {
      button.addEventListener("click", () => this.start(button.dataset.tool));
    }
    document.getElementById("map-in-view").addEventListener("click", () => this.takeView());
    document.getElementById("map-clear").addEventListener("click", () => this.send(null));
  }

  /** Use a tool; the one that is used already is put away. */
  start(name) {
    const wasActive = this.active === name;
    this.stop();
    if (wasActive) return;
    this.active = name;
    this.interaction = name === "box" ? this.box() : name === "polygon" ? this.polygon() : this.brush(name);
    this.map.addInteraction(this.interaction);
    this.map.getTargetElement().style.cursor = "crosshair";
    this.show();
    this.say(HINTS[name]);
  }

  /** Put the tool away. */
  stop() {
    if (!this.active) return;
    this.map.removeInteraction(this.interaction);
    this.map.getTargetElement().style.cursor = "";
    this.active = this.interaction = null;
    this.show();
    this.say("");
  }

  show() {
    for (const button of this.buttons) button.setAttribute("aria-pressed", String(button.dataset.tool === this.active));
  }

  box() {
    const interaction = new ol.interaction.DragBox({
      className: "map-drag-box",
      condition: ol.events.condition.always,
      minArea: 16,
    });
    interaction.on("boxend", () => this.drawn(rectangle(interaction.getGeometry().getExtent())));
    return interaction;
  }

  polygon() {
    const { accent, ground } = this.colours();
    const interaction = new ol.interaction.Draw({
      type: "Polygon",
      stopClick: true,
      style: new ol.style.Style({
        stroke: new ol.style.Stroke({ color: accent, width: 2 }),
        image: new ol.style.Circle({
          radius: 5,
          fill: new ol.style.Fill({ color: accent }),
          stroke: new ol.style.Stroke({ color: ground, width: 1.5 }),
        }),
      }),
    });
    interaction.on("drawend", (event) => {
      const corners = event.feature.getGeometry().getCoordinates()[0].slice(0, -1);
      // The interaction still handles the click that ended the drawing.
      setTimeout(() => this.drawn(corners));
    });
    return interaction;
  }

  brush(kind) {
    let marked = new Set();
    const take = ({ pixel }) => {
      const place = this.tileAt(pixel, BRUSH);
      if (!place || marked.has(place.id)) return;
      marked.add(place.id);
      place.element.dataset.mark = kind;
      this.tiles.redraw();
    };
    return new ol.interaction.Pointer({
      handleDownEvent: (event) => {
        marked = new Set();
        take(event);
        return true;
      },
      handleDragEvent: take,
      handleUpEvent: () => {
        if (marked.size) mark([...marked], kind);
        return false;
      },
    });
  }

  takeView() {
    const extent = this.map.getView().calculateExtent(this.map.getSize());
    this.drawn(rectangle(extent));
  }

  drawn(corners) {
    this.stop();
    const ring = withShortEdges(corners).map((corner) => toDegrees(corner));
    const lons = ring.map(([lon]) => lon);
    if (Math.max(...lons) - Math.min(...lons) > 359) {
      this.say("An area is less than once around the Earth. Zoom in and try again.");
      return;
    }
    this.send(ring);
  }

  send(ring) {
    document.dispatchEvent(new CustomEvent("orbithash:area", { detail: { ring } }));
    change({ area: ring && ring.map(([lon, lat]) => `${trimmed(lon)} ${trimmed(lat)}`).join(",") });
  }

  /** Return the corners of an area as it is in the address; empty for anything else. */
  parseArea(text) {
    const ring = (text || "").split(",").map((pair) => pair.trim().split(/\s+/).map(Number));
    const isValid = ring.every(
      ([lon, lat, ...rest]) => !rest.length && Math.abs(lon) <= 540 && Math.abs(lat) <= 90,
    );
    return isValid ? ring : [];
  }
}

function toDegrees([x, y]) {
  // Unlike ol.proj.toLonLat, this keeps whole turns, so that neighbours stay neighbours.
  return ol.proj.transform([x, y], "EPSG:3857", "EPSG:4326");
}

function rectangle([west, south, east, north]) {
  return [
    [west, south],
    [east, south],
    [east, north],
    [west, north],
  ];
}

/** Return corners with further ones on wide edges, so that the shorter way around the Earth is the one that was drawn. */
function withShortEdges(corners) {
  return corners.flatMap((corner, index) => {
    const next = corners[(index + 1) % corners.length];
    const width = Math.abs(toDegrees(next)[0] - toDegrees(corner)[0]);
    const steps = Math.max(1, Math.ceil(width / MAX_STEP));
    return Array.from({ length: steps }, (_, step) =>
      [0, 1].map((axis) => corner[axis] + ((next[axis] - corner[axis]) * step) / steps),
    );
  });
}

function trimmed(degrees) {
  return String(Number(degrees.toFixed(6)));
}

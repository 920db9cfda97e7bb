// The tiles of the answer as shapes on the map, read from the elements of the grid; `ol` is global.

const WORLD = 2 * Math.PI * 6378137;
// In pixels of the screen: smaller tiles are dots, and larger ones show their picture.
const DOT_BELOW = 10;
const PICTURE_FROM = 12;
// An outline turns at its corners by more than this; other vertices follow a curve.
const CORNER_TURN = Math.PI / 9;

/** Return a place in the coordinates of the map (EPSG:3857). Beyond the latitudes of Mercator, it is at their edge. */
export function project([lon, lat]) {
  return ol.proj.fromLonLat([lon, Math.max(-85.05, Math.min(85.05, lat))]);
}

/** Return vertices with whole turns added to their longitudes, so that no edge takes the longer way around the Earth. */
export function unwrapped(vertices) {
  const path = [];
  let before = null;
  for (const [lon, lat] of vertices) {
    before = before === null ? lon : before + ((((lon - before + 180) % 360) + 360) % 360) - 180;
    path.push([before, lat]);
  }
  return path;
}

/** Return a ring of the coastline whose edges take the shorter way around the Earth; around a pole, with the pole. */
export function coast(ring) {
  const path = [];
  for (const [x, y] of ring) path.push([path.length ? beside(x, path[path.length - 1][0]) : x, y]);
  const [first, last] = [path[0], path[path.length - 1]];
  if (Math.abs(last[0] - first[0]) > WORLD / 2) {
    const pole = Math.sign(first[1]) * WORLD;
    path.push([last[0], pole], [first[0], pole], first);
  }
  return path;
}

/** Return x moved by whole turns of the Earth to less than half a turn from `centre`. */
export function beside(x, centre) {
  return x + WORLD * Math.round((centre - x) / WORLD);
}

function isPlace([lon, lat]) {
  return Number.isFinite(lon) && Number.isFinite(lat) && Math.abs(lon) <= 540 && Math.abs(lat) <= 90;
}

/** Return the place of a tile: {id, element, centre, ring, quad, extent}, or null if it has none. */
function placeOf(element) {
  const { id, lon, lat, ring: text } = element.dataset;
  const vertices = text ? text.split(" ").map((pair) => pair.split(",").map(Number)) : [];
  let ring = vertices.length > 2 && vertices.every(isPlace) ? unwrapped(vertices).map(project) : [];
  const given = lon !== "" && lat !== "" && isPlace([Number(lon), Number(lat)]);
  if (!ring.length && !given) return null;
  let extent = ol.extent.boundingExtent(ring.length ? ring : [project([Number(lon), Number(lat)])]);
  const centre = given ? project([Number(lon), Number(lat)]) : ol.extent.getCenter(extent);
  if (ring.length) {
    // The centre and the outline may be given on different sides of 180 degrees.
    const shift = beside(ol.extent.getCenter(extent)[0], centre[0]) - ol.extent.getCenter(extent)[0];
    ring = ring.map(([x, y]) => [x + shift, y]);
    extent = ol.extent.boundingExtent(ring);
  }
  return { id, element, centre, ring, quad: cornersOf(ring), extent };
}

/**
 * Return the corners of an image from its outline: upper left, lower left, lower right, upper right; null if there are
 * not four. The image is upright: its upper left corner is the one farthest to the north-west.
 */
export function cornersOf(ring) {
  if (ring.length < 4) return null;
  let corners = ring.filter((vertex, index) => {
    const before = ring[(index + ring.length - 1) % ring.length];
    const after = ring[(index + 1) % ring.length];
    const turn =
      Math.atan2(after[1] - vertex[1], after[0] - vertex[0]) - Math.atan2(vertex[1] - before[1], vertex[0] - before[0]);
    return Math.abs(Math.atan2(Math.sin(turn), Math.cos(turn))) > CORNER_TURN;
  });
  if (corners.length !== 4) return null;
  const area = corners.reduce((sum, [x, y], index) => {
    const [nextX, nextY] = corners[(index + 1) % 4];
    return sum + x * nextY - nextX * y;
  }, 0);
  if (area < 0) corners = corners.reverse();
  const towards = corners.map(([x, y]) => x - y);
  const first = towards.indexOf(Math.min(...towards));
  return [0, 1, 2, 3].map((step) => corners[(first + step) % 4]);
}

/**
 * Return where, as x, the widest gap between places ends, if places lie on both sides of 180 degrees and would be closer
 * together with those to the west of it moved once around the Earth; else -Infinity.
 */
function westOf(places) {
  const all = places.map(({ centre }) => centre[0]).sort((a, b) => a - b);
  let west = -Infinity;
  let widest = Math.max(WORLD / 4, WORLD - (all[all.length - 1] - all[0]));
  for (let index = 1; index < all.length; index += 1) {
    if (all[index] - all[index - 1] > widest) {
      widest = all[index] - all[index - 1];
      west = all[index];
    }
  }
  return west;
}

function moved(place, shift) {
  const by = ([x, y]) => [x + shift, y];
  return {
    ...place,
    centre: by(place.centre),
    ring: place.ring.map(by),
    quad: place.quad && place.quad.map(by),
    extent: [place.extent[0] + shift, place.extent[1], place.extent[2] + shift, place.extent[3]],
  };
}

/** The places of the tiles in the document, and the layers that draw them with the colours of `colours()`. */
export class Tiles {
  constructor(colours) {
    this.colours = colours;
    this.places = [];
    this.byId = new Map();
    this.west = null;
    this.numWithout = 0;
    this.lit = null;
    this.known = new WeakMap();
    this.styles = new Map();
    this.source = new ol.source.Vector({ wrapX: true });
    this.pictures = new ol.source.ImageCanvas({
      canvasFunction: (extent, resolution, ratio, size) => this.paint(extent, resolution, ratio, size),
      ratio: 1.2,
    });
    this.layers = [
      new ol.layer.Image({ source: this.pictures }),
      new ol.layer.Vector({
        source: this.source,
        style: (feature, resolution) => this.style(feature.get("place"), resolution),
        updateWhileInteracting: true,
      }),
    ];
  }

  /** Read the tiles that are in the document now. Return whether others are there than before. */
  read() {
    const elements = [...document.querySelectorAll("article.tile")];
    const places = [];
    for (const element of elements) {
      if (!this.known.has(element)) this.known.set(element, placeOf(element));
      const place = this.known.get(element);
      if (place) places.push(place);
    }
    this.numWithout = elements.length - places.length;
    const west = westOf(places);
    // Further parts of an answer are added to what is there.
    const isLonger =
      west === this.west &&
      places.length >= this.places.length &&
      this.places.every(({ element }, index) => element === places[index].element);
    if (isLonger && places.length === this.places.length) return false;
    if (!isLonger) {
      this.source.clear(true);
      this.places = [];
      this.byId.clear();
    }
    this.west = west;
    const features = places.slice(this.places.length).map((each) => {
      // An answer on both sides of 180 degrees lies side by side on the map.
      const place = each.centre[0] < west ? moved(each, WORLD) : each;
      this.places.push(place);
      this.byId.set(place.id, place);
      const point = new ol.geom.Point(place.centre);
      const geometry = place.ring.length ? new ol.geom.Polygon([[...place.ring, place.ring[0]]]) : point;
      const feature = new ol.Feature({ geometry, point, place });
      feature.setId(place.id);
      return feature;
    });
    this.source.addFeatures(features);
    this.pictures.changed();
    return true;
  }

  /** Draw again, for example after marks or colours have changed. */
  redraw() {
    this.styles.clear();
    this.source.changed();
  }

  /** Light up the tile with this id, or none. */
  light(id) {
    if (id === this.lit) return;
    this.lit = id;
    this.source.changed();
  }

  /** Return the extent of all tiles, null without one. */
  extent() {
    if (!this.places.length) return null;
    const extent = ol.extent.createEmpty();
    for (const place of this.places) ol.extent.extend(extent, place.extent);
    return extent;
  }

  /** Return the tile at a coordinate: the smallest that contains it, else the nearest dot within `tolerance`. */
  at([x, y], tolerance) {
    let inside = null;
    let nearest = null;
    let nearestAway = tolerance;
    for (const place of this.places) {
      const at = [beside(x, place.centre[0]), y];
      const away = Math.hypot(at[0] - place.centre[0], at[1] - place.centre[1]);
      if (away <= nearestAway) [nearest, nearestAway] = [place, away];
      if (!place.ring.length || !ol.extent.containsCoordinate(place.extent, at)) continue;
      if (!this.source.getFeatureById(place.id).getGeometry().intersectsCoordinate(at)) continue;
      if (!inside || ol.extent.getArea(place.extent) < ol.extent.getArea(inside.extent)) inside = place;
    }
    return inside || nearest;
  }

  style(place, resolution) {
    const mark = place.element.dataset.mark || "";
    const isLit = place.id === this.lit;
    const isDot = !place.ring.length || sizeOf(place, resolution) < DOT_BELOW;
    const key = `${mark} ${isLit} ${isDot}`;
    if (!this.styles.has(key)) this.styles.set(key, this.styleOf(mark, isLit, isDot));
    return this.styles.get(key);
  }

  styleOf(mark, isLit, isDot) {
    const { accent, good, bad, ground } = this.colours();
    const colour = { good, bad }[mark] || accent;
    const zIndex = (isLit ? 2 : 0) + (mark ? 1 : 0);
    if (isDot) {
      return new ol.style.Style({
        geometry: (feature) => feature.get("point"),
        image: new ol.style.Circle({
          radius: isLit ? 8 : mark ? 6 : 4,
          fill: new ol.style.Fill({ color: colour }),
          stroke: new ol.style.Stroke({ color: ground, width: isLit ? 2.5 : 1 }),
        }),
        zIndex,
      });
    }
    const line = (color, width) => new ol.style.Style({ stroke: new ol.style.Stroke({ color, width }), zIndex });
    // The line beneath separates the outline from a picture of the same colour.
    return isLit || mark ? [line(ground, isLit ? 7 : 5), line(colour, isLit ? 4 : 3)] : line(colour, 1.25);
  }

  /** Return a canvas with the pictures of the tiles that are large enough, each on its four corners. */
  paint(extent, resolution, ratio, size) {
    const canvas = document.createElement("canvas");
    canvas.width = Math.ceil(size[0]);
    canvas.height = Math.ceil(size[1]);
    const context = canvas.getContext("2d");
    const turns = [-1, 0, 1].map((turn) => turn * WORLD);
    for (const place of this.places) {
      if (!place.quad || sizeOf(place, resolution) < PICTURE_FROM) continue;
      for (const turn of turns) {
        const { quad, extent: covered } = turn ? moved(place, turn) : place;
        if (!ol.extent.intersects(covered, extent)) continue;
        const image = place.element.querySelector(".picture img");
        if (!image) continue;
        if (!image.complete) {
          image.addEventListener("load", () => this.pictures.changed(), { once: true });
        } else if (image.naturalWidth) {
          const scale = ratio / resolution;
          draw(
            context,
            image,
            quad.map(([x, y]) => [(x - extent[0]) * scale, (extent[3] - y) * scale]),
          );
        }
      }
    }
    return canvas;
  }
}

function sizeOf(place, resolution) {
  return Math.max(ol.extent.getWidth(place.extent), ol.extent.getHeight(place.extent)) / resolution;
}

/** Draw an image so that its corners lie at the given points of the canvas. */
function draw(context, image, [upperLeft, lowerLeft, lowerRight, upperRight]) {
  const gap = Math.hypot(
    upperLeft[0] + lowerRight[0] - upperRight[0] - lowerLeft[0],
    upperLeft[1] + lowerRight[1] - upperRight[1] - lowerLeft[1],
  );
  // A parallelogram is drawn at once; any other quadrilateral in cells, each a parallelogram to half a pixel.
  const cells = Math.min(24, Math.max(1, Math.ceil(Math.sqrt(2 * gap))));
  const at = (u, v) =>
    [0, 1].map(
      (axis) =>
        (1 - u) * (1 - v) * upperLeft[axis] +
        u * (1 - v) * upperRight[axis] +
        u * v * lowerRight[axis] +
        (1 - u) * v * lowerLeft[axis],
    );
  const { naturalWidth: width, naturalHeight: height } = image;
  for (let row = 0; row < cells; row += 1) {
    for (let column = 0; column < cells; column += 1) {
      const [u, v] = [column / cells, row / cells];
      const [a, b, c, d] = [at(u, v), at(u + 1 / cells, v), at(u, v + 1 / cells), at(u + 1 / cells, v + 1 / cells)];
      context.save();
      if (cells > 1) {
        context.beginPath();
        for (const [x, y] of [a, b, d, c]) {
          // Half a pixel more on each side leaves no seam between cells.
          const [middleX, middleY] = [(a[0] + d[0]) / 2, (a[1] + d[1]) / 2];
          context.lineTo(x + Math.sign(x - middleX) / 2, y + Math.sign(y - middleY) / 2);
        }
        context.clip();
      }
      const [across, down] = [cells / width, cells / height];
      const right = [(b[0] - a[0] + d[0] - c[0]) / 2, (b[1] - a[1] + d[1] - c[1]) / 2];
      const below = [(c[0] - a[0] + d[0] - b[0]) / 2, (c[1] - a[1] + d[1] - b[1]) / 2];
      const middle = [(a[0] + b[0] + c[0] + d[0]) / 4, (a[1] + b[1] + c[1] + d[1]) / 4];
      context.transform(
        right[0] * across,
        right[1] * across,
        below[0] * down,
        below[1] * down,
        middle[0],
        middle[1],
      );
      context.drawImage(image, -(u + 0.5 / cells) * width, -(v + 0.5 / cells) * height);
      context.restore();
    }
  }
}

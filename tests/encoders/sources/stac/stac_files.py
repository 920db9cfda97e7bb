"""Small STAC files for tests."""

import json

SQUARE = {"type": "Polygon", "coordinates": [[[10, 40], [12, 40], [12, 44], [10, 44], [10, 40]]]}


def feature(name="item", assets=None, geometry=SQUARE, links=(), **fields):
    """Return an item; `fields` that begin with `_` are its own, the others are properties."""
    own = {key[1:]: value for key, value in fields.items() if key.startswith("_")}
    properties = {key: value for key, value in fields.items() if not key.startswith("_")}
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "geometry": geometry,
        "properties": {"datetime": "2015-05-02T01:31:04.5Z", **properties},
        "links": list(links),
        "assets": {"image": {"href": "a.tif"}} if assets is None else assets,
        **own,
    }


def catalog(name, *links, kind="Catalog", **fields):
    """Return a catalog with links given as (rel, href)."""
    links = [{"rel": rel, "href": href} for rel, href in links]
    return {"type": kind, "stac_version": "1.0.0", "id": name, "description": "", "links": links, **fields}


def write(path, content):
    """Write JSON and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path

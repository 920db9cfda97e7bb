"""Layouts of published embeddings: which columns of a Parquet table hold what, and the name of the embedding."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orbithash.encoders.errors import InputError

__all__ = ["LAYOUTS", "ROLES", "Columns", "Layout", "TableOptions", "find_columns", "has_vectors", "vector_dims"]

# What a column can hold besides a geometry, which the metadata of the file names.
ROLES = ("vector", "id", "time", "lon", "lat", "label", "caption", "uri")

# Names of columns that are tried in this order where a layout says nothing else.
_USUAL: Mapping[str, tuple[str, ...]] = {
    "vector": ("embedding", "embeddings", "vector", "emb", "features"),
    "id": ("id", "key", "unique_id", "item_id", "chip_id", "tile_id", "uuid"),
    "time": ("datetime", "time", "timestamp", "date"),
    "lon": ("lon", "longitude", "centre_lon", "center_lon"),
    "lat": ("lat", "latitude", "centre_lat", "center_lat"),
    "label": ("label", "class", "class_name"),
    "caption": ("caption", "text"),
    "uri": ("uri", "url", "source_url", "path"),
}


@dataclass(frozen=True)
class Layout:
    """A layout of tables.

    Attributes:
        name: name of the layout.
        signs: columns that together identify the layout.
        columns: names of columns by role, where they differ from the usual ones; a vector may be several columns.
        embedding: name of the embedding, if all tables of this layout hold the same one.
        origin: where the embedding is published.
        quantisation: how int8 numbers are decoded: "" (as they are) or "signed-square".
    """

    name: str
    signs: frozenset[str]
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    embedding: str = ""
    origin: str = ""
    quantisation: str = ""


_ALPHAEARTH = tuple(f"A{number:02d}" for number in range(64))

LAYOUTS = {
    layout.name: layout
    for layout in [
        # https://github.com/cloudnativegeo/geo-embeddings-survey/blob/main/data/earth_index/readme.md
        Layout("earth-index", frozenset({"id", "geometry", "embedding"})),
        # https://huggingface.co/datasets/Major-TOM/Core-S2L1C-SSL4EO
        Layout(
            "major-tom",
            frozenset({"unique_id", "grid_cell", "embedding"}),
            {"id": ("unique_id",), "time": ("timestamp",), "lon": ("centre_lon",), "lat": ("centre_lat",)},
            origin="https://huggingface.co/Major-TOM",
        ),
        # https://source.coop/clay/clay-model-v0-embeddings
        Layout(
            "clay",
            frozenset({"source_url", "embeddings"}),
            {"vector": ("embeddings",), "time": ("date",), "uri": ("source_url",)},
            origin="https://source.coop/clay",
        ),
        # Samples of the images of Earth Engine, one column for each band. Integers are the published quantisation.
        Layout(
            "alphaearth",
            frozenset(_ALPHAEARTH),
            {"vector": _ALPHAEARTH, "id": ("id", "system:index")},
            embedding="alphaearth",
            origin="GOOGLE/SATELLITE_EMBEDDING/V1/ANNUAL",
            quantisation="signed-square",
        ),
        # Any other table.
        Layout("table", frozenset()),
    ]
}


@dataclass(frozen=True)
class TableOptions:
    """What a user states about a table: a layout, the name of the embedding, and names of columns by role."""

    layout: str | None = None
    name: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, texts: Sequence[str]) -> "TableOptions":
        """Parse texts `ROLE=COLUMN`, `layout=NAME` and `name=NAME`; `InputError` for anything else.

        `ROLE=` without a column means that no column has this role.
        """
        allowed = ("layout", "name", *ROLES)
        given: dict[str, str] = {}
        for text in texts:
            role, equals, value = text.partition("=")
            if not equals or role not in allowed or (not value and role in ("layout", "name", "vector")):
                raise InputError(f"table option {text!r}: ROLE=NAME is needed, where ROLE is {', '.join(allowed)}")
            if role in given:
                raise InputError(f"table option {role} is given twice: {given[role]!r} and {value!r}")
            given[role] = value
        layout = given.pop("layout", None)
        if layout is not None and layout not in LAYOUTS:
            raise InputError(f"unknown layout {layout!r} of a table; there are {', '.join(LAYOUTS)}")
        return cls(layout, given.pop("name", None), given)


@dataclass(frozen=True)
class Columns:
    """The columns of a table, and what its layout and its footer say of the embedding.

    Attributes:
        layout: name of the layout.
        vector: the column of vectors, or one column for each dimension.
        others: columns by role, for those roles that have one.
        quantisation: see `Layout`.
        embedding: name of the embedding; "" if the table does not say.
        origin: address of the model or the data; "" if the table does not say.
    """

    layout: str
    vector: tuple[str, ...]
    others: Mapping[str, str]
    quantisation: str
    embedding: str
    origin: str


def find_columns(schema: Any, options: TableOptions, has_vector: bool = True) -> Columns:
    """Return the columns of an Arrow schema with the metadata of the file; without `has_vector` none is the vector.

    Raises:
        InputError: no column of vectors, several, or a named column that is absent or of an unusable type. The message
            begins with the fault and does not name the file.
    """
    names = set(schema.names)
    if options.layout is not None:
        layout = LAYOUTS[options.layout]
        if absent := sorted(layout.signs - names):
            raise InputError(f"layout {layout.name} needs the columns {', '.join(absent)}; {_list(schema)}")
    else:
        layout = next(layout for layout in LAYOUTS.values() if layout.signs <= names)
    for role, name in options.columns.items():
        if not name:
            continue
        if name not in names:
            raise InputError(f"there is no column {name} for {role}; {_list(schema)}")
        if not _is_usable(role, schema.field(name).type):
            raise InputError(f"column {name} of type {schema.field(name).type} cannot hold {_MEANINGS[role]}")
    others = {}
    for role in ROLES[1:]:
        tried = layout.columns.get(role, _USUAL[role])
        found = (name for name in tried if name in names and _is_usable(role, schema.field(name).type))
        if column := options.columns.get(role, next(found, "")):
            others[role] = column
    described = _described(schema)
    embedding = options.name or described.get("id") or described.get("name") or layout.embedding
    origin = described.get("source") or layout.origin
    vector = _vector(schema, layout, options) if has_vector else ()
    return Columns(layout.name, vector, others, layout.quantisation, str(embedding or ""), str(origin))


def has_vectors(schema: Any) -> bool:
    """Return whether an Arrow schema has a column of vectors, or one column for each dimension of a known layout."""
    layouts = [layout for layout in LAYOUTS.values() if len(layout.columns.get("vector", ())) > 1]
    return any(vector_dims(field.type) is not None for field in schema) or any(
        layout.signs <= set(schema.names) for layout in layouts
    )


def vector_dims(kind: Any) -> int | None:
    """Return the dimensions of vectors of an Arrow type, 0 where each has its own length; None for another type."""
    import pyarrow.types as types

    kind = getattr(kind, "storage_type", kind)
    if types.is_fixed_size_list(kind):
        size = int(kind.list_size)
    elif types.is_list(kind) or types.is_large_list(kind):
        size = 0
    else:
        return None
    return size if _is_number(kind.value_type) else None


def _vector(schema: Any, layout: Layout, options: TableOptions) -> tuple[str, ...]:
    """Return the column or columns of the vector."""
    if "vector" in options.columns:
        return (options.columns["vector"],)
    given = layout.columns.get("vector", ())
    if len(given) > 1:
        if unusable := [name for name in given if not _is_number(schema.field(name).type)]:
            raise InputError(f"column {unusable[0]} of type {schema.field(unusable[0]).type} cannot hold numbers")
        return given
    vectors = [name for name in schema.names if vector_dims(schema.field(name).type) is not None]
    usual = [name for name in given or _USUAL["vector"] if name in vectors]
    candidates = usual or vectors
    if not candidates:
        kinds = "lists of float16, float32, float64 or int8"
        raise InputError(f"there is no column of vectors ({kinds}); {_list(schema)}")
    if len(candidates) > 1:
        raise InputError(f"the columns {', '.join(candidates)} hold vectors; choose one as the table's option vector")
    return (candidates[0],)


_MEANINGS = {
    "vector": "vectors: lists of float16, float32, float64 or int8 are allowed",
    "id": "ids: text or integers are allowed",
    "time": "times: timestamps, dates or text are allowed",
    "lon": "degrees: numbers are allowed",
    "lat": "degrees: numbers are allowed",
    "label": "labels: text or integers are allowed",
    "caption": "sentences: text is allowed",
    "uri": "addresses: text is allowed",
}


def _is_usable(role: str, kind: Any) -> bool:
    """Return whether a column of the Arrow type `kind` can have this role."""
    import pyarrow.types as types

    if role == "vector":
        return vector_dims(kind) is not None
    kind = kind.value_type if types.is_dictionary(kind) else kind
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    if role in ("id", "label"):
        return bool(is_text or types.is_integer(kind))
    if role == "time":
        return bool(is_text or types.is_timestamp(kind) or types.is_date(kind))
    if role in ("lon", "lat"):
        return bool(types.is_floating(kind) or types.is_integer(kind))
    return bool(is_text)


def _is_number(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_floating(kind) or types.is_int8(kind))


def _described(schema: Any) -> dict[str, Any]:
    """Return what the footer says of the model, by the convention of geoembeddings.org: JSON under the key `emb`."""
    try:
        model = json.loads((schema.metadata or {}).get(b"emb", b"{}")).get("model", {})
    except (ValueError, AttributeError, RecursionError):
        return {}
    return model if isinstance(model, dict) else {}


def _list(schema: Any) -> str:
    return f"the columns are {', '.join(f'{field.name} ({field.type})' for field in schema)}"

"""STAC descriptions of codes: a collection, and an item for each file of a folder.

The embedding extension (https://github.com/geo-embeddings/embeddings-stac-specification, version 0.0.1, a proposal)
has no fields for the bits of a code. They stand in the field `orbithash:codes` of the collection, which is the JSON of
`CodeDescription`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orbithash.encoders.places.code_description import STAC_FIELD, CodeDescription
from orbithash.encoders.places.contents import Contents

__all__ = [
    "EMBEDDING_EXTENSION",
    "PARQUET_MEDIA_TYPE",
    "STAC_VERSION",
    "Catalog",
    "collection_of",
    "embedding_fields",
    "file_item",
]

# The version that pystac writes.
STAC_VERSION = "1.1.0"
EMBEDDING_EXTENSION = "https://stac-extensions.github.io/embeddings/v0.0.1/schema.json"
PARQUET_MEDIA_TYPE = "application/vnd.apache.parquet"
# The extension requires links to the model and to the source data, whether or not they have an address.
_MODEL_URN, _SOURCE_URN = "urn:orbithash:model:", "urn:orbithash:source-data:not-stated"


@dataclass(frozen=True)
class Catalog:
    """What a STAC collection states beside its codes.

    Attributes:
        id: id of the collection.
        licence: licence of the codes, an SPDX identifier; "other": none that is named here.
        source: address of the source images, or of their collection; "" if not stated.
        model_href: address of the model's own STAC item; "" without one.
    """

    id: str
    licence: str = "other"
    source: str = ""
    model_href: str = ""


def embedding_fields(description: CodeDescription) -> dict[str, Any]:
    """Return the footer `emb` of a Parquet file: the model, and the fields of the embedding extension."""
    return {
        "model": {"id": description.model_id, "name": description.model or description.model_id},
        "type": "chip",
        "dimensions": description.bits,
        "data_type": "uint8",
        "quantization": _quantization(),
    }


def collection_of(
    catalog: Catalog, description: CodeDescription, contents: Contents, item_links: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the collection of codes with these contents; `item_links` are the relative addresses of its items."""
    import pystac

    # The extent of an empty collection, or of one without places, is not known: STAC requires one.
    spatial = pystac.SpatialExtent([contents.bbox or [-180.0, -90.0, 180.0, 90.0]])
    temporal = pystac.TemporalExtent([[contents.first, contents.last]])
    model = description.model or description.model_id
    collection = pystac.Collection(
        catalog.id,
        f"{contents.rows:,} binary codes of {description.bits} bits, compared by their Hamming distance",
        pystac.Extent(spatial, temporal),
        stac_extensions=[EMBEDDING_EXTENSION],
        license=catalog.licence,
        extra_fields={
            "emb:type": "chip",
            "emb:dimensions": description.bits,
            "data_type": "uint8",
            "emb:fit_for_use": ["retrieval"],
            STAC_FIELD: description.to_json(),
            "item_assets": {"embeddings": _asset()},
        },
    )
    collection.clear_links()
    collection.add_link(
        pystac.Link("emb:model", catalog.model_href or f"{_MODEL_URN}{description.model_id}", title=f"Model {model}")
    )
    source = "Source images" if catalog.source else "Source images, not stated; the column uri has the address of each"
    collection.add_link(pystac.Link("emb:source-data", catalog.source or _SOURCE_URN, title=source))
    content: dict[str, Any] = collection.to_dict(include_self_link=False, transform_hrefs=False)
    json_type = pystac.MediaType.JSON.value
    if item_links:
        content["links"].append({"rel": "root", "href": "./collection.json", "type": json_type})
    item_type = pystac.MediaType.GEOJSON.value
    content["links"] += [{"rel": "item", "href": href, "type": item_type} for href in item_links]
    return content


def file_item(
    name: str, href: str, catalog: Catalog, description: CodeDescription, contents: Contents, version_time: datetime
) -> dict[str, Any]:
    """Return the item of a Parquet file of codes; its geometry is the box around its rows.

    Args:
        name: id of the item.
        href: address of the file, relative to the item.
        catalog: the collection, `../collection.json` of the item.
        description: the codes of the file.
        contents: the rows of the file.
        version_time: time of the version of the archive: that of an item whose rows have no time.
    """
    import pystac
    import shapely

    times = (contents.first, contents.last)
    has_time = contents.first is not None
    item = pystac.Item(
        name,
        None if contents.bbox is None else shapely.geometry.mapping(shapely.box(*contents.bbox)),
        contents.bbox,
        None if has_time else version_time,
        {"emb:quantization": _quantization(), "orbithash:rows": contents.rows},
        *(times if has_time else (None, None)),
        stac_extensions=[EMBEDDING_EXTENSION],
        collection=catalog.id,
        assets={"embeddings": pystac.Asset.from_dict({"href": href, **_asset()})},
    )
    content: dict[str, Any] = item.to_dict(include_self_link=False, transform_hrefs=False)
    if content.get("bbox") is None:
        # STAC: an item without a geometry has no box.
        content.pop("bbox", None)
    json_type = pystac.MediaType.JSON.value
    content["links"] = [
        {"rel": rel, "href": "../collection.json", "type": json_type} for rel in ("root", "parent", "collection")
    ]
    return content


def _quantization() -> dict[str, Any]:
    """Return how outputs of a network became bits, as far as the extension can say."""
    return {"method": "hash", "original_dtype": "float32", "quantized_dtype": "uint8"}


def _asset() -> dict[str, Any]:
    return {
        "type": PARQUET_MEDIA_TYPE,
        "roles": ["data"],
        "title": "Binary codes, one row an image",
    }

"""The description of an archive's codes, with what a model folder adds."""

from pathlib import Path

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.places.code_description import CodeDescription

__all__ = ["MODEL_ITEM", "describe_codes"]

# The STAC item of a model folder, which `orbithash card` writes.
MODEL_ITEM = "stac-item.json"


def describe_codes(archive: Archive, model: Path | None = None) -> CodeDescription:
    """Return the description of the codes of an archive.

    Args:
        archive: the archive.
        model: folder of the model that made the codes; it adds the names of the model, the method and the embedding,
            and the thresholds. None: they stay unknown.

    Raises:
        InputError: the folder of another model.
    """
    spec = archive.vector
    dims, scale = (None, None) if spec is None else spec
    if model is None:
        return CodeDescription(archive.bits, archive.model_id, vector_dims=dims, vector_scale=scale)
    from orbithash.encoders.networks.card import read_model_folder

    card, model_id, _ = read_model_folder(model)
    if model_id != archive.model_id:
        raise InputError(
            f"--model {model} is model {model_id}; the codes of {archive.path} are of model {archive.model_id}: give "
            "the folder of that model, or omit --model"
        )
    backbone = card.network.backbone
    folder = model.resolve()
    return CodeDescription(
        archive.bits,
        archive.model_id,
        # Training writes the folder RUN/model.
        model=folder.parent.name if folder.name == "model" else folder.name,
        vector_dims=dims,
        vector_scale=scale,
        embedding=backbone.name if backbone.source == "embedding" else "",
        method=card.method,
        # Bits of the class have no thresholds.
        thresholds=card.thresholds if card.label_code == "none" else (),
    )

"""Write the model card and the STAC item into the model folder of a run."""

import json
from pathlib import Path

from orbithash.encoders.files import write_file
from orbithash.trainers.publishing.readme import readme
from orbithash.trainers.publishing.stac_item import stac_item
from orbithash.trainers.publishing.statements import Statements
from orbithash.trainers.publishing.trained_model import TrainedModel, read_trained_model

__all__ = ["CARD", "STAC_ITEM", "write_card"]

CARD, STAC_ITEM = "README.md", "stac-item.json"


def write_card(run_folder: Path, statements: Statements, bits: int | None = None) -> TrainedModel:
    """Write `README.md` and `stac-item.json` into the model folder of a run, and return what they describe.

    Existing ones are replaced. The files depend on the run and on the statements only, so that the same call writes the
    same bytes. The `model_id` does not change.

    Args:
        run_folder: a complete run.
        statements: what the publisher states.
        bits: a shorter length of a run with nested lengths; None: the whole code.

    Raises:
        InputError: not a complete run, or a damaged file.
    """
    model = read_trained_model(run_folder, bits)
    card, item = readme(model, statements), stac_item(model, statements)
    write_file(model.folder / CARD, card)
    write_file(model.folder / STAC_ITEM, json.dumps(item, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return model

"""The stages write the stored vectors of images, and none for refused items."""

import numpy as np
import pytest
import torch
from cluster_parts import save_random_model, write_image

from orbithash.cluster.encoding.stages import Encoder, Written, decode, item_table, write
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.tables import fixed_size_rows
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.projection import Projection
from orbithash.encoders.networks.reading import read_prepared
from orbithash.encoders.sources.sources import Item


@pytest.mark.parametrize("has_projection", [False, True])
def test_the_archive_has_the_vectors_of_the_model(tmp_path, has_projection):
    model = HashModel.load(save_random_model(tmp_path / "model", seed=0))
    if has_projection:
        sample = torch.rand(30, model.num_features, generator=torch.Generator().manual_seed(0))
        projection = Projection.fit(sample, 6)
        card = model.card.__class__(**{**vars(model.card), "projection": projection.spec})
        model = HashModel(card, model.network, projection=projection)
        model.save(tmp_path / "model")
    rng = np.random.default_rng(0)
    names = ["a.png", "b.png", "c.png"]
    for name in names:
        write_image(tmp_path / name, rng)
    (tmp_path / "b.png").write_bytes(b"no image")
    items = item_table([Item(name, str(tmp_path / name)) for name in names])
    encoded = Encoder(tmp_path / "model", "cpu")(decode(items, model.preprocessing))
    archive = Archive.create(tmp_path / "archive", model.bits, model.model_id, model.card.vector)
    written = Written(**write(encoded, archive.path).to_pylist()[0])
    archive.commit(written.fragments)
    assert (archive.num_rows, written.refused) == (2, ["b.png"])
    ids = archive.find(["a.png", "c.png"])
    table = archive.take([ids["a.png"], ids["c.png"]], archive.schema.names)
    pixels = np.stack([read_prepared(tmp_path / name, model.preprocessing) for name in ("a.png", "c.png")])
    expected = model.encode_items("image", pixels)
    assert (fixed_size_rows(table["code"])[0] == expected.codes).all()
    assert ("vector" in table.column_names) == has_projection
    if has_projection:
        vectors, is_known = fixed_size_rows(table["vector"])
        assert is_known.all()
        assert (vectors == expected.vectors).all()

"""DUCH and ITQ on the towers of a dual encoder: from training to queries by sentence, by image and by both."""

import asyncio
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from backbone_models import write_open_clip
from method_parts import make_run, trained, write_data, write_transformers_clip

from orbithash.cluster.serving.serve import serving
from orbithash.cluster.serving.settings import ServeSettings
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import hamming
from orbithash.encoders.imagery.images import read_image
from orbithash.encoders.networks.model import HashModel
from orbithash.search.client import Client, Example, Row
from orbithash.search.engine.composition import compose
from orbithash.trainers.loop.export import export_models

SENTENCES = ["a beach", "some forest", "this river", "the river bank with two grey boats"]


@contextmanager
def served(archive, model):
    """Yield the address of a gateway in this process."""
    ready, stop = threading.Event(), asyncio.Event()
    found = {}

    async def main():
        found["loop"] = asyncio.get_running_loop()
        async with serving(ServeSettings(str(archive), model, "127.0.0.1:0", is_local=True)) as running:
            found["address"] = running.gateway.address
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        assert ready.wait(120)
        yield found["address"]
    finally:
        found["loop"].call_soon_threadsafe(stop.set)
        thread.join()


DUCH = {"epochs": 1, "hidden": 8, "text_encoder": None}
CASES = {
    "duch on open_clip": ("duch", "open_clip", write_open_clip, DUCH),
    "duch on transformers": ("duch", "hf", write_transformers_clip, DUCH),
    "itq on open_clip": ("itq", "open_clip", write_open_clip, {"bits": 8}),
}


@pytest.fixture(scope="module", params=CASES)
def model_folder(request, tmp_path_factory):
    method, source, write_network, settings = CASES[request.param]
    root = tmp_path_factory.mktemp("dual")
    data, network = write_data(root / "data"), write_network(root / "clip")
    run = make_run(data, method, backbone=f"{source}:{network}", vector_dims=8, **settings)
    trained(run, root / "run")
    model, _ = export_models(run, root / "run" / "epoch1")
    model.save(root / "model")
    return root


def test_sentences_and_images_search_one_archive(model_folder, tmp_path):
    model = HashModel.load(model_folder / "model")
    assert model.has_joint_text
    # A tokenizer that was read and used again writes other files.
    assert model.save(tmp_path / "again") == model.model_id
    assert HashModel.load(tmp_path / "again").model_id == model.model_id
    paths = sorted((model_folder / "data").rglob("*.png"))
    prepared = model.prepare([read_image(path, model.preprocessing.rendering) for path in paths])
    images = model.encode_items("image", prepared, with_outputs=True)
    texts = model.encode_items("text", SENTENCES, with_outputs=True)
    assert images.vectors.shape == (len(paths), 8)
    assert texts.vectors.shape == (len(SENTENCES), 8)
    assert len(np.unique(texts.codes, axis=0)) > 1
    Archive.open_or_create(tmp_path / "archive", model.bits, model.model_id, model.card.vector)
    with served(tmp_path / "archive", model_folder / "model") as address, Client(address, timeout_s=60) as client:
        client.upsert(Row(key=path.name, image=path) for path in paths)
        assert client.describe().has_text

        def check(answer, query):
            distances = hamming(query.codes, images.codes)[0]
            assert [hit.distance for hit in answer.hits] == sorted(distances.tolist())
            assert all(distances[[path.name for path in paths].index(hit.key)] == hit.distance for hit in answer.hits)

        for sentence, query, answer in zip(
            SENTENCES, texts.split(), client.search_batch(texts=SENTENCES, k=100), strict=True
        ):
            check(answer, query)
            both = client.search(positives=[Example(image=paths[0]), Example(text=sentence, weight=0.5)], k=100)
            check(both, compose([images.split()[0], query], [], [1, 0.5], model.bits))
            rescored = client.search(text=sentence, rescore="vector", oversampling=100, k=5)
            cosines = images.vectors.astype(float) @ query.vectors[0]
            cosines /= np.linalg.norm(images.vectors.astype(float), axis=1) * np.linalg.norm(
                query.vectors[0].astype(float)
            )
            np.testing.assert_allclose([hit.score for hit in rescored.hits], np.sort(cosines)[::-1][:5], rtol=1e-6)

"""Queries by image or sentence share passes of the network."""

import asyncio
import threading

import numpy as np
import pytest
from search_parts import local_shards, oracle, serving, small_case, snapshot_of

from orbithash.cluster.serving import query_encoders
from orbithash.cluster.serving.encoder_pool import Inputs, Network
from orbithash.cluster.serving.query_encoders import LocalEncoder
from orbithash.encoders.codes import Encoded
from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.card import HeadSpec, ModelCard
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.model import HashModel
from orbithash.search.client import Client, Example, Query
from orbithash.search.engine.engine import Engine
from orbithash.search.observer import Observer
from orbithash.search.protocol.queries import Answer

PREPROCESSING = Preprocessing(Rendering(), resize=32, crop=32)


class StubDecoder:
    """An image is a number; its pixels are that number."""

    num_decoded = 0

    async def prepare(self, images, preprocessing):
        self.num_decoded += len(images)
        if b"bad" in images:
            raise InputError("not an image")
        return np.array([[[[int(image)]]] for image in images], np.uint8).reshape(-1, 1, 1, 1)

    async def prepare_rows(self, images, preprocessing):
        return await self.prepare(images, preprocessing), [b"thumbnail"] * len(images)


class StubNetwork:
    """Counts passes, each of which waits for the test."""

    def __init__(self):
        self.passes = []
        self.may_go_on = threading.Event()
        self.began = threading.Event()

    def inputs(self):
        return Inputs(has_text=True, num_features=2, embedding=None)

    def encode(self, kind, items, with_outputs):
        self.passes.append(len(items))
        self.began.set()
        assert self.may_go_on.wait(60)
        values = [len(item) for item in items] if kind == "text" else np.asarray(items).reshape(len(items), -1)[:, 0]
        codes = np.asarray(values, np.uint8)[:, None]
        return Encoded(codes, codes.astype(np.int8) if with_outputs else None, None)


def run(scenario):
    async def main():
        network = StubNetwork()
        await scenario(LocalEncoder(StubDecoder(), PREPROCESSING, network, Observer()), network)

    asyncio.run(main())


def test_images_at_the_same_time_share_passes():
    async def scenario(encoder, network):
        first = asyncio.create_task(encoder.encode("image", [b"200"]))
        assert await asyncio.to_thread(network.began.wait, 60)
        others = [asyncio.create_task(encoder.encode("image", [str(number).encode()])) for number in range(63)]
        await asyncio.sleep(0)
        network.may_go_on.set()
        assert (await first).codes.tolist() == [[200]]
        assert [encoded.codes.tolist() for encoded in await asyncio.gather(*others)] == [
            [[number]] for number in range(63)
        ]
        assert network.passes == [1, 63]

    run(scenario)


def test_an_invalid_image_fails_only_its_own_query():
    async def scenario(encoder, network):
        network.may_go_on.set()
        outcomes = await asyncio.gather(
            *(encoder.encode("image", [image]) for image in (b"1", b"bad", b"3")), return_exceptions=True
        )
        assert isinstance(outcomes[1], InputError)
        assert [outcomes[0].codes.tolist(), outcomes[2].codes.tolist()] == [[[1]], [[3]]]
        assert network.passes == [2]

    run(scenario)


def test_sentences_share_passes_and_images_are_in_others():
    async def scenario(encoder, network):
        network.may_go_on.set()
        texts = [encoder.encode("text", ["a" * number]) for number in range(1, 6)]
        encoded = await asyncio.gather(*texts, encoder.encode("image", [b"7", b"8"]))
        assert [each.codes.tolist() for each in encoded] == [[[1]], [[2]], [[3]], [[4]], [[5]], [[7], [8]]]
        assert sorted(network.passes) == [2, 5]

    run(scenario)


def test_a_query_does_not_wait_for_all_rows_of_an_upsert():
    async def scenario(encoder, network):
        rows = asyncio.create_task(encoder.encode_rows([b"1"] * 100))
        assert await asyncio.to_thread(network.began.wait, 60)
        query = asyncio.create_task(encoder.encode("image", [b"9"]))
        await asyncio.sleep(0)
        network.may_go_on.set()
        assert (await query).codes.tolist() == [[9]]
        assert len(network.passes) <= 3
        assert max(network.passes) <= 17
        encoded, thumbnails = await rows
        assert (encoded.codes.shape, len(thumbnails)) == ((100, 1), 100)

    run(scenario)


@pytest.mark.parametrize(("kind", "item"), [("image", b"5"), ("text", "x" * 5), ("vector", np.float32([5, 0]))])
def test_many_examples_of_one_query(kind, item):
    async def scenario(encoder, network):
        network.may_go_on.set()
        assert (await encoder.encode(kind, [item] * 40)).codes.tolist() == [[5]] * 40
        assert network.passes == [40]

    run(scenario)


def test_queries_with_and_without_outputs_are_in_different_passes():
    async def scenario(encoder, network):
        network.may_go_on.set()
        calls = [encoder.encode("text", ["a"], with_outputs=number % 2 == 0) for number in range(10)]
        encoded = await asyncio.gather(*calls)
        assert [each.outputs is None for each in encoded] == [False, True] * 5
        assert network.passes == [5, 5]

    run(scenario)


def test_a_batch_of_sentences_takes_few_passes():
    case = small_case(bits=8)
    network = StubNetwork()
    network.may_go_on.set()
    texts = ["x" * number for number in range(1, 65)]

    def engine():
        encoder = LocalEncoder(StubDecoder(), PREPROCESSING, network, Observer())
        return Engine(snapshot_of(case, local_shards(case), encoder))

    with serving(engine()) as gateway, Client(gateway.address) as client:
        answers = client.search_batch(texts=texts, k=1)
        composed = [
            Query(positives=(Example(text=text), Example(text=text + "y")), negatives=(Example(text="no"),))
            for text in texts[:16]
        ]
        assert all(isinstance(answer, Answer) for answer in client.search_batch(composed))
    for text, answer in zip(texts, answers, strict=True):
        distances, _ = oracle(case.ids, case.codes, np.array([len(text)], np.uint8), 1)
        assert [(hit.distance, hit.id) for hit in answer.hits] == distances
    assert network.passes == [64, 48]


def test_the_network_of_embeddings_takes_vectors_only(tmp_path):
    network = HashNetwork(build_backbone("embedding:6:dino:"), HeadSpec(8))
    card = ModelCard("itq", network.spec, (0.0,) * 8, "none", 1, Preprocessing(Rendering(), 32, 32), (), {}, {})
    model = HashModel(card, network)
    model.save(tmp_path / "model")
    loaded = Network(tmp_path / "model")
    assert loaded.inputs() == Inputs(has_text=False, num_features=6, embedding="dino")
    vectors = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    np.testing.assert_array_equal(loaded.encode("vector", vectors, False).codes, model.encode_features(vectors))
    with pytest.raises(InputError, match=r"takes vectors of 6 dimensions \(dino\), and no images"):
        loaded.encode("image", np.zeros((1, 32, 32, 3), np.uint8), False)


def test_decoded_images_that_wait_are_limited(monkeypatch):
    """However many rows and queries come at the same time, the rest waits undecoded."""
    monkeypatch.setattr(query_encoders, "_MAX_DECODED_BYTES", 100 * PREPROCESSING.num_bytes)

    async def scenario(encoder, network):
        rows = [asyncio.create_task(encoder.encode_rows([b"1"] * 50)) for _ in range(10)]
        queries = [asyncio.create_task(encoder.encode("image", [b"2"])) for _ in range(30)]
        assert await asyncio.to_thread(network.began.wait, 60)
        for _ in range(100):
            await asyncio.sleep(0)
        assert 80 < encoder._decoder.num_decoded <= 100
        rows[0].cancel()
        network.may_go_on.set()
        for encoded, thumbnails in await asyncio.gather(*rows[1:]):
            assert encoded.codes.tolist() == [[1]] * len(thumbnails) == [[1]] * 50
        assert [encoded.codes.tolist() for encoded in await asyncio.gather(*queries)] == [[[2]]] * 30

    run(scenario)


def test_covered_parts():
    rng = np.random.default_rng(0)
    for pixels in (rng.integers(0, 256, (33, 33, 3), np.uint8), rng.normal(0, 1, (33, 33, 4)).astype(np.float32)):
        images = list(query_encoders.covered(pixels, 4))
        assert len(images) == 16
        covered = np.zeros((33, 33), int)
        for image in images:
            assert image.dtype == pixels.dtype
            differs = (image != pixels).any(axis=2)
            covered += differs
            assert 8 * 8 * 0.9 <= differs.sum() <= 9 * 9
            mean = pixels.mean(axis=(0, 1)).astype(pixels.dtype)
            assert np.allclose(image[differs], mean)
        assert covered.max() == 1, "each pixel belongs to one cell"
        assert covered.sum() >= 0.98 * 33 * 33
    missing = np.full((16, 16, 1), np.nan, np.float32)
    assert np.isnan(np.stack(list(query_encoders.covered(missing, 2)))).all()

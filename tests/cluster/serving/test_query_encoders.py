"""Queries by image or sentence share passes of the network."""

import asyncio
import threading

import numpy as np
import pytest

from orbithash.cluster.serving.query_encoders import LocalEncoder
from orbithash.encoders.errors import InputError
from orbithash.search.observer import Observer


class StubDecoder:
    """An image is a number; its pixels are that number."""

    async def prepare(self, images, preprocessing):
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

    def has_text(self):
        return True

    def encode_prepared(self, pixels):
        self.passes.append(len(pixels))
        self.began.set()
        assert self.may_go_on.wait(60)
        return pixels.reshape(-1, 1)

    def encode_texts(self, texts):
        self.passes.append(len(texts))
        return np.array([[len(text)] for text in texts], np.uint8)


def run(scenario):
    async def main():
        network = StubNetwork()
        await scenario(LocalEncoder(StubDecoder(), None, network, Observer()), network)

    asyncio.run(main())


def test_images_at_the_same_time_share_passes():
    async def scenario(encoder, network):
        first = asyncio.create_task(encoder.encode_images([b"200"]))
        assert await asyncio.to_thread(network.began.wait, 60)
        others = [asyncio.create_task(encoder.encode_images([str(number).encode()])) for number in range(63)]
        await asyncio.sleep(0)
        network.may_go_on.set()
        assert (await first).tolist() == [[200]]
        assert [codes.tolist() for codes in await asyncio.gather(*others)] == [[[number]] for number in range(63)]
        assert network.passes == [1, 16, 16, 16, 15]

    run(scenario)


def test_an_invalid_image_fails_only_its_own_query():
    async def scenario(encoder, network):
        network.may_go_on.set()
        outcomes = await asyncio.gather(
            *(encoder.encode_images([image]) for image in (b"1", b"bad", b"3")), return_exceptions=True
        )
        assert isinstance(outcomes[1], InputError)
        assert [outcomes[0].tolist(), outcomes[2].tolist()] == [[[1]], [[3]]]
        assert network.passes == [2]

    run(scenario)


def test_sentences_share_passes_and_images_are_in_others():
    async def scenario(encoder, network):
        network.may_go_on.set()
        texts = [encoder.encode_texts(["a" * number]) for number in range(1, 6)]
        codes = await asyncio.gather(*texts, encoder.encode_images([b"7", b"8"]))
        assert [code.tolist() for code in codes] == [[[1]], [[2]], [[3]], [[4]], [[5]], [[7], [8]]]
        assert sorted(network.passes) == [2, 5]

    run(scenario)


def test_a_query_does_not_wait_for_all_rows_of_an_upsert():
    async def scenario(encoder, network):
        rows = asyncio.create_task(encoder.encode_rows([b"1"] * 100))
        assert await asyncio.to_thread(network.began.wait, 60)
        query = asyncio.create_task(encoder.encode_images([b"9"]))
        await asyncio.sleep(0)
        network.may_go_on.set()
        assert (await query).tolist() == [[9]]
        assert len(network.passes) <= 3
        codes, thumbnails = await rows
        assert (codes.shape, len(thumbnails)) == ((100, 1), 100)

    run(scenario)


@pytest.mark.parametrize("kind", ["encode_images", "encode_texts"])
def test_many_examples_of_one_query(kind):
    async def scenario(encoder, network):
        network.may_go_on.set()
        values = [b"5"] * 40 if kind == "encode_images" else ["x" * 5] * 40
        assert (await getattr(encoder, kind)(values)).tolist() == [[5]] * 40
        assert network.passes == [16, 16, 8]

    run(scenario)

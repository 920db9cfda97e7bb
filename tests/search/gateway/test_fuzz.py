"""Malformed and hostile requests: none crashes a process, leaks internals, passes a limit or affects later queries."""

import asyncio
import random
import re
import resource

import grpc
import numpy as np
import pytest
from images import bomb_tiff, encoded, geotiff, picture, png
from search_parts import oracle, random_codes

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Encoded, outputs_of
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.search.engine.backend import LocalBackend
from orbithash.search.gateway.decoding import Decoder
from orbithash.search.gateway.gateway import start_gateway
from orbithash.search.gateway.limits import GatewayLimits
from orbithash.search.protocol.queries import MAX_FILTER_CHARS, MAX_K
from orbithash.search.service.service import Target, open_service
from orbithash.v1 import search_pb2 as pb

BITS, NUM_ROWS, SEED = 16, 300, 20_260_723
PREPROCESSING = Preprocessing(Rendering(), resize=32, crop=32)

SEARCH, MANY = "orbithash.v1.SearchService/Search", "orbithash.v1.SearchService/SearchMany"
DESCRIBE, REFRESH = "orbithash.v1.ArchiveService/Describe", "orbithash.v1.ArchiveService/Refresh"
UPSERT, DELETE = "orbithash.v1.ArchiveService/Upsert", "orbithash.v1.ArchiveService/Delete"
UPDATE = "orbithash.v1.ArchiveService/Update"
GET, COUNT, SCROLL = (f"orbithash.v1.SearchService/{name}" for name in ("Get", "Count", "Scroll"))

# Internals that no message may show: tracebacks, paths, addresses.
LEAKS = re.compile(r"Traceback|File \"|\.py\b|site-packages|/vsimem|0x[0-9a-f]{6}|<class|object at|Unexpected")


class PixelEncoder:
    """Stands in for a model: the bits of a code are the brightness of pixels."""

    has_text = True
    num_features = 4
    embedding = None
    has_views = False

    def __init__(self, decoder):
        self._decoder = decoder

    async def encode(self, kind, items, with_outputs=False):
        if kind == "image":
            codes = _code(await self._decoder.prepare(items, PREPROCESSING))
        else:
            codes = np.array([[len(item) % 256, 0] for item in items], np.uint8)
        return Encoded(codes, outputs_of(codes, 16) if with_outputs else None, None)

    async def encode_rows(self, images):
        pixels, thumbnails = await self._decoder.prepare_rows(images, PREPROCESSING)
        return Encoded(_code(pixels), None, None), thumbnails


def _code(pixels):
    return np.packbits(pixels[:, ::8, ::8, 0].reshape(len(pixels), -1) > 127, axis=1)


class Fuzzed:
    """A gateway over a real archive, with the checks that hold for each of its answers."""

    def __init__(self, folder, channel, decoder):
        self.folder, self.channel, self.decoder = folder, channel, decoder
        self.outcomes = {}

    async def send(self, method, data):
        """Send bytes as they are; return the status code and the message."""
        path = f"/{method}"
        try:
            if method in (UPSERT, UPDATE, DELETE):
                call = self.channel.stream_stream(path)(iter([data]), timeout=300)
                answers = [answer async for answer in call]
            else:
                answers = [await self.channel.unary_unary(path)(data, timeout=300)]
            code, message = grpc.StatusCode.OK, ""
            if method == SEARCH:
                assert len(pb.SearchResponse.FromString(answers[0]).hits) <= MAX_K
        except grpc.aio.AioRpcError as error:
            code, message = error.code(), error.details()
        self.outcomes[code] = self.outcomes.get(code, 0) + 1
        assert "internal error" not in message, (method, data[:300], message)
        assert "\n" not in message, message
        assert len(message) <= 1000
        if method != REFRESH:
            # A caller of Refresh names folders, and gets messages about them.
            assert not LEAKS.search(message), (method, message)
            assert str(self.folder.parent) not in message, message
        return code, message

    async def is_well(self):
        """Check that a query by code and one by image are answered exactly."""
        ids, codes = Archive.open(self.folder).codes()
        image = picture(5)
        by_image = _code(PREPROCESSING.prepare(image)[None])[0]
        for query, asked in (
            (np.array([7, 200], np.uint8), {"code": bytes([7, 200])}),
            (by_image, {"image": encoded(image, "PNG")}),
        ):
            request = pb.SearchRequest(k=20, **asked)
            data = await self.channel.unary_unary(f"/{SEARCH}")(request.SerializeToString(), timeout=300)
            response = pb.SearchResponse.FromString(data)
            found = [(hit.distance, hit.id) for hit in response.hits], response.ties_at_cutoff
            assert found == oracle(ids, codes, query, 20)
            assert response.coverage.fraction == 1


@pytest.fixture
def fuzz(tmp_path):
    """Run `scenario(fuzzed, rng)`, and then check good queries in the same processes."""

    def run(scenario):
        async def main():
            folder = tmp_path / "archive"
            codes = random_codes(np.random.default_rng(SEED), NUM_ROWS, BITS)
            keys = [f"place/{i}.tif" for i in range(NUM_ROWS)]
            labels = [f"class {i % 5}" if i % 3 else None for i in range(NUM_ROWS)]
            Archive.open_or_create(folder, BITS, "m" * 32).upsert(
                Archive.table(codes, BITS, keys, keys, label=labels, lon=[i % 360 - 180.0 for i in range(NUM_ROWS)])
            )
            decoder = Decoder(num_workers=2, timeout_s=5, max_memory_bytes=2**29)

            async def open_backend(target):
                # As `serve` does, with a stand-in for the model.
                return LocalBackend(Archive.open(target.archive), PixelEncoder(decoder), target.num_shards)

            service = await open_service(open_backend, Target(str(folder), "", 2))
            gateway = await start_gateway(service, "127.0.0.1:0", limits=GatewayLimits(max_timeout_s=300))
            options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
            try:
                async with grpc.aio.insecure_channel(gateway.address, options=options) as channel:
                    fuzzed = Fuzzed(folder, channel, decoder)
                    await fuzzed.is_well()
                    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                    await scenario(fuzzed, random.Random(SEED))
                    await fuzzed.is_well()
                    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
                    assert grown < 600 * 1024, f"{grown} KiB more"
                    return fuzzed.outcomes
            finally:
                await gateway.stop(0)
                await service.close()
                await decoder.close()

        return asyncio.run(main())

    return run


def mutated(rng, data):
    """Return data with one change: flipped bits, a cut, a piece missing or doubled, bytes of extreme values."""
    data = bytearray(data)
    match rng.randrange(5):
        case 0:
            for _ in range(rng.choice([1, 1, 2, 8, 64])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            del data[rng.randrange(len(data)) :]
        case 2:
            start = rng.randrange(len(data))
            del data[start : start + rng.randrange(1, 40)]
        case 3:
            start = rng.randrange(len(data))
            data[start:start] = data[start : start + rng.randrange(1, 400)]
        case 4:
            start = rng.randrange(len(data))
            data[start : start + rng.choice([1, 2, 4, 8])] = rng.choice([b"\0", b"\xff"]) * rng.choice([1, 2, 4, 8])
    return bytes(data)


# Empty, of a wrong length, not finite, of a part of a number, too large.
VECTORS = [
    b"",
    np.zeros(3, np.float32).tobytes(),
    np.float32([0, 1, np.nan, 0]).tobytes(),
    np.float32([0, 1, np.inf, 0]).tobytes(),
    bytes(15),
    bytes(4 * 16_385),
    bytes(8 * 2**20),
]


def good_requests():
    example = pb.Example(key="place/3.tif")
    search = pb.SearchRequest(
        code=b"ab", k=5, radius=9, filter="label = 'class 1'", include=[1, 3], min_coverage=0.5, after={"distance": 1}
    )
    mixed = pb.SearchRequest(examples=pb.Examples(positives=[example], negatives=[pb.Example(code=b"xy")]), k=3)
    vector = np.float32([1, 2, 3, 4]).tobytes()
    weighted = pb.SearchRequest(
        examples=pb.Examples(positives=[pb.Example(text="boats", weight=0.5), pb.Example(vector=vector)]), k=3
    )
    rows = [pb.Row(key="new", code=b"ab", label="x", lon=1.0, datetime={"seconds": 10**9})]
    update = pb.RowUpdate(row=pb.Row(key="place/5.tif", label="y"), columns={"paths": ["label", "caption"]})
    return [
        (SEARCH, search),
        (SEARCH, mixed),
        (SEARCH, weighted),
        (SEARCH, pb.SearchRequest(text="a harbor", k=2)),
        (SEARCH, pb.SearchRequest(vector=vector, k=2)),
        (MANY, pb.SearchManyRequest(requests=[search, mixed])),
        (DESCRIBE, pb.DescribeRequest()),
        (REFRESH, pb.RefreshRequest()),
        (UPSERT, pb.UpsertRequest(rows=rows)),
        (UPSERT, pb.UpsertRequest(rows=[pb.Row(key="vector", vector=vector)])),
        (DELETE, pb.DeleteRequest(keys=["place/299.tif", "nowhere"])),
        (DELETE, pb.DeleteRequest(filter="label = 'class 9'")),
        (UPDATE, pb.UpdateRequest(updates=[update])),
        (GET, pb.GetRequest(keys=["place/3.tif"], include=[1, 5])),
        (COUNT, pb.CountRequest(filter="label = 'class 1'")),
        (SCROLL, pb.ScrollRequest(filter="lon > 3", after=7, limit=9, include=[2])),
    ]


def test_requests(fuzz):
    async def scenario(fuzzed, rng):
        good = [(method, message.SerializeToString()) for method, message in good_requests()]
        for i in range(200):
            method, data = good[i % len(good)]
            is_noise = i % 4 == 0 or not data
            await fuzzed.send(
                method, rng.randbytes(rng.choice([0, 1, 7, 100, 5000])) if is_noise else mutated(rng, data)
            )

    outcomes = fuzz(scenario)
    assert set(outcomes) <= {
        grpc.StatusCode[name] for name in ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL", "UNKNOWN")
    }
    assert outcomes[grpc.StatusCode.INVALID_ARGUMENT] > 10


def test_fields_beyond_their_limits(fuzz):
    deep = b""
    for _ in range(2000):
        # Field 6 of a request: examples nested in examples, which no message type has.
        deep = b"\x32" + _varint(len(deep)) + deep
    far = 2**32 - 1
    search = [
        {"code": b"ab", "k": far},
        {"code": b"ab", "k": MAX_K, "radius": far, "after": {"distance": far, "id": 2**64 - 1}},
        {"code": b"ab", "k": MAX_K, "include": [1, 2, 3, 4, 5] * 1000},
        {"code": b"ab", "k": 1, "include": [99, -1]},
        {"code": b"ab", "k": 1, "min_coverage": float("nan")},
        {"code": b"ab", "k": 1, "min_coverage": float("inf")},
        {"code": bytes(15 * 2**20), "k": 1},
        {"key": "\0" * 4096, "k": 1},
        {"key": "'; DROP TABLE rows; --", "k": 1},
        {"key": "x" * 10**6, "k": 1},
        {"text": "a " * 10**6, "k": 1},
        {"text": "\ufffe\u202e" * 500, "k": 1},
        {"filter": "x" * 10**6, "code": b"ab", "k": 1},
        {"examples": {"positives": [{"key": "place/1.tif"}] * 10**5}, "k": 1},
        {"examples": {"negatives": [{}] * 64}, "k": 1},
        {"examples": {"positives": [{"key": "place/1.tif", "weight": float("nan")}]}, "k": 1},
        {"examples": {"positives": [{"key": "place/1.tif", "weight": -1e308}]}, "k": 1},
        *({"vector": vector, "k": 1} for vector in VECTORS),
    ]
    requests = [(SEARCH, pb.SearchRequest(**fields)) for fields in search]
    query = pb.SearchRequest(code=b"ab", k=1)
    row = pb.Row(key="r", code=b"ab")
    requests += [
        (MANY, pb.SearchManyRequest()),
        (MANY, pb.SearchManyRequest(requests=[query] * 257)),
        (MANY, pb.SearchManyRequest(requests=[pb.SearchRequest()] * 10**5)),
        (UPSERT, pb.UpsertRequest()),
        (UPSERT, pb.UpsertRequest(rows=[row] * 1001)),
        (UPSERT, pb.UpsertRequest(rows=[pb.Row(key="r", code=b"ab", lon=float("nan"))])),
        (UPSERT, pb.UpsertRequest(rows=[pb.Row(key="r", code=b"ab", datetime={"seconds": 2**62})])),
        (UPSERT, pb.UpsertRequest(rows=[pb.Row(key="r", code=b"ab", datetime={"nanos": -(2**31)})])),
        (UPSERT, pb.UpsertRequest(rows=[pb.Row(key="r\n", code=b"ab")])),
        *((UPSERT, pb.UpsertRequest(rows=[pb.Row(key="r", vector=vector)])) for vector in VECTORS),
        (UPSERT, pb.UpsertRequest(rows=[pb.Row(key="r", code=b"ab", footprint=b"no WKB")])),
        (UPSERT, pb.UpsertRequest(rows=[pb.Row(key=f"r{i}", image=b"no image") for i in range(1000)])),
        (UPDATE, pb.UpdateRequest()),
        (UPDATE, pb.UpdateRequest(updates=[pb.RowUpdate()])),
        (UPDATE, pb.UpdateRequest(updates=[pb.RowUpdate(row=row, columns={"paths": ["label"]})])),
        (UPDATE, pb.UpdateRequest(updates=[pb.RowUpdate(row={"key": "r"}, columns={"paths": ["code", "a.b"]})])),
        (UPDATE, pb.UpdateRequest(updates=[pb.RowUpdate(row={"key": "r"}, columns={"paths": ["label"] * 10**5})])),
        (GET, pb.GetRequest()),
        (GET, pb.GetRequest(keys=["x"] * 1001)),
        (GET, pb.GetRequest(keys=["\n"] * 1000)),
        (COUNT, pb.CountRequest(filter="x" * 10**6)),
        (SCROLL, pb.ScrollRequest()),
        (SCROLL, pb.ScrollRequest(limit=far, after=2**64 - 1)),
        (SCROLL, pb.ScrollRequest(limit=5, include=[3] * 100)),
        (DELETE, pb.DeleteRequest(keys=["x"] * 1001)),
        (DELETE, pb.DeleteRequest(keys=["\n"] * 1000)),
        (DELETE, pb.DeleteRequest(keys=["x"], filter="lon > 1")),
        (DELETE, pb.DeleteRequest(filter="x" * 10**6)),
        (DELETE, pb.DeleteRequest(keys=["' OR 1=1 --", "\\", "%", "a" * 4096])),
        (REFRESH, pb.RefreshRequest(archive="/etc/passwd")),
        (REFRESH, pb.RefreshRequest(archive="\0")),
        (
            REFRESH,
            pb.RefreshRequest(archive="a" * 9999),
        ),
    ]

    async def scenario(fuzzed, rng):
        for method, request in requests:
            code, _ = await fuzzed.send(method, request.SerializeToString())
            assert code in (
                grpc.StatusCode.OK,
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.NOT_FOUND,
            ), (method, str(request)[:200])
        for data in (deep, b"\x1a\xff\xff\xff\xff\x0f", b"\x0a" + _varint(2**31 - 1)):
            await fuzzed.send(SEARCH, data)
        # A message above the limit, and an unknown method.
        assert (await fuzzed.send(SEARCH, bytes(17 * 2**20)))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await fuzzed.send("orbithash.v1.SearchService/Nothing", b""))[0] == grpc.StatusCode.UNIMPLEMENTED

    fuzz(scenario)


def _varint(number):
    data = b""
    while number > 127:
        data += bytes([number & 127 | 128])
        number >>= 7
    return data + bytes([number])


FILTERS = [
    "label = 'class 1' AND NOT lon > 3",
    "S_INTERSECTS(footprint, POLYGON((3 50, 4 50, 4 51, 3 51, 3 50)))",
    "key LIKE 'place/1%' OR label IN ('class 1', 'class 2')",
    "datetime >= DATE('2024-05-01') AND lon BETWEEN -10 AND 10",
    "T_INTERSECTS(datetime, INTERVAL('2020-01-01', '..')) OR caption IS NULL",
]
WORDS = ["AND", "OR", "NOT", "(", ")", "label", "=", "'", "''", "lon", "1e999", "-", ",", "NULL", "IN", "🛰", "\\", "%"]
DEEP = [
    "(" * 2000 + "lon > 1" + ")" * 2000,
    "NOT " * 1000 + "lon > 1",
    "lon > " + "-" * 3000 + "1",
    "lon > 1" + " AND lon > 1" * 300,
    "lon > " + "(1 + " * 700 + "1" + ")" * 700,
    "NOT(" * 900 + "lon > 1" + ")" * 900,
    "key LIKE '" + "%a" * 2000 + "'",
    "lon = " + "9" * 4000,
    "label IN (" + ",".join(["'x'"] * 1000) + ")",
    "S_INTERSECTS(footprint, GEOMETRYCOLLECTION(" + "GEOMETRYCOLLECTION(" * 150 + "POINT(1 2)" + ")" * 151 + ")",
    "casei(" * 600 + "label" + ")" * 600 + " = 'x'",
    "a_equals(" * 400 + "lon" + ")" * 400,
    "lon > 1 " + "+ 1 " * 1000,
    "lon ^ lon" * 400,
]


def test_filters(fuzz):
    async def scenario(fuzzed, rng):
        texts = [text[:MAX_FILTER_CHARS] for text in DEEP]
        for i in range(100):
            text = FILTERS[i % len(FILTERS)]
            match i % 3:
                case 0:
                    text = mutated(rng, text.encode()).decode(errors="replace")
                case 1:
                    words = text.split(" ")
                    for _ in range(rng.randrange(1, 4)):
                        words[rng.randrange(len(words))] = rng.choice(WORDS)
                    text = " ".join(words)
                case 2:
                    text = " ".join(rng.choices(WORDS, k=rng.randrange(1, 60)))
            texts.append(text)
        for text in texts:
            request = pb.SearchRequest(code=b"ab", k=5, filter=text)
            code, _ = await fuzzed.send(SEARCH, request.SerializeToString())
            assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT), text[:200]

    fuzz(scenario)


def test_images(fuzz):
    pixels = picture(3, 96)
    bands = np.random.default_rng(SEED).integers(0, 4096, (64, 64, 4)).astype(np.uint16)
    good = [
        encoded(pixels, "PNG"),
        encoded(pixels, "JPEG"),
        encoded(pixels, "TIFF"),
        geotiff(bands, compress="deflate", tiled=True, blockxsize=16, blockysize=16),
        geotiff(pixels, compress="lzw"),
        geotiff(pixels, compress="jpeg", photometric="YCBCR"),
    ]

    async def scenario(fuzzed, rng):
        images = []
        for i in range(200):
            image = good[i % len(good)]
            if i % 3 == 0:
                # The header, where the sizes are.
                head = mutated(rng, image[:80])
                image = head + image[80:]
            else:
                image = mutated(rng, image)
            images.append(image or b"\0")
        for start in range(0, len(images), 4):
            requests = [pb.SearchRequest(image=image, k=3) for image in images[start : start + 4]]
            outcomes = await asyncio.gather(*(fuzzed.send(SEARCH, each.SerializeToString()) for each in requests))
            for code, message in outcomes:
                assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT), message

    outcomes = fuzz(scenario)
    assert sum(outcomes.values()) == 200
    assert outcomes[grpc.StatusCode.INVALID_ARGUMENT] > 50


def test_bombs(fuzz):
    bombs = [
        png(50_000, 50_000, rows=bytes(10_000)),
        png(50_000, 50_000, depth=16),
        png(6000, 6000, rows=bytes(6000 * (1 + 3 * 6000))),
        bomb_tiff(8000),
        bomb_tiff(5000),
        geotiff(np.zeros((64, 64, 1000), np.uint8), compress="deflate"),
        geotiff(np.zeros((16, 16, 2000), np.uint8), compress="deflate"),
    ]

    async def scenario(fuzzed, rng):
        for image in bombs:
            code, message = await fuzzed.send(SEARCH, pb.SearchRequest(image=image, k=3).SerializeToString())
            assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT), message
        many = pb.SearchManyRequest(requests=[pb.SearchRequest(image=png(50_000, 50_000), k=3)] * 256)
        assert (await fuzzed.send(MANY, many.SerializeToString()))[0] == grpc.StatusCode.OK

    fuzz(scenario)

"""Measure the page in Chromium: precision of typed sentences, time from Enter to drawn tiles, frames while scrolling.

    measure_page.py sentences|draw|scroll URL --gateway HOST:PORT --run RUN
    measure_page.py unseen|repeat ARCHIVE --run RUN --out ARCHIVE

URL is the page of that gateway, and RUN the run folder of its model, whose manifest has the sentences of the test part.
`unseen` writes the rows of an archive that training has not seen to another archive, `repeat` 1,000,000 rows that
resemble its rows, at random places.
Each prints one JSON object.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import shapely
from page_services import CHROMIUM_FLAGS
from playwright.sync_api import sync_playwright

from orbithash.encoders.archive.archive import Archive
from orbithash.search.client import Client
from orbithash.trainers.datasets import MANIFEST, Manifest

NUM_SENTENCES, NUM_TIMES, NUM_TILES, NUM_ROWS = 20, 30, 2000, 1_000_000
# Time of the first row, and between rows, microseconds.
FIRST_US, STEP_US = 1_577_836_800_000_000, 150_000_000

# `window.measured` resolves to the milliseconds from Enter until the tiles on the screen are decoded and painted.
TIMER = """
() => {
    window.measured = new Promise(resolve => {
        let began = null;
        document.addEventListener("keydown", event => { if (event.key === "Enter") began = event.timeStamp; }, true);
        document.addEventListener("orbithash:answer", async () => {
            const seen = [...document.querySelectorAll("article.tile img")].filter(image => {
                const box = image.getBoundingClientRect();
                return box.bottom > 0 && box.top < innerHeight;
            });
            await Promise.all(seen.map(image => image.decode()));
            // The frame with the pictures has been painted when the task after its callback runs.
            requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - began)));
        }, {once: true});
    });
}
"""

FRAMES = """
() => {
    window.frames_ms = [];
    window.long_frames = [];
    let last = null;
    const tick = now => {
        if (last !== null) window.frames_ms.push(now - last);
        last = now;
        window.ticking = requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
    if (PerformanceObserver.supportedEntryTypes.includes("long-animation-frame"))
        new PerformanceObserver(list => {
            for (const entry of list.getEntries()) window.long_frames.push(entry.duration);
        }).observe({type: "long-animation-frame"});
}
"""


def main() -> None:
    """Run the measurement that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sentences", "draw", "scroll", "unseen", "repeat"))
    parser.add_argument("url", help="address of the page, or archive")
    parser.add_argument("--out", help="archive to write")
    parser.add_argument("--gateway", default="127.0.0.1:50051", help="HOST:PORT of the gateway behind the page")
    parser.add_argument("--run", type=Path, required=True, help="run folder of the model: its manifest has sentences")
    given = parser.parse_args()
    if given.what in ("unseen", "repeat"):
        write_archive(given)
        return
    with sync_playwright() as driver:
        path = shutil.which("chromium") or sys.exit("needs Chromium on the PATH")
        chromium = driver.chromium.launch(executable_path=path, args=list(CHROMIUM_FLAGS))
        page = chromium.new_page(viewport={"width": 1440, "height": 900})
        page.goto(f"{given.url}/?q=trees")
        page.locator("article.tile").first.wait_for()
        measure = {"sentences": measure_sentences, "draw": measure_draw, "scroll": measure_scroll}[given.what]
        print(json.dumps(measure(page, given), indent=2))
        chromium.close()


def write_archive(given) -> None:
    """Write an archive for the other measurements."""
    rows, source = lance.dataset(given.url).to_table(), Archive.open(given.url)
    archive = Archive.create(given.out, source.bits, source.model_id, source.vector)
    if given.what == "unseen":
        images = Manifest.read(given.run / MANIFEST).images
        splits = dict(zip(images.ids, images.splits, strict=True))
        chosen = rows.filter(pa.array([splits[key] != "train" for key in rows["key"].to_pylist()]))
        archive.commit(Archive.write_fragments(given.out, chosen.replace_schema_metadata(None)))
        return
    rng, fragments = np.random.default_rng(0), []
    codes, vectors = (np.array(rows[name].to_pylist()) for name in ("code", "vector"))
    for start in range(0, NUM_ROWS, NUM_ROWS // 10):
        numbers = np.arange(start, start + NUM_ROWS // 10)
        number, count = numbers % len(rows), len(numbers)
        flips = np.packbits(rng.random((count, source.bits)) < 0.05, axis=1)
        noisy = np.clip(vectors[number] + rng.integers(-6, 7, (count, vectors.shape[1])), -127, 127)
        lon, lat = rng.uniform(-180, 180, count), rng.uniform(-75, 80, count)
        table = rows.take(pa.array(number)).replace_schema_metadata(None)
        keys = [f"{label}/{i:07d}.jpg" for label, i in zip(table["label"].to_pylist(), numbers.tolist(), strict=True)]
        columns = {
            "key": keys,
            "uri": [f"file:///tiles/{key}" for key in keys],
            "code": fixed_lists(codes[number] ^ flips, np.uint8),
            "vector": fixed_lists(noisy, np.int8),
            "lon": lon,
            "lat": lat,
            "datetime": pa.array(FIRST_US + STEP_US * numbers).cast(table.schema.field("datetime").type),
            "footprint": pa.array(shapely.to_wkb(shapely.box(lon - 0.01, lat - 0.01, lon + 0.01, lat + 0.01))),
        }
        for name, values in columns.items():
            field = table.schema.field(name)
            column = values if isinstance(values, pa.Array) else pa.array(values)
            table = table.set_column(table.schema.get_field_index(name), field, column.cast(field.type))
        fragments += Archive.write_fragments(given.out, table)
    archive.commit(fragments)


def fixed_lists(values, dtype) -> pa.Array:
    """Return rows of numbers [N, d] as an Arrow array of lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(dtype).reshape(-1)), values.shape[1])


def sentences_of(run: Path) -> dict[str, list[str]]:
    """Return the captions of the images of the test part by class."""
    manifest = Manifest.read(run / MANIFEST)
    sentences: dict[str, list[str]] = {}
    for image in manifest.part("test"):
        sentences.setdefault(manifest.classes[image.label], []).extend(image.captions)
    return sentences


def ask(page, sentence: str) -> float:
    """Type a sentence, press Enter and return the milliseconds until its answer is drawn."""
    page.evaluate(TIMER)
    page.locator("#q").fill(sentence)
    page.locator("#q").press("Enter")
    return page.evaluate("window.measured")


def measure_sentences(page, given) -> dict:
    """Type one sentence of each of 20 classes; precision at 10: the share of the first ten tiles of its class."""
    by_class = sentences_of(given.run)
    draw = random.Random(0)
    chosen = [(name, draw.choice(by_class[name])) for name in draw.sample(sorted(by_class), NUM_SENTENCES)]
    results = []
    for name, sentence in chosen:
        ask(page, sentence)
        labels = page.locator("article.tile .label").all_text_contents()[:10]
        results.append({"class": name, "sentence": sentence, "precision": labels.count(name) / 10})
    return {"precision_at_10": statistics.mean(result["precision"] for result in results), "sentences": results}


def measure_draw(page, given) -> dict:
    """Return the time from Enter to drawn, beside the gateway's for the same query, over 30 sentences."""
    sentences = sorted({text for texts in sentences_of(given.run).values() for text in texts})
    random.Random(1).shuffle(sentences)
    drawn, gateway = [], []
    with Client(given.gateway) as client:
        for sentence in sentences[: NUM_TIMES + 3]:
            drawn.append(ask(page, sentence))
            began = time.perf_counter()
            # What the page asks for: the same number of hits with their pictures.
            client.search(text=sentence, k=60, include=("thumbnail", "caption", "footprint"))
            gateway.append(1000 * (time.perf_counter() - began))
    # The first ones warm up connections and caches.
    pairs = list(zip(drawn[3:], gateway[3:], strict=True))
    extra = sorted(one - other for one, other in pairs)
    return {
        "rows": int("".join(filter(str.isdigit, page.locator(".archive").inner_text()))),
        "enter_to_drawn_ms": summary([one for one, _ in pairs]),
        "gateway_ms": summary([other for _, other in pairs]),
        "difference_ms": summary(extra),
    }


def summary(values: list[float]) -> dict:
    """Return median, 95th percentile and maximum."""
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 1),
        "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 1),
        "max": round(ordered[-1], 1),
        "count": len(ordered),
    }


def measure_scroll(page, given) -> dict:
    """Scroll through 2,000 hits by the wheel and return the longest frames."""
    (sentence, *_) = sorted(next(iter(sentences_of(given.run).values())))
    ask(page, sentence)
    page.evaluate(FRAMES)
    page.mouse.move(400, 600)
    count = "document.querySelectorAll('article.tile').length"
    while page.evaluate(count) < NUM_TILES:
        page.mouse.wheel(0, 300)
        page.evaluate("new Promise(requestAnimationFrame)")
    frames = page.evaluate("window.frames_ms")
    return {
        "tiles": page.evaluate(count),
        "frames": len(frames),
        "frame_ms": summary(frames),
        "long_animation_frames_ms": sorted(
            (round(value) for value in page.evaluate("window.long_frames")), reverse=True
        )[:10],
    }


if __name__ == "__main__":
    main()

"""Encoding on Ray Data: a source of images becomes rows of an archive.

    list (driver) -> decode -> encode (actor pool) -> write fragments (tasks) -> commit (driver)

The driver works in portions: it lists until so many images are found that the archive does not have, runs the stages
(`encode_stages`) over them, and forgets them. Where decoding and encoding ask for equal resources, Ray Data fuses them
into one actor, and no pixels are copied. What a refused image leaves is a row of the archive's side table. Nothing is
visible before the driver's commit, and every commit is atomic: a job that dies at any moment goes on, when it is run
again, with the images that are in neither table. A node that dies takes its work with it, which Ray does again.
"""

import dataclasses
import itertools
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from orbithash.cluster.encoding.commits import Commits
from orbithash.cluster.encoding.stages import STAGES, Encoder, decode, item_table, rows_within, write
from orbithash.cluster.output import say, track
from orbithash.cluster.runtime import check_resources, connected, parse_workers, worker_error
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.georeference import check_projections
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.sources import Item, count_source, iter_source
from orbithash.encoders.networks.card import read_model_folder

__all__ = ["EncodeSummary", "Job", "Tally", "Workers", "encode", "new_items", "run_portion", "writing"]

# New images that one run of the stages takes: a start of Ray Data's actors is some seconds, an image in the driver some
# hundred bytes.
PORTION = 2**20

# Keys that are looked up in the archive together.
LOOK_UP = 10_000

# Images in a batch of the stages that touch pixels, and in a block of the list unless there would be too many blocks.
BATCH_SIZE = 64
MAX_BLOCKS = 4096

# Rows in a fragment: what a killed job repeats at most, times the number of writers, besides what waits for a commit.
ROWS_PER_COMMIT = 1024

# Decoding and encoding get half a core each of what the other leaves; the kernel balances them, whichever is heavier.
DECODE_CPUS = 0.5
ENCODE_CPUS = 0.5
WRITE_CPUS = 0.25

# Of an archive in which nothing was committed yet.
FIRST_VERSION = 1

# Refused images that are told one by one.
NUM_TOLD = 10

# No stage takes this long for a batch; a stall is an error and not a silence.
NO_PROGRESS_TIMEOUT_S = 600


@dataclasses.dataclass(frozen=True)
class Workers:
    """How many actors encode: between `low` and `high`, which is the number of CPUs (or GPUs) where None.

    Each has `gpus`, which may be a part of one; None is 1 where the cluster has any, else 0.
    """

    low: int = 1
    high: int | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.gpus is not None and not (0 <= self.gpus <= 1 or (self.gpus > 1 and float(self.gpus).is_integer())):
            raise InputError(
                f"--gpus-per-worker is {self.gpus:g}; a part of a GPU such as 0.25, a whole number, or 0 for none"
            )

    @classmethod
    def parse(cls, text: str | None, gpus: float | None = None) -> "Workers":
        """`MIN:MAX`, or one number for both."""
        return cls(gpus=gpus) if text is None else cls(*parse_workers(text), gpus)

    def on_cluster(self) -> tuple[int, int, float]:
        """Fewest and most actors, and GPUs of each, on the cluster as it is; `InputError` where it has too little."""
        import ray

        gpus = (1 if ray.cluster_resources().get("GPU") else 0) if self.gpus is None else self.gpus
        check_resources(
            f"encoding with {self.low} workers",
            [{"CPU": DECODE_CPUS}, *[{"CPU": ENCODE_CPUS, "GPU": gpus}] * self.low],
        )
        have = ray.cluster_resources()
        high = self.high or max(1, int(have["GPU"] / gpus if gpus else have["CPU"]))
        return self.low, max(self.low, high), gpus


@dataclasses.dataclass(frozen=True)
class EncodeSummary:
    """What one run of `encode` did.

    `num_listed` images in the source, of which `num_done_before` were in the archive already; `num_encoded` and
    `num_refused` now. `start_s` passed until the first batch reached a network, `encode_s` from then to the last
    commit. `worker_s` has the seconds that all workers together were busy in each stage, and `worker_images_per_s` the
    images that one worker, busy with that stage alone, does a second: images by `worker_s`.
    """

    num_listed: int
    num_done_before: int
    num_encoded: int
    num_refused: int
    start_s: float
    encode_s: float
    rows_per_s: float
    worker_s: dict[str, float]
    worker_images_per_s: dict[str, float]
    rows_in_archive: int

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """What a person wants to know."""
        refused = f", refused {self.num_refused} (see the archive's side table)" if self.num_refused else ""
        before = f", {self.num_done_before} were done before" if self.num_done_before else ""
        rate = f" at {self.rows_per_s:.0f}/s after {self.start_s:.1f} s of start-up" if self.num_encoded else ""
        text = (
            f"encoded {self.num_encoded} of {self.num_listed} images{rate}{before}{refused}; the archive has "
            f"{self.rows_in_archive} rows"
        )
        if self.worker_images_per_s:
            stages = ", ".join(
                f"{name} {self.worker_s[name]:.1f} s ({rate:.0f}/s)" for name, rate in self.worker_images_per_s.items()
            )
            text += f"\nworkers were busy for (and one of them, with that alone, would do): {stages}"
        return text


@dataclasses.dataclass
class Tally:
    """What a run has done so far."""

    num_done_before: int = 0
    num_encoded: int = 0
    num_refused: int = 0
    start_s: float = 0.0
    encode_s: float = 0.0
    worker_s: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def add(self, result: dict[str, Any]) -> list[tuple[str, str]]:
        """Counts what `write` tells, and says the first reasons; returns (key, reason) of what was refused."""
        refused = list(zip(result["refused"], result["reasons"], strict=True))
        for key, reason in refused[: max(0, NUM_TOLD - self.num_refused)]:
            say(f"refused {key}: {reason}")
        self.num_encoded += result["num_rows"]
        self.num_refused += len(refused)
        for stage in STAGES:
            self.worker_s[stage] += result[f"{stage}_s"]
        return refused

    def summary(self, num_listed: int, rows_in_archive: int) -> EncodeSummary:
        """The summary of a run that ends now."""
        num = self.num_encoded + self.num_refused
        return EncodeSummary(
            num_listed=num_listed,
            num_done_before=self.num_done_before,
            num_encoded=self.num_encoded,
            num_refused=self.num_refused,
            start_s=self.start_s,
            encode_s=self.encode_s,
            rows_per_s=num / self.encode_s if self.encode_s else 0.0,
            worker_s=self.worker_s,
            worker_images_per_s={stage: num / seconds for stage, seconds in self.worker_s.items() if seconds},
            rows_in_archive=rows_in_archive,
        )


@dataclasses.dataclass(frozen=True)
class Job:
    """What is encoded, with what, into what."""

    source: str
    tile_px: int | None
    model: Path
    preprocessing: Preprocessing
    bits: int
    model_id: str
    archive: str
    workers: Workers
    asset: str | None = None

    @classmethod
    def of(
        cls, source: str, model: Path, archive: str, workers: Workers, tile_px: int | None, asset: str | None = None
    ) -> "Job":
        """Return the job; `InputError` for an invalid model folder, or if no image could get a place."""
        check_projections()
        card, model_id, _ = read_model_folder(model)
        return cls(source, tile_px, model.absolute(), card.preprocessing, card.bits, model_id, archive, workers, asset)


def encode(
    source: str,
    model: Path,
    archive: str,
    workers: Workers | None = None,
    tile_px: int | None = None,
    asset: str | None = None,
) -> EncodeSummary:
    """Encodes what of `source` the archive does not hold yet.

    Raises `InputError` for a source, model or archive that does not fit; an image that cannot be read is no error but
    a row of the side table.
    """
    job = Job.of(source, model, archive, workers or Workers(), tile_px, asset)
    num_listed = count_source(source, tile_px, asset)
    target = Archive.open_or_create(archive, job.bits, job.model_id)
    tally, num_seen = Tally(), 0
    with ExitStack() as stack:
        stack.enter_context(writing(target))
        target.update_index()
        for todo, num_done in new_items(iter_source(source, tile_px, asset), target):
            tally.num_done_before += num_done
            num_seen += len(todo) + num_done
            seen = "" if num_seen == num_listed else f"looked through {num_seen} of "
            say(f"{seen}{num_listed} images in {source}, {tally.num_done_before} of them done before")
            if todo:
                stack.enter_context(connected())
                run_portion(job, todo, target, tally)
        return tally.summary(num_listed, target.num_rows)


@contextmanager
def writing(target: Archive) -> Iterator[None]:
    """The archive, for this process alone to write. A new one is gone again when the block fails without a row."""
    with target.writing():
        try:
            yield
        except BaseException:
            if target.version == FIRST_VERSION and not target.refused() and Path(target.path).is_dir():
                shutil.rmtree(target.path)
            raise


def new_items(items: Iterable[Item], target: Archive) -> Iterator[tuple[list[Item], int]]:
    """Portions of the items that the archive does not know, and how many it knew of those that were looked at."""
    items, todo, num_done = iter(items), [], 0
    while chunk := list(itertools.islice(items, LOOK_UP)):
        keys = [item.key for item in chunk]
        known = target.origins(keys).keys() | target.refused_stamps(keys).keys()
        num_done += len(known)
        todo += [item for item in chunk if item.key not in known]
        if len(todo) >= PORTION:
            yield todo, num_done
            todo, num_done = [], 0
    if todo or num_done:
        yield todo, num_done


def run_portion(job: Job, todo: list[Item], target: Archive, tally: Tally) -> None:
    """Encodes the items on Ray Data, commits as they come, and joins what was committed; this process is the writer."""
    import ray
    import ray.data

    low, high, gpus = job.workers.on_cluster()
    begun = first = time.time()
    size = rows_within(BATCH_SIZE, job.preprocessing)
    per_block = max(size, -(-len(todo) // MAX_BLOCKS))
    before = tally.num_encoded + tally.num_refused
    with _quiet_data(), track("encoding", len(todo), "images") as advance_to, Commits(target) as commits:
        results = (
            ray.data.from_arrow(
                [item_table(todo[start : start + per_block]) for start in range(0, len(todo), per_block)]
            )
            .map_batches(
                decode,
                fn_kwargs={"preprocessing": job.preprocessing},
                batch_size=size,
                batch_format="pyarrow",
                num_cpus=DECODE_CPUS,
            )
            .map_batches(
                Encoder,
                fn_constructor_kwargs={"model": job.model, "device": "cuda" if gpus else "cpu"},
                compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high),
                batch_size=size,
                batch_format="pyarrow",
                num_cpus=ENCODE_CPUS,
                num_gpus=gpus,
            )
            .map_batches(
                write,
                fn_kwargs={"archive": target.path},
                batch_size=ROWS_PER_COMMIT,
                batch_format="pyarrow",
                num_cpus=WRITE_CPUS,
            )
        )
        for number, result in enumerate(_rows(results)):
            commits.add(result["fragments"], tally.add(result))
            first = min(first, result["began"]) if number else result["began"]
            advance_to(
                tally.num_encoded + tally.num_refused - before,
                f"{tally.num_refused} refused" if tally.num_refused else "",
            )
    tally.start_s += first - begun
    tally.encode_s += time.time() - first
    target.optimize()
    target.clean_up()


def _rows(dataset: Any) -> Iterator[dict[str, Any]]:
    from ray.exceptions import RayError

    try:
        yield from dataset.iter_rows()
    except RayError as err:
        raise worker_error(err) from err


@contextmanager
def _quiet_data() -> Iterator[None]:
    """Ray Data without its own progress report, and with an end to waiting; its settings are global, so put back."""
    import ray.data

    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.execution_no_progress_timeout_s
    logger = logging.getLogger("ray.data")
    level = logger.level
    context.enable_progress_bars, context.execution_no_progress_timeout_s = False, NO_PROGRESS_TIMEOUT_S
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        context.enable_progress_bars, context.execution_no_progress_timeout_s = before
        logger.setLevel(level)

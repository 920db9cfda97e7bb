"""Encoding on Ray Data: a source of images becomes rows of an archive.

    list (driver) -> decode -> encode (actor pool) -> write fragments (tasks) -> commit (driver)

The driver works in portions: it lists until it has a number of items that the archive does not have, runs the stages
(`stages.py`) over them, and forgets them. Where decoding and encoding ask for equal resources, Ray Data fuses them into
one actor, and no pixels are copied. Refused items go to the side table of the archive. Nothing is visible before the
driver's commit, and every commit is atomic: a job that dies at any moment and is run again continues with the items
that are in neither table. Ray repeats the work of a node that dies.
"""

import dataclasses
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from orbithash.cluster.encoding.commits import Commits
from orbithash.cluster.encoding.items import Portion, Source, new_items
from orbithash.cluster.encoding.stages import Encoder, Written, decode, item_table, rows_within, write
from orbithash.cluster.encoding.summary import EncodeSummary, Tally
from orbithash.cluster.output import say, track
from orbithash.cluster.runtime import check_gpu_share, check_resources, connected, parse_workers, worker_error
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.imagery.georeference import check_projections
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks.card import read_model_folder
from orbithash.encoders.sources.folders import log_left_out
from orbithash.encoders.vectors import VectorSpec

__all__ = ["EncodeSummary", "Job", "Workers", "data_results", "encode", "quiet_data", "run_portion", "writing"]

# Images in a batch of the stages that touch pixels; and in a block of the list, unless that gives too many blocks.
BATCH_SIZE = 64
MAX_BLOCKS = 4096

# Rows in a fragment. A killed job repeats at most this number for each writer, besides rows that wait for a commit.
ROWS_PER_COMMIT = 1024

# Decoding and encoding share the CPUs: half a core each, and the kernel gives more to the heavier one.
DECODE_CPUS = 0.5
ENCODE_CPUS = 0.5
WRITE_CPUS = 0.25

# Seconds to wait for the right to write: longer than a commit of a gateway, which takes turns with others.
LOCK_S = 2.0

# Catalogs whose numbers of items are printed.
_MAX_GROUPS = 10

# Version of an archive before the first commit.
FIRST_VERSION = 1

# Longest time of a stage for a batch, seconds; a stall becomes an error.
NO_PROGRESS_TIMEOUT_S = 600


@dataclasses.dataclass(frozen=True)
class Workers:
    """The actors that encode.

    Attributes:
        low: minimum number.
        high: maximum number; None: limited by the CPUs (or GPUs) of the cluster.
        gpus: GPUs of each, also a fraction of one; None: 1 if the cluster has any, else 0.
    """

    low: int = 1
    high: int | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.gpus is not None:
            check_gpu_share("--gpus-per-worker", self.gpus, is_whole=False)

    @classmethod
    def parse(cls, text: str | None, gpus: float | None = None) -> "Workers":
        """Parse `MIN:MAX`, or one number for both; None: the defaults."""
        return cls(gpus=gpus) if text is None else cls(*parse_workers(text), gpus)

    def on_cluster(self) -> tuple[int, int, float]:
        """Return the minimum and maximum number of actors and the GPUs of each; `InputError` when these are too few."""
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
class Job:
    """A source, the model that encodes it, and the archive that the codes go to."""

    source: Source
    model: Path
    preprocessing: Preprocessing
    bits: int
    model_id: str
    vector: VectorSpec | None
    archive: str
    workers: Workers
    retry_refused: bool = False

    @classmethod
    def of(cls, source: Source, model: Path, archive: str, workers: Workers, retry_refused: bool = False) -> "Job":
        """Return the job; `InputError` for an invalid model folder, or if no image could get a place."""
        check_projections()
        card, model_id, _ = read_model_folder(model)
        model, vector = model.absolute(), card.vector
        return cls(source, model, card.preprocessing, card.bits, model_id, vector, archive, workers, retry_refused)


def encode(
    source: str,
    model: Path,
    archive: str,
    workers: Workers | None = None,
    tile_px: int | None = None,
    asset: str | None = None,
    *,
    prefix: str = "",
    captions: Path | None = None,
    retry_refused: bool = False,
) -> EncodeSummary:
    """Encode the items of `source` that the archive does not have, or has of other content.

    An item that cannot be read is not an error; it goes to the side table. Rows that were deleted are encoded again,
    because the archive does not record deletions.

    Args:
        source: a folder, image, list, table, STAC collection or URI (see `iter_source`).
        model: model folder.
        archive: archive to create or to extend.
        workers: actors that encode.
        tile_px: side of the tiles that scenes are cut into.
        asset: key of the asset to read in each STAC item.
        prefix: put before all keys.
        captions: JSON file of sentences about the images of a folder.
        retry_refused: read refused items again although they have not changed.

    Raises:
        InputError: a source, model or archive that does not fit, or a key that another image has.
    """
    job = Job.of(Source(source, tile_px, asset, prefix, captions), model, archive, workers or Workers(), retry_refused)
    left_out, groups = Counter[str](), Counter[str]()
    num_listed = job.source.count(left_out, groups)
    log_left_out(source, left_out)
    if groups:
        say(f"{source}: {_shown(groups)}")
    target = Archive.open_or_create(archive, job.bits, job.model_id, job.vector)
    tally, num_seen = Tally(left_out=left_out, groups=groups), 0
    with ExitStack() as stack:
        stack.enter_context(writing(target))
        target.update_index()
        for portion in new_items(job.source.items(Counter()), target, retry_refused):
            tally.add_known(portion)
            num_seen += portion.num_items
            seen = "" if num_seen == num_listed else f"looked through {num_seen} of "
            before = f", {tally.num_refused_before} refused before" if tally.num_refused_before else ""
            say(f"{seen}{num_listed} images in {source}, {tally.num_done_before} of them done before{before}")
            if portion.items:
                stack.enter_context(connected())
                run_portion(job, portion, target, tally)
            target.unrefuse(sorted(portion.resolved))
        return tally.summary(num_listed, target.num_rows)


def _shown(groups: Counter[str]) -> str:
    """Return the numbers of STAC items by catalog, collection or file as a text."""
    first = ", ".join(f"{number} in {name[:80]!r}" for name, number in groups.most_common(_MAX_GROUPS))
    more = f", and others in {len(groups) - _MAX_GROUPS} more" if len(groups) > _MAX_GROUPS else ""
    return f"{groups.total()} STAC items: {first}{more}"


@contextmanager
def writing(target: Archive) -> Iterator[None]:
    """Hold the right to write the archive. A new archive is removed when the block fails before the first row."""
    with target.writing(LOCK_S):
        try:
            yield
        except BaseException:
            if target.version == FIRST_VERSION and not target.refused() and Path(target.path).is_dir():
                shutil.rmtree(target.path)
            raise


def run_portion(job: Job, portion: Portion, target: Archive, tally: Tally) -> None:
    """Encode the items on Ray Data, commit as results arrive, and optimize the archive; this process is the writer."""
    import ray
    import ray.data

    low, high, gpus = job.workers.on_cluster()
    begun = first = time.time()
    size = rows_within(BATCH_SIZE, job.preprocessing)
    items, num_before, refused = portion.items, tally.num_read, set[str]()
    per_block = max(size, -(-len(items) // MAX_BLOCKS))
    with quiet_data(), track("encoding", len(items), "images") as advance_to, Commits(target) as commits:
        results = (
            ray.data.from_arrow(
                [
                    item_table(items[start : start + per_block], portion.replacing)
                    for start in range(0, len(items), per_block)
                ]
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
        for number, written in enumerate(data_results(results)):
            commits.add(written)
            tally.add(written)
            refused.update(written.refused)
            first = min(first, written.began) if number else written.began
            advance_to(tally.num_read - num_before, f"{tally.num_refused} refused" if tally.num_refused else "")
    target.unrefuse(sorted(portion.retried - refused))
    tally.start_s += first - begun
    tally.encode_s += time.time() - first
    target.optimize()
    target.clean_up()


def data_results(dataset: Any) -> Iterator[Written]:
    """Yield what each task has written; turn errors of workers into ours."""
    from ray.exceptions import RayError

    try:
        for row in dataset.iter_rows():
            yield Written(**{name: _plain(value) for name, value in row.items()})
    except RayError as err:
        raise worker_error(err) from err


@contextmanager
def quiet_data() -> Iterator[None]:
    """Turn off Ray Data's own progress report and limit its waiting. Its settings are global and are restored."""
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


def _plain(value: Any) -> Any:
    """Return a value of a row of Ray Data as Python's own type."""
    return value.tolist() if hasattr(value, "tolist") else value

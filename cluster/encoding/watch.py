"""Continuous encoding: what arrives in a source becomes rows of the archive within seconds, until it is stopped.

A few new images are encoded in this process, where the network stays loaded; many at once go through Ray Data, as at
the first look. The right to write the archive is held only during a commit, or while Ray Data runs, so that a gateway
of the same archive can make changes in between.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from orbithash.cluster.encoding.commits import commit
from orbithash.cluster.encoding.encode import EncodeSummary, Job, Workers, run_portion
from orbithash.cluster.encoding.items import Portion, Source, new_items
from orbithash.cluster.encoding.stages import Encoder, Written, decode, item_table, rows_within, write
from orbithash.cluster.encoding.summary import Tally
from orbithash.cluster.output import say
from orbithash.cluster.runtime import connected
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.stamps import file_version
from orbithash.encoders.errors import ArchiveBusy, InputError
from orbithash.encoders.sources.sources import EmptySource, Item, cut_scenes

__all__ = ["watch"]

# Seconds between two looks at the source; and, for sources of very many images, as a multiple of the time of a look.
LOOK_EVERY_S = 1.0
LOOK_SHARE = 3

# More new images than this are encoded by Ray Data.
MAX_ENCODED_HERE = 1024

# Images of a commit, and of a batch of the stages, when they are encoded here.
COMMIT_ROWS = 256
BATCH_SIZE = 64

# Commits between two times that fragments are joined, where that is worthwhile.
OPTIMIZE_EVERY = 16


def watch(
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
    """Encode the images that are in `source` and that arrive there, until SIGTERM or Ctrl-C.

    A file is encoded when its size and times were the same at two looks, and again when they change. Files that a list
    names may come later. Arguments are those of `encode`; `retry_refused` concerns the first look.

    Raises:
        InputError: as `encode`. A source that becomes unreadable later, and an archive that others write, are reported
            and tried again.
    """
    job = Job.of(Source(source, tile_px, asset, prefix, captions), model, archive, workers or Workers(), retry_refused)
    with suppress(EmptySource):
        next(job.source.items())
        job.source.count()
    watcher = _Watcher(job, Archive.open_or_create(archive, job.bits, job.model_id, job.vector))
    with _stopped_by_signals():
        say(f"watching {source}; Ctrl-C or SIGTERM ends it")
        watcher.run()
    return watcher.summary()


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """End the block without an error at SIGTERM and Ctrl-C."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    # Ray's own handler of SIGTERM, which it sets when it starts, exits.
    except (KeyboardInterrupt, SystemExit):
        say("stopping")
    finally:
        signal.signal(signal.SIGTERM, before)


class _Watcher:
    def __init__(self, job: Job, target: Archive) -> None:
        self._job = job
        self._target = target
        self._tally = Tally()
        self._encoder: Encoder | None = None
        self._num_commits = 0
        self._retry_refused = job.retry_refused
        # Versions of whole images and scenes, by key: when they were encoded, and at the last look if they were not.
        self._taken: dict[str, str] = {}
        self._seen: dict[str, str] = {}
        self._problem = ""

    def run(self) -> None:
        while True:
            begun = time.monotonic()
            if settled := self._look():
                try:
                    self._encode(settled)
                except ArchiveBusy as error:
                    self._say_once(f"{error}; trying again")
                else:
                    self._problem = ""
                    self._take(settled)
            time.sleep(max(LOOK_EVERY_S, LOOK_SHARE * (time.monotonic() - begun) if not settled else 0))

    def summary(self) -> EncodeSummary:
        self._target.refresh()
        return self._tally.summary(len(self._taken), self._target.num_rows)

    def _look(self) -> list[Item]:
        """Return the items that are new or changed, and did not change since the last look; scenes are whole."""
        settled, seen = [], {}
        try:
            for item in self._job.source.whole_items():
                version = item.version or file_version(item.path)
                if version is None or self._taken.get(item.key) == version:
                    continue
                seen[item.key] = version
                # An object appears in its store when it is complete.
                if item.version or self._seen.get(item.key) == version:
                    settled.append(item)
        except EmptySource:
            return []
        except InputError as error:
            # For example a list that is being written, or a folder that was removed.
            self._say_once(f"{error}; looking again")
            return []
        self._seen = seen
        return settled

    def _take(self, items: list[Item]) -> None:
        """Note that items need not be encoded until they change."""
        self._taken.update({item.key: self._seen[item.key] for item in items})

    def _say_once(self, problem: str) -> None:
        if problem != self._problem:
            say(problem)
        self._problem = problem

    def _encode(self, items: list[Item]) -> None:
        tile_px = self._job.source.tile_px
        whole = items if tile_px is None else list(cut_scenes(items, tile_px))
        before = self._tally.num_encoded, self._tally.num_refused
        self._target.refresh()
        for portion in new_items(whole, self._target, self._retry_refused):
            self._tally.add_known(portion)
            if len(portion.items) > MAX_ENCODED_HERE:
                with self._target.writing(), connected():
                    # Again, because others may have written in between.
                    for current in new_items(portion.items, self._target, self._retry_refused):
                        run_portion(self._job, current, self._target, self._tally)
            else:
                for start in range(0, len(portion.items), COMMIT_ROWS):
                    self._encode_here(portion.items[start : start + COMMIT_ROWS])
            if portion.resolved:
                with self._target.writing():
                    self._target.unrefuse(sorted(portion.resolved))
        self._retry_refused = False
        encoded, refused = self._tally.num_encoded - before[0], self._tally.num_refused - before[1]
        if encoded or refused:
            say(f"{encoded} images encoded, {refused} refused; the archive has {self._target.num_rows} rows")

    def _encode_here(self, items: list[Item]) -> None:
        """Encode and commit a few images."""
        if self._encoder is None:
            self._encoder = Encoder(self._job.model, self._device())
        began = time.monotonic()
        size = rows_within(BATCH_SIZE, self._job.preprocessing)
        starts = range(0, len(items), size)
        batches = [decode(item_table(items[start : start + size]), self._job.preprocessing) for start in starts]
        rows = pa.concat_tables([self._encoder(batch) for batch in batches])
        with self._target.writing():
            # Again, because others may have written in between.
            for portion in new_items(items, self._target, self._retry_refused):
                self._commit(rows, portion)
        self._tally.encode_s += time.monotonic() - began

    def _commit(self, rows: pa.Table, portion: Portion) -> None:
        """Commit those of the encoded rows that belong to the items of a portion; this process is the writer."""
        keys = [item.key for item in portion.items]
        rows = rows.filter(pc.is_in(rows["key"], pa.array(keys, pa.string())))
        if not len(rows):
            return
        replaces = pc.is_in(rows["key"], pa.array(sorted(portion.replacing), pa.string()))
        rows = rows.set_column(rows.schema.get_field_index("replaces"), "replaces", replaces)
        written = Written(**write(rows, self._target.path).to_pylist()[0])
        commit(self._target, [written])
        self._target.unrefuse(sorted(portion.retried.difference(written.refused)))
        self._tally.add(written)
        self._num_commits += 1
        if self._num_commits % OPTIMIZE_EVERY == 0:
            self._target.optimize()
            self._target.clean_up()

    def _device(self) -> str:
        import torch

        return "cuda" if self._job.workers.gpus != 0 and torch.cuda.is_available() else "cpu"

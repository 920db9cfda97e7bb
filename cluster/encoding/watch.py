"""Encoding that goes on: what arrives in a source becomes rows of the archive within seconds, until it is stopped.

A few new images are encoded in this process, where the network stays loaded; many at once go through Ray Data, as they
do at the first look. The right to write the archive is held only while something is committed, or while Ray Data runs,
so that a gateway of the same archive can take changes meanwhile.
"""

import itertools
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from orbithash.cluster.encoding.encode import EncodeSummary, Job, Tally, Workers, new_items, run_portion
from orbithash.cluster.encoding.stages import Encoder, decode, item_table, rows_within, write
from orbithash.cluster.output import say
from orbithash.cluster.runtime import connected
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import ArchiveBusy, InputError
from orbithash.encoders.imagery.remote import is_remote
from orbithash.encoders.imagery.sources import EmptySource, Item, count_source, cut, iter_source

__all__ = ["watch"]

# Between two looks; or so many times as long as a look takes, for sources of very many images.
LOOK_EVERY_S = 1.0
LOOK_SHARE = 3

# More new images than these are worth a start of Ray Data.
MOST_HERE = 1024

# Images of a commit, and of a batch of the stages, where they are encoded here.
COMMIT_ROWS = 256
BATCH_SIZE = 64

# Commits after which the small pieces that they leave are joined.
OPTIMIZE_EVERY = 100


def watch(
    source: str,
    model: Path,
    archive: str,
    workers: Workers | None = None,
    tile_px: int | None = None,
    asset: str | None = None,
) -> EncodeSummary:
    """Encodes what is and what comes into `source`, until SIGTERM or Ctrl-C; what was committed stays.

    A file is taken when its size and time of change were the same at two looks. Files that a list names may come later.

    Raises:
        InputError: as `encode`; a source that becomes unreadable later, and an archive that others write, are said and
            tried again.
    """
    job = Job.of(source, model, archive, workers or Workers(), tile_px, asset)
    with suppress(EmptySource):
        next(iter_source(source, tile_px, asset))
        count_source(source, asset=asset)
    watcher = _Watcher(job, Archive.open_or_create(archive, job.bits, job.model_id))
    with _stopped_by_signals():
        say(f"watching {source}; Ctrl-C or SIGTERM ends it")
        watcher.run()
    return watcher.summary()


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and Ctrl-C end the block, and nothing else."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    # Ray's own handler of SIGTERM, which it sets when it starts, exits.
    except (KeyboardInterrupt, SystemExit):
        say("told to stop")
    finally:
        signal.signal(signal.SIGTERM, before)


class _Watcher:
    def __init__(self, job: Job, target: Archive) -> None:
        self._job = job
        self._target = target
        self._tally = Tally()
        self._encoder: Encoder | None = None
        self._num_commits = 0
        # Images and scenes that need no look any more, and what the others were like at the last one.
        self._taken: set[str] = set()
        self._stamps: dict[str, tuple[int, ...]] = {}
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
                    self._taken.update(item.key for item in settled)
            time.sleep(max(LOOK_EVERY_S, LOOK_SHARE * (time.monotonic() - begun) if not settled else 0))

    def summary(self) -> EncodeSummary:
        self._target.refresh()
        return self._tally.summary(len(self._taken), self._target.num_rows)

    def _look(self) -> list[Item]:
        """What is not taken yet and did not change since the last look; scenes are whole."""
        settled, stamps = [], {}
        try:
            for item in iter_source(self._job.source, asset=self._job.asset):
                if item.key not in self._taken and (stamp := _stamp(item.path)):
                    stamps[item.key] = stamp
                    if self._stamps.get(item.key) == stamp:
                        settled.append(item)
        except EmptySource:
            return []
        except InputError as error:
            # A list that is being written, a folder that was taken away.
            self._say_once(f"{error}; looking again")
            return []
        self._stamps = stamps
        return settled

    def _say_once(self, problem: str) -> None:
        if problem != self._problem:
            say(problem)
        self._problem = problem

    def _encode(self, items: list[Item]) -> None:
        whole = items if self._job.tile_px is None else list(cut(items, self._job.tile_px))
        before = self._tally.num_encoded, self._tally.num_refused
        self._target.refresh()
        for portion, num_done in new_items(whole, self._target):
            self._tally.num_done_before += num_done
            if len(portion) > MOST_HERE:
                with self._target.writing(), connected():
                    # Again, for others may have written meanwhile.
                    for todo, _ in new_items(portion, self._target):
                        run_portion(self._job, todo, self._target, self._tally)
            else:
                for start in range(0, len(portion), COMMIT_ROWS):
                    self._encode_here(portion[start : start + COMMIT_ROWS])
        encoded, refused = self._tally.num_encoded - before[0], self._tally.num_refused - before[1]
        if encoded or refused:
            say(f"{encoded} images encoded, {refused} refused; the archive has {self._target.num_rows} rows")

    def _encode_here(self, items: list[Item]) -> None:
        """A commit of a few images."""
        if self._encoder is None:
            self._encoder = Encoder(self._job.model, self._device())
        began = time.monotonic()
        size = rows_within(BATCH_SIZE, self._job.preprocessing)
        starts = range(0, len(items), size)
        batches = [decode(item_table(items[start : start + size]), self._job.preprocessing) for start in starts]
        rows = pa.concat_tables([self._encoder(batch) for batch in batches])
        with self._target.writing():
            # Another program may have written some of them meanwhile.
            known = self._target.origins([item.key for item in items]).keys()
            rows = rows.filter(pc.invert(pc.is_in(rows["key"], pa.array(sorted(known), pa.string()))))
            if not len(rows):
                return
            result = write(rows, self._target.path).to_pylist()[0]
            self._target.refuse(list(zip(result["refused"], result["reasons"], strict=True)))
            self._target.commit(result["fragments"])
            self._tally.add(result)
            self._num_commits += 1
            if self._num_commits % OPTIMIZE_EVERY == 0:
                self._target.optimize()
                self._target.clean_up()
        self._tally.encode_s += time.monotonic() - began

    def _device(self) -> str:
        import torch

        return "cuda" if self._job.workers.gpus != 0 and torch.cuda.is_available() else "cpu"


def _stamp(path: str) -> tuple[int, ...] | None:
    """Sizes and times of change of a file, or of the files in a folder; None where there is none yet."""
    if is_remote(path):
        # An object appears when all of it is there.
        return (1,)
    try:
        files = sorted(os.scandir(path), key=lambda entry: entry.name) if Path(path).is_dir() else [Path(path)]
        stats = [file.stat() for file in files]
    except OSError:
        return None
    return tuple(itertools.chain.from_iterable((stat.st_size, stat.st_mtime_ns) for stat in stats))

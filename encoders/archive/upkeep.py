"""Upkeep of a Lance dataset: join small fragments, index the keys, remove old versions.

Fragments are joined in tiers, as in a log-structured merge tree: when a tier holds `_FRAGMENTS_PER_TIER` fragments,
they become one of the next tier. A row is therefore rewritten a few times in its life, and a small commit never causes
a large rewrite.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

__all__ = ["Compaction", "clean_up", "commit_compaction", "prepare_compaction", "update_index"]

# A fragment with this number of rows or more belongs to the next tier. The last one is Lance's maximum of rows.
_TIERS = (1_024, 16_384, 262_144, 2**20)
_FRAGMENTS_PER_TIER = 16

# Maximum share of deleted rows: in the dataset, before fragments are rewritten without them, and in such a fragment.
_MAX_DELETED, _MAX_DELETED_IN_FRAGMENT = 0.2, 0.1
# Fewer deleted rows than this are no reason to rewrite.
_MIN_DELETED = 1000

# Rows outside of the index, which a look-up scans; and parts of the index, each of which a look-up searches.
_MAX_UNINDEXED, _MAX_INDEX_PARTS = 2**16, 16

# Versions that are kept: the newest ones, and all that are younger than this.
_KEPT_VERSIONS, _KEPT_FOR = 1000, timedelta(minutes=10)

# Fewer versions than this are no reason to look for files that can be removed.
_MIN_REMOVED_VERSIONS = 100


@dataclass(frozen=True)
class Compaction:
    """Rewritten fragments that are not part of the dataset yet."""

    rewrites: Sequence[Any]


def prepare_compaction(dataset: Any) -> Compaction | None:
    """Rewrite small fragments beside the dataset; None when that is not worthwhile.

    Takes time in proportion to the rewritten rows. The dataset may be changed meanwhile.
    """
    from lance.optimize import Compaction as Lance

    fragments = [fragment.metadata for fragment in dataset.get_fragments()]
    chosen = _small_fragments(fragments) or _deleted_fragments(fragments)
    if not chosen:
        return None
    # Lance would also rewrite any fragment with deletions, and would cut what it joins at `target_rows_per_fragment`.
    others = [fragment.id for fragment in fragments if fragment.id not in chosen]
    options = {"target_rows_per_fragment": _TIERS[-1], "excluded_fragment_ids": others}
    rewrites = [task.execute(dataset) for task in Lance.plan(dataset, options).tasks]
    return Compaction(rewrites) if rewrites else None


def commit_compaction(dataset: Any, compaction: Compaction) -> bool:
    """Put rewritten fragments in the place of the old ones, in one commit.

    Returns:
        False when rows of the old fragments were changed meanwhile: the fragments stay as they are, and a later
        `clean_up` removes the rewritten files. Lance may have made versions in which nothing changed.
    """
    from lance.optimize import Compaction as Lance

    try:
        Lance.commit(dataset, list(compaction.rewrites))
    except (OSError, RuntimeError, ValueError) as error:
        # Lance has no exception type for a conflict.
        if "conflict" not in str(error).lower():
            raise
        return False
    return True


def update_index(dataset: Any) -> bool:
    """Index the keys of rows that are in no index yet; return whether that made a new version.

    Nothing is done for few rows. New rows become a new part of the index; parts are merged when there are many.
    """
    names = [index.name for index in dataset.describe_indices() if index.field_names == ["key"]]
    if not names:
        if dataset.count_rows() <= _MAX_UNINDEXED:
            return False
        dataset.create_scalar_index("key", "BTREE")
        return True
    stats = dataset.stats.index_stats(names[0])
    if stats["num_unindexed_rows"] <= _MAX_UNINDEXED:
        return False
    num_parts = stats["num_indices"]
    dataset.optimize.optimize_indices(num_indices_to_merge=num_parts if num_parts >= _MAX_INDEX_PARTS else 0)
    return True


def clean_up(dataset: Any) -> bool:
    """Remove old versions and the files that only they use, if they are many; return whether they were."""
    if not _are_many_versions_old(dataset):
        return False
    # Both limits have to be exceeded. By age alone, a version that was the newest a moment ago would be removed.
    # Versions with a tag stay.
    dataset.cleanup_old_versions(
        older_than=_KEPT_FOR, retain_versions=_KEPT_VERSIONS, error_if_tagged_old_versions=False
    )
    return True


def _are_many_versions_old(dataset: Any) -> bool:
    """Return whether `_MIN_REMOVED_VERSIONS` could be removed, by what is on disk: any process may have made them."""
    distance = _KEPT_VERSIONS
    # A few files are read; the list of all versions would read a file of each.
    while (made_at := _made_at(dataset, dataset.version - distance)) is not None:
        if datetime.now() - made_at > _KEPT_FOR:
            return _made_at(dataset, dataset.version - distance - _MIN_REMOVED_VERSIONS + 1) is not None
        distance *= 2
    return False


def _made_at(dataset: Any, version: int) -> datetime | None:
    """Return the time of a version in the local time zone; None for one that does not exist."""
    if version < 1:
        return None
    try:
        made_at: datetime = dataset.checkout_version(version).get_version()["timestamp"]
    except (OSError, ValueError):
        return None
    return made_at


def _small_fragments(fragments: Sequence[Any]) -> set[int]:
    """Return the ids of the fragments of the highest full tier and of the tiers below it."""
    for low, high in reversed(list(zip((0, *_TIERS), _TIERS, strict=False))):
        if sum(low <= fragment.num_rows < high for fragment in fragments) >= _FRAGMENTS_PER_TIER:
            return {fragment.id for fragment in fragments if fragment.num_rows < high}
    return set()


def _deleted_fragments(fragments: Sequence[Any]) -> set[int]:
    """Return the ids of fragments with many deleted rows when there are many in the whole dataset."""
    num_deleted = sum(fragment.num_deletions for fragment in fragments)
    if num_deleted <= max(_MIN_DELETED, _MAX_DELETED * sum(fragment.physical_rows for fragment in fragments)):
        return set()
    return {
        fragment.id
        for fragment in fragments
        if fragment.num_deletions > _MAX_DELETED_IN_FRAGMENT * fragment.physical_rows
    }

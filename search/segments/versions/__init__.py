"""The versions of a shard: which rows of which segments exist, the files that say so, the choice of what to merge."""

"""Store codes: one Lance dataset with a row per image or tile, its commits, and the side table of refused items.

archive.py   the archive: reading, committing, one writer at a time
storage.py   columns, locations, opening, the lock of the writer
tables.py    rows as Arrow tables
refusals.py  the side table of refused items
stamps.py    what identifies the content of an image
changes.py   parts of a version, what changed between two versions
upkeep.py    joining of fragments, index of keys, removal of old versions
"""

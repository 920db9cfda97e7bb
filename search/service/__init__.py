"""Serve an archive: searches and changes of the archive that is served now, commits, and maintenance."""

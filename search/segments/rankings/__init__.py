"""Orders of the rows of a shard other than by the distance of codes, and numbers of rows by distance and by group."""

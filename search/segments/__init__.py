"""The rows of a shard in segments that never change: codes, columns, files, filters, versions of a shard."""

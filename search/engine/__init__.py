"""Answer queries over a snapshot of an archive: batches, filters, replicas, and the columns of hits."""

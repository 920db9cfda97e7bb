"""Plan a cluster: the cost model for shards, memory, nodes and query rate."""

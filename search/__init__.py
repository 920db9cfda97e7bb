"""Index shards, fan-out and merge, the gRPC gateway and its client."""

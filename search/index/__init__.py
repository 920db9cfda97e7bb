"""Search codes with FAISS: indexes, shards, the versions of a shard, the merge of shard answers, and duplicates."""

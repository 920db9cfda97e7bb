"""Answer queries from codes: FAISS indexes, shards, and the merge of their answers."""

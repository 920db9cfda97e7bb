"""Search codes: the index "exact", those of FAISS, the merge of answers, and groups of near-duplicates."""

"""Tables of embeddings: layouts of Parquet files, their rows as arrays, chunks of rows, repeated ids.

A layout of published embeddings belongs here.
"""

"""Serve archives on Ray: actors for shards and for query encoders, and the verb `serve`."""

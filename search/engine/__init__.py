"""Run searches and changes over shards: snapshots of an archive, batching, filters, replicas, the writer, the
service.
"""

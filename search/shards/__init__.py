"""The way to a shard: interface, messages, server, client, replicas and their health."""

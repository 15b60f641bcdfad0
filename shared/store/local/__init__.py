"""A store in a folder: durable effects, locks, commits and mapped shards."""

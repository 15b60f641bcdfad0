"""From shards to rows: open, read, verify and inspect a store."""

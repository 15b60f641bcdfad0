"""From batches to shards."""

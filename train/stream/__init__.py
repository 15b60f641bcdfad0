"""From a store to shuffled, normalised batches."""

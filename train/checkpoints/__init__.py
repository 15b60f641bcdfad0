"""A run on disk: its checkpoints, its record, and the lock of its folder."""

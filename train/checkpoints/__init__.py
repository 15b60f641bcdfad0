"""A run on disk: checkpoints, the record of what was asked, and the lock of its folder."""

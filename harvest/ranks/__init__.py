"""One store written by several processes."""

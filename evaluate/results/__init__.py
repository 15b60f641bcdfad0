"""The files that an evaluation writes."""

"""Metrics that need the language model."""

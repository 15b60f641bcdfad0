"""Metrics, loggers and the progress line."""

"""Metrics from saved activations alone."""

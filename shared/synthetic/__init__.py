"""Activations that are sums of known features, so that latents can be compared with the truth."""

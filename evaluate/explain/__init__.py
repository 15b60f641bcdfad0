"""Explanations of latents in words, with scores on documents that the explainer never saw."""

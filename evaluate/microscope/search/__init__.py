"""Search latents by their words and by their meaning."""

"""Compare latents with the features behind a synthetic store."""

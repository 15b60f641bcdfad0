"""Parts that several architectures share: sparse and dense latents, the auxiliary loss, dense products."""

"""What latents cause in the model: steering curves, attribution, and contrasts of two sets of texts."""

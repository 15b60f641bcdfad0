"""What follows from latents being features, where the truth is not known: `suite = "full"`."""

"""Find the norms, residual stream, attention and MLP of a transformer block by running the model."""

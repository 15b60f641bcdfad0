"""Find the parts of a transformer block by running the model: norms, residual stream, attention and MLP."""

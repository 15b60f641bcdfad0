"""Start training from a trained SAE, of Thresher or of another library."""

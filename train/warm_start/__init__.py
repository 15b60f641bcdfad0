"""Start from an SAE that was trained before, here or by another library."""

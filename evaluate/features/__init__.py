"""The feature index: which contexts and tokens each latent responds to, collected in one pass over the store."""
